"""The command `reproduce`: which runs it starts, what it keeps of them, and when it starts them again."""

import csv
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dia_lightning.cli.commands import reproduce
from dia_lightning.reproduce import pool
from dia_lightning.reproduce.experiment import read_experiment
from dia_lightning.reproduce.results import last_values
from tests.cli.conftest import Run, call

Fails = Callable[..., str]

SPEC: dict[str, Any] = {
    "name": "compared",
    "base": ["tiny.yaml"],
    "options": {"trainer.max_epochs": 2},
    "seeds": [0, 1],
    "control": "plain",
    "metrics": {"test/acc": {"scale": 100, "unit": "%", "digits": 1}},
    "arms": {"plain": {"model.attention": None}, "se per block": {"model.attention": "se", "model.share": "block"}},
}
#: In place of a training: does what `behaviour.json` says about the arm, and logs an accuracy of 0.5 + seed / 10.
STAND_IN = """\
import json, pathlib, sys, time
options = dict(part[2:].split("=", 1) for part in sys.argv[1:] if part.startswith("--"))
where = json.loads(options["trainer.logger"])[0]["init_args"]
folder = pathlib.Path(where["save_dir"], where["name"], where["version"])
behaviour = json.loads(pathlib.Path("behaviour.json").read_text()).get(where["name"])
with open("started.txt", "a") as file:
    file.write(f"{where['name']} {options['seed_everything']}\\n")
(folder / "half").touch()
if behaviour == "hang":
    time.sleep(600)
elif behaviour == "diverge":
    sys.exit(3)
elif behaviour == "fail":
    sys.exit("first line\\nthe last line")
elif behaviour != "silent":
    acc = 0.5 + int(options["seed_everything"]) / 10
    (folder / "metrics.csv").write_text(f"epoch,step,test/acc,val/acc\\n0,1,,0.3\\n0,2,,0.4\\n1,2,{acc},\\n")
"""


def write_spec(**changes: Any) -> None:
    Path("spec.yaml").write_text(yaml.safe_dump({**SPEC, **changes}, sort_keys=False))


def behave(**arms: str) -> None:
    Path("behaviour.json").write_text(json.dumps(arms))


def started() -> list[str]:
    return Path("started.txt").read_text().splitlines()


def result(arm: str, seed: int, runs: str = "runs/reproduce") -> dict[str, Any]:
    path = Path(runs, "compared", arm, f"seed={seed}", "result.json")
    content: dict[str, Any] = json.loads(path.read_text())
    return content


@pytest.fixture
def stand_in(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (workplace / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(pool, "COMMAND", (sys.executable, "stand_in.py"))
    monkeypatch.setattr(reproduce, "_check_commands", lambda runs, folder: None)  # they are not those that run here
    write_spec()
    behave()
    return workplace


def call_with_stand_in() -> None:
    """Do in a new process what the fixture does in this one."""
    # a shell that starts the suite in the background has it ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    pool.COMMAND = (sys.executable, "stand_in.py")  # type: ignore[assignment]
    reproduce._check_commands = lambda runs, folder: None
    call("reproduce", "spec.yaml")


# ---- through the real program


@pytest.mark.slow
def test_runs_are_those_of_the_command_line_and_divergence_is_a_result(run: Run, workplace: Path) -> None:
    second = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "second"}}
    options = {"trainer.max_epochs": 2, "test_after_fit": True, "trainer.logger+": second}
    no_norm = {"model.backbone_args": {"depth": 11, "norm": False}, "model.lr": 1000}
    write_spec(options=options, seeds=[1], arms={"plain": {"model.attention": None}, "no norm": no_norm})
    run("reproduce", "spec.yaml", "--jobs", "2")

    assert result("no norm", 1)["outcome"] == "diverged"
    assert result("no norm", 1)["message"].startswith("The loss is")
    folder = Path("runs/reproduce/compared/plain/seed=1")
    assert {"checkpoints", "config.yaml", "log.txt", "metrics.csv", "result.json"} <= set(os.listdir(folder))
    assert Path("second").is_dir()
    kept = result("plain", 1)
    run(*kept["command"])  # into runs/tiny, where the config puts it
    assert kept["metrics"] == last_values(Path("runs/tiny/version_0/metrics.csv"))
    assert kept["versions"]["torch"]
    assert kept["seconds"] > 0
    table = Path("runs/reproduce/compared/table.md").read_text()
    assert "| no norm | 0 (1 of 1 diverged) |" in table


