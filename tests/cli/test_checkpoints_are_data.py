"""Whatever the hyper-parameters of a checkpoint hold, no way in imports or calls anything that they name."""

import json
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from dia_lightning import _strict_yaml
from dia_lightning.attention import attach
from dia_lightning.cli._errors import UserError
from dia_lightning.cli.command import rehearse
from dia_lightning.cli.runs.read_checkpoint import check_is_of_run
from dia_lightning.datamodules import DigitsDataModule
from dia_lightning.models import from_pretrained, get_model, save_pretrained
from dia_lightning.tasks import ClassificationTask, DIATask, load_task
from tests.cli.conftest import call

OPTIONS = ("attention_args", "backbone_args", "optimizer", "schedule", "freeze", "class_weights", "sites", "own_option")
ONCE = [  # what has run commands, in the forms that Lightning and jsonargparse know
    {
        "_instantiator": "lightning.pytorch.cli.instantiate_module",
        "_class_path": "dia_lightning.tasks.ClassificationTask",
    },
    {"_instantiator": "imported_canary.run", "_class_path": "imported_canary.run"},
]


@pytest.fixture
def canaries(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A class by two paths, in a module that is imported and in one that is not; neither may be touched."""
    calls: list[Any] = []
    module = ModuleType("imported_canary")
    record = lambda *args, **options: calls.append(args)  # noqa: E731
    module.run = type("run", (), {"__init__": record, "__module__": "imported_canary"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "imported_canary", module)
    Path("new_canary.py").write_text("class run:\n    def __init__(self, **options): ...\n")
    monkeypatch.syspath_prepend(str(workplace))
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    yield
    assert not calls
    assert "new_canary" not in sys.modules


def thing(draw: random.Random, depth: int = 0) -> Any:
    """Return a value with code somewhere in it."""
    path = draw.choice(["new_canary.run", "imported_canary.run"])
    arguments = draw.choice([{}, {}, {"args": "x"}, [1]])
    code: Any = {draw.choice(["class_path", "_class_path"]): path, draw.choice(["init_args", "dict_kwargs"]): arguments}
    forms: list[Callable[[], Any]] = [
        lambda: code,
        lambda: path,
        lambda: json.dumps(code),
        lambda: json.dumps(code).replace("class", "cl\\u0061ss"),
        lambda: f"class_path: {path}\ninit_args: {{}}",
        lambda: f"[{{class_path: {path}}}]",
        lambda: f"!!python/object/apply:{path} []",
    ]
    if depth > 3 or draw.random() < 0.4:
        return draw.choice(forms)()
    inner = thing(draw, depth + 1)
    around: list[Any] = [
        [1, inner],
        {"depth": 11, "x": inner},
        {"reduction": 4, "x": [inner]},
        json.dumps({"x": inner}),
    ]
    return draw.choice(around)


def spoil(content: dict[str, Any], seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    spoiled = {name: thing(draw) for name in draw.sample(OPTIONS, draw.randint(1, 2))}
    extra = draw.choice([{}, *ONCE])
    return {
        **content,
        "hyper_parameters": {**content["hyper_parameters"], **spoiled, **extra},
        DigitsDataModule.CHECKPOINT_HYPER_PARAMS_KEY: {"limit": 20, "root": thing(draw), **extra},
    }


@pytest.mark.usefixtures("canaries")
def test_no_checkpoint_runs_code_when_it_is_loaded_from_python(run_folder: Path) -> None:
    content = torch.load(run_folder / "checkpoints" / "last.ckpt", weights_only=True)
    folder = load_task(run_folder / "checkpoints" / "last.ckpt").save_pretrained("shared")
    config = json.loads((folder / "config.json").read_text())
    for seed in range(12):
        spoiled = spoil(content, seed)
        torch.save(spoiled, "spoiled.ckpt")
        found = {name: value for name, value in spoiled["hyper_parameters"].items() if name[0] != "_" or seed % 2}
        (folder / "config.json").write_text(json.dumps({**config, "hyper_parameters": found}))
        ways: list[Callable[[], Any]] = [
            lambda: load_task("spoiled.ckpt"),
            lambda: ClassificationTask.load_from_checkpoint("spoiled.ckpt"),
            lambda: DigitsDataModule.load_from_checkpoint("spoiled.ckpt"),
            lambda: DIATask.from_pretrained("shared"),
            lambda: ClassificationTask("cifar_resnet", 10, backbone_args={"depth": 11}, init_from="spoiled.ckpt"),
        ]
        for way in ways:
            with suppress(ValueError):
                way()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.usefixtures("canaries")
def test_no_checkpoint_runs_code_in_a_command(run_folder: Path, seed: int) -> None:
    last = run_folder / "checkpoints" / "last.ckpt"
    torch.save(spoil(torch.load(last, weights_only=True), 100 + seed), last)
    for command in ("test", "validate", "predict", "fit"):
        with suppress(SystemExit, UserError):
            rehearse([command, "-c", "bare.yaml", "--model.backbone", "cifar_resnet", "--ckpt_path", str(last)])
    others = [[name, str(last)] for name in ("sites", "check", "sample", "analyze")]
    for words in (["export", str(last), "x.safetensors"], *others):
        with suppress(SystemExit):
            call(*words)


@pytest.mark.usefixtures("canaries")
def test_no_folder_of_a_network_runs_code() -> None:
    folder = save_pretrained(attach(get_model("cifar_resnet", depth=11), "se"), "network")
    config = json.loads((folder / "config.json").read_text())
    for seed in range(20):
        draw = random.Random(seed)
        attention = draw.choice(["imported_canary.run", "new_canary.run", thing(draw)])
        described = {"": {"attention": attention, draw.choice(["sites", "branches", "plug"]): thing(draw)}}
        (folder / "config.json").write_text(json.dumps({**config, "dia": described}))
        with pytest.raises(ValueError, match=r"."):
            from_pretrained(get_model("cifar_resnet", depth=11), folder)


@pytest.mark.usefixtures("canaries")
def test_a_class_in_a_checkpoint_is_refused_in_one_line_that_says_what_to_do(run_folder: Path) -> None:
    path = run_folder / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"]["attention_args"] = {"x": [{"class_path": "new_canary.run"}]}
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"holds the text 'class_path' as attention_args, .* Pass what you trust"):
        load_task(path)
    assert ClassificationTask.load_from_checkpoint(path, attention_args=None).hparams["attention_args"] is None
    with pytest.raises(ValueError, match="weights_only=False would run code"):
        ClassificationTask.load_from_checkpoint(path, weights_only=False)


@pytest.mark.usefixtures("canaries")
def test_names_with_dots_are_taken_from_a_checkpoint_where_they_name_layers(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(run_folder / "checkpoints" / "last.ckpt")
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"] |= {"freeze": ["backbone.layer1"], "optimizer": {"class_path": "new_canary.run"}}
    torch.save(content, path)
    built = rehearse(["fit", "-c", "bare.yaml", "--model.backbone", "cifar_resnet", "--ckpt_path", path])
    assert built.model.hparams["freeze"] == ["backbone.layer1"]
    assert "not taken from the checkpoint, because it is no plain data: optimizer." in capsys.readouterr().err


@pytest.mark.parametrize("command", ["test", "fit"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hyper_parameters": [1]}, "hyper_parameters is missing or of another kind"),
        ({"loops": {}}, "loops.{}_loop is missing"),
        ({"callbacks": 1, "dia_run": []}, "callbacks, dia_run is missing"),
        ({"state_dict": None}, "state_dict is missing"),
    ],
)
def test_a_file_that_is_no_checkpoint_of_a_run_is_refused(command: str, change: Any, message: str) -> None:
    checkpoint: dict[str, Any] = {"state_dict": {}, "hyper_parameters": {}, "callbacks": {}, "epoch": 0}
    checkpoint |= {"dia_task": "ClassificationTask", "global_step": 1, "optimizer_states": [], "lr_schedulers": []}
    checkpoint |= {"pytorch-lightning_version": "2.6", "loops": {f"{command}_loop": {}}}
    check_is_of_run(checkpoint, "x.ckpt", command)
    with pytest.raises(ValueError, match=message.format(command)):
        check_is_of_run({**checkpoint, **change}, "x.ckpt", command)


def test_a_short_text_that_stands_for_a_document_without_end_is_refused() -> None:
    bomb = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))
    for text in (bomb, "a: &x {me: *x}", "&x [*x]"):
        with pytest.raises(yaml.YAMLError, match=r"aliases .* Write them out"):
            _strict_yaml.load(text, "x.yaml")
    assert _strict_yaml.load("a: &x {b: 1}\nc: *x") == {"a": {"b": 1}, "c": {"b": 1}}