# ---- what is run


def test_every_arm_runs_with_every_seed_once(run: Run, stand_in: Path) -> None:
    run("reproduce", "spec.yaml", "--jobs", "3")
    run("reproduce", "spec.yaml")
    assert sorted(started()) == ["plain 0", "plain 1", "se per block 0", "se per block 1"]
    assert result("plain", 1)["metrics"] == {"test/acc": 0.6, "val/acc": 0.4}
    assert result("se per block", 0)["command"] == [
        *("fit", "-c", "tiny.yaml", "--trainer.max_epochs=2", "--model.attention=se", "--model.share=block"),
        "--seed_everything=0",
    ]


def test_only_runs_the_arms_that_are_named_and_the_table_has_all(run: Run, stand_in: Path) -> None:
    run("reproduce", "spec.yaml", "--only", "se per block")
    assert started() == ["se per block 0", "se per block 1"]
    assert "| plain | 0 (2 of 2 not run yet) |" in Path("runs/reproduce/compared/table.md").read_text()


def test_new_seeds_and_arms_are_added_to_what_is_there(run: Run, stand_in: Path) -> None:
    run("reproduce", "spec.yaml", "--only", "plain")
    write_spec(seeds=[0, 1, 5], arms={**SPEC["arms"], "new": {"model.attention": "eca"}})
    run("reproduce", "spec.yaml", "--only", "plain", "new")
    assert sorted(started()) == ["new 0", "new 1", "new 5", "plain 0", "plain 1", "plain 5"]


def test_a_dry_run_prints_the_commands_and_runs_nothing(
    run: Run, stand_in: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("reproduce", "spec.yaml", "--dry_run")
    printed = capsys.readouterr().out
    assert "# plain, seed 1: not run yet" in printed
    assert "dia-lightning fit -c tiny.yaml --trainer.max_epochs=2 --model.attention=null --seed_everything=1" in printed
    assert sorted(path.name for path in stand_in.iterdir()) == [
        *("bare.yaml", "behaviour.json", "spec.yaml", "stand_in.py", "tiny.yaml"),
    ]


def test_options_of_all_arms_give_way_to_those_of_an_arm(stand_in: Path) -> None:
    write_spec(options={"model.lr": 0.1, "data.limit": 3}, arms={"plain": {"model.lr": 0.2}, "other": None})
    arms = read_experiment("spec.yaml").arms
    assert arms == {"plain": ("--model.lr=0.2", "--data.limit=3"), "other": ("--model.lr=0.1", "--data.limit=3")}


# ---- runs that do not finish


def test_a_diverged_run_is_counted_and_not_repeated(run: Run, stand_in: Path) -> None:
    behave(**{"se per block": "diverge"})
    run("reproduce", "spec.yaml")
    behave()
    run("reproduce", "spec.yaml")
    assert len(started()) == 4
    with open("runs/reproduce/compared/table.csv", newline="") as file:
        rows = {row["arm"]: row for row in csv.DictReader(file)}
    assert [rows["se per block"][name] for name in ("n", "diverged", "mean", "pairs")] == ["0", "2", "", "0"]
    assert rows["plain"]["n"] == "2"
    assert float(rows["plain"]["mean"]) == pytest.approx(55.0)


def test_a_metric_that_the_first_run_does_not_log_stops_all(run: Run, stand_in: Path, fails: Fails) -> None:
    write_spec(metrics={"test/accc": None})
    message = fails("reproduce", "spec.yaml")
    assert "metrics: a run of 'plain' has ended and logged no test/accc, but val/acc, test/acc. Name one of" in message
    assert started() == ["plain 0"]
    write_spec()
    run("reproduce", "spec.yaml")
    assert started() == ["plain 0", "plain 0", "se per block 0", "plain 1", "se per block 1"]


def test_a_failed_run_fails_the_command_after_the_others_and_is_repeated(
    run: Run, stand_in: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    behave(plain="fail")
    with pytest.raises(SystemExit) as exit_info:
        run("reproduce", "spec.yaml")
    assert exit_info.value.code == 1
    assert len(started()) == 4
    assert result("plain", 0)["message"] == "the last line"
    printed = capsys.readouterr()
    assert "plain, seed 0: running, log in runs/reproduce/compared/plain/seed=0/log.txt" in printed.err
    assert re.search(r"plain, seed 0: failed after \d+ s: the last line See \S+plain/seed=0/log.txt", printed.err)
    assert "| plain | 0 (2 of 2 failed) |" in printed.out
    behave()
    run("reproduce", "spec.yaml")
    assert started()[4:] == ["plain 0", "plain 1"]
    assert result("plain", 0)["outcome"] == "finished"


@pytest.fixture
def hanging(stand_in: Path) -> Iterator[multiprocessing.process.BaseProcess]:
    """A call in a process of its own, whose control arm has finished and whose second arm never will."""
    behave(**{"se per block": "hang"})
    write_spec(seeds=[0])
    # not a fork: the locks of this process's other threads would stay closed in it
    process = multiprocessing.get_context("spawn").Process(target=call_with_stand_in)
    process.start()
    wait_for(lambda: Path("started.txt").exists() and started() == ["plain 0", "se per block 0"])
    yield process
    process.kill()


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def child_of(process: multiprocessing.process.BaseProcess) -> int:
    lock = Path("runs/reproduce/compared/lock")
    wait_for(lambda: len(lock.read_text().split()) == 3)  # the call and its two runs
    return int(lock.read_text().split()[-1])


def test_after_a_kill_only_the_unfinished_run_starts_again(
    hanging: multiprocessing.process.BaseProcess, run: Run, fails: Fails
) -> None:
    left_behind = child_of(hanging)
    hanging.kill()
    hanging.join()
    finished = Path("runs/reproduce/compared/plain/seed=0/result.json").stat().st_mtime_ns
    assert f"is in use (processes {left_behind})" in fails("reproduce", "spec.yaml").replace(f"{hanging.pid}, ", "")
    assert len(started()) == 2
    os.kill(left_behind, signal.SIGKILL)
    behave(**{"se per block": "fail"})
    wait_for(free_again)
    with pytest.raises(SystemExit):
        run("reproduce", "spec.yaml")
    assert started() == ["plain 0", "se per block 0", "se per block 0"]
    assert Path("runs/reproduce/compared/plain/seed=0/result.json").stat().st_mtime_ns == finished


def free_again() -> bool:
    try:
        with pool.locked(Path("runs/reproduce/compared")):
            return True
    except ValueError:
        return False


def test_nothing_of_a_half_done_run_remains(run: Run, stand_in: Path) -> None:
    folder = Path("runs/reproduce/compared/plain/seed=0")
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("test/acc\n0.99\n")
    (folder / "older").touch()
    run("reproduce", "spec.yaml")
    assert not (folder / "older").exists()
    assert result("plain", 0)["metrics"]["test/acc"] == 0.5


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_ends_the_runs_and_leaves_the_finished_ones(
    hanging: multiprocessing.process.BaseProcess, number: int, code: int
) -> None:
    child = child_of(hanging)
    assert hanging.pid is not None
    os.kill(hanging.pid, number)
    hanging.join(60)
    assert hanging.exitcode == code
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert result("plain", 0)["outcome"] == "finished"
    assert not Path("runs/reproduce/compared/se per block/seed=0/result.json").exists()
    assert "| plain | 1 |" in Path("runs/reproduce/compared/table.md").read_text()


# ---- results that do not belong together


def test_another_command_for_a_finished_run_is_refused(run: Run, stand_in: Path, fails: Fails) -> None:
    run("reproduce", "spec.yaml")
    write_spec(options={"trainer.max_epochs": 3})
    message = fails("reproduce", "spec.yaml")
    assert "The arm 'plain', seed 0, in runs/reproduce/compared/plain/seed=0 is finished" in message
    assert "(then --trainer.max_epochs=2, now --trainer.max_epochs=3)" in message
    assert "--runs FOLDER" in message
    run("reproduce", "spec.yaml", "--runs", "elsewhere")
    assert result("plain", 0, runs="elsewhere")["outcome"] == "finished"
    assert len(started()) == 8


def test_another_base_config_for_a_finished_run_is_refused_unless_only_its_comments_changed(
    run: Run, stand_in: Path, fails: Fails
) -> None:
    run("reproduce", "spec.yaml")
    text = Path("tiny.yaml").read_text()
    Path("tiny.yaml").write_text(f"# a comment\n{text}")
    run("reproduce", "spec.yaml")
    Path("tiny.yaml").write_text(text.replace("lr: 0.05", "lr: 0.06"))
    assert "the content of tiny.yaml has changed" in fails("reproduce", "spec.yaml")


def test_a_metric_that_finished_runs_lack_is_named(run: Run, stand_in: Path, fails: Fails) -> None:
    run("reproduce", "spec.yaml")
    write_spec(metrics={"val/acc": None})
    run("reproduce", "spec.yaml")
    assert "| plain | 2 | 0.4000 ± 0.0000 |" in Path("runs/reproduce/compared/table.md").read_text()
    write_spec(metrics={"test/f1": None})
    assert "has logged no test/f1. It has val/acc, test/acc" in fails("reproduce", "spec.yaml")


def test_a_damaged_result_is_named(run: Run, stand_in: Path, fails: Fails) -> None:
    run("reproduce", "spec.yaml")
    Path("runs/reproduce/compared/plain/seed=0/result.json").write_text("{")
    assert "plain/seed=0/result.json is damaged" in fails("reproduce", "spec.yaml")


# ---- mistakes in a specification


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model.atention": "se"}, "atention"),
        ({"model.lr": -1}, "lr must be a positive number, got -1.0"),
        ({"model.backbone_args": {"depth": 12}}, "got depth=12. The nearest possible depths are 11 and 20"),
    ],
)
def test_a_mistake_in_the_last_arm_shows_before_the_first_run(
    fails: Fails, options: dict[str, Any], message: str
) -> None:
    write_spec(arms={"plain": {}, "wrong": options})
    for more in ([], ["--dry_run"]):
        printed = fails("reproduce", "spec.yaml", *more)
        assert printed.startswith("The arm 'wrong' cannot run. ")
        assert message in printed
    assert not list(Path("runs").rglob("log.txt"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arm": {}}, "there is no key 'arm'. Known: name, base, options"),
        ({"seeds": []}, "seeds is missing or empty"),
        ({"seeds": [1, 1]}, r"seeds must be different whole numbers from 0 on, \[0, 1, 2\], but here is \[1, 1\]"),
        ({"seeds": [True]}, "seeds must be different whole numbers"),
        ({"seeds": 3}, r"seeds must be a list, \[a, b\], but here is 3"),
        ({"control": "se"}, "control: there is no arm 'se'. Arms: plain, se per block"),
        ({"control": {"plain": "se"}}, "control: there is no arm 'se'"),
        ({"arms": {4: {}}}, "an arm is the name of a folder too, .* but here is 4"),
        ({"arms": {"../a": {}}}, "an arm is the name of a folder too, .* but here is '../a'"),
        ({"name": "a/b"}, "name is the name of a folder too"),
        ({"arms": {"plain": ["--model.lr"]}}, "arms: plain must have names and values"),
        ({"arms": {"plain": {"--model.lr": 1}}}, "without hyphens; got '--model.lr'"),
        ({"options": {"seed_everything": 1}}, "seed_everything is set by the runner. .* name the seeds below seeds"),
        ({"options": {"trainer.logger": False}}, r"trainer.logger is set by the runner. .* trainer.logger\+"),
        ({"metrics": {"test/acc": {"scal": 2}}}, "metrics: test/acc: there is no key 'scal'"),
        ({"metrics": {"test/acc": {"scale": 0}}}, "scale must be a number other than 0, got 0"),
        ({"metrics": {"test/acc": {"unit": 3}}}, "unit must be a text, got 3"),
        ({"metrics": {"test/acc": {"digits": -1}}}, r"digits must be a whole number in 0..10, got -1"),
        ({"base": ["missing.yaml"]}, "There is no file missing.yaml. Base configs are looked for from the working"),
    ],
)
def test_mistakes_are_named(workplace: Path, fails: Fails, changes: dict[str, Any], message: str) -> None:
    write_spec(**changes)
    assert re.search(message, fails("reproduce", "spec.yaml"))


def test_what_is_no_specification_is_named(workplace: Path, fails: Fails) -> None:
    Path("spec.yaml").write_text("- a\n")
    assert fails("reproduce", "spec.yaml").startswith("spec.yaml: a specification has the keys name, base")
    Path("spec.yaml").write_text("name: a\nname: b\n")
    assert "name is given twice, in lines 1 and 2" in fails("reproduce", "spec.yaml")
    assert "There is no file nowhere.yaml. Give the path of a specification" in fails("reproduce", "nowhere.yaml")


def test_mistakes_on_the_command_line_are_named(stand_in: Path, fails: Fails) -> None:
    assert "--jobs must be at least 1, got 0" in fails("reproduce", "spec.yaml", "--jobs", "0")
    message = fails("reproduce", "spec.yaml", "--only", "eca")
    assert message == "--only eca: there is no such arm. Arms: plain, se per block."
