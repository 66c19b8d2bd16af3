import errno
import multiprocessing
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from dia_lightning._checkpoint_file import DamagedFileError, load, newest_older, save
from dia_lightning._whole_files import remove_parts, written_whole, written_with_others

CONTENT: dict[str, Any] = {
    "state_dict": {"weight": torch.arange(12.0).reshape(3, 4), "bias": torch.ones(3)},
    "epoch": 3,
}


def same(found: Any) -> bool:
    return bool(torch.equal(found["state_dict"]["weight"], CONTENT["state_dict"]["weight"])) and found["epoch"] == 3


@pytest.fixture
def written(tmp_path: Path) -> Path:
    save(CONTENT, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def test_torch_reads_it_and_nothing_is_left_beside_it(written: Path) -> None:
    for found in (torch.load(written), torch.load(written, mmap=True), load(written)):
        assert same(found)
    assert os.listdir(written.parent) == [written.name]


def test_a_flipped_bit_is_found_wherever_it_is(written: Path) -> None:
    whole = written.read_bytes()
    draws = random.Random(0)
    for place in {*range(0, len(whole), 9), *range(len(whole) - 120, len(whole), 3)}:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draws.randrange(8)
        written.write_bytes(damaged)
        with pytest.raises(DamagedFileError):
            load(written)


def test_a_file_of_another_program_loads_unless_a_weight_is_flipped(tmp_path: Path) -> None:
    path = tmp_path / "other.ckpt"
    torch.save(CONTENT, path)
    assert same(load(path))
    weight = CONTENT["state_dict"]["weight"].numpy().tobytes()
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(weight) + 7] ^= 64
    path.write_bytes(damaged)
    assert not same(torch.load(path))
    with pytest.raises(DamagedFileError, match=r"the content of .* does not match its checksum"):
        load(path)


def test_files_of_old_torch_load(tmp_path: Path) -> None:
    torch.save(CONTENT, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(load(tmp_path / "old.pth"))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda whole: b"", "it is empty"),
        (lambda whole: bytes(len(whole)), "it is full of zeros"),
        (lambda whole: b"\n<!DOCTYPE html><title>404</title>", "it is an HTML page"),
        (lambda whole: b"not found", "it does not start like a torch file"),
        (lambda whole: whole[: len(whole) // 2], "it was cut off"),
        (lambda whole: whole[:-1], "it was cut off|does not match its digest"),
        (lambda whole: whole[:-120], "it was cut off"),
        (lambda whole: whole + b"more", "does not match its digest"),
    ],
)
def test_damage_is_named_with_the_newest_older_file_that_is_whole(
    written: Path, damage: Callable[[bytes], bytes], reason: str
) -> None:
    places = [written.with_name(name) for name in ("first.ckpt", "second.ckpt", "broken.ckpt")]
    for age, place in enumerate(places):
        save(CONTENT, place)
        os.utime(place, (1000 + age, 1000 + age))
    places[2].write_bytes(b"")
    os.utime(places[2], (2000, 2000))
    save(CONTENT, written.with_name("newer.ckpt"))
    written.write_bytes(damage(written.read_bytes()))
    os.utime(written, (3000, 3000))
    with pytest.raises(DamagedFileError, match=rf"({reason}).*newest older .* whole is .*second\.ckpt\.$"):
        load(written)


def test_a_file_of_the_same_run_takes_precedence_over_a_newer_one_of_another(tmp_path: Path) -> None:
    places = [tmp_path / run / "checkpoints" / name for run, name in (("b", "last"), ("b", "best"), ("a", "last"))]
    for age, place in enumerate(places):
        save(CONTENT, place.with_suffix(".ckpt"))
        os.utime(place.with_suffix(".ckpt"), (5000 - age, 5000 - age) if age < 2 else (4999.5, 4999.5))
    found = newest_older(places[0].with_suffix(".ckpt"), tmp_path.rglob("*.ckpt"))
    assert found == places[1].with_suffix(".ckpt")


@contextmanager
def limited(size: int) -> Iterator[None]:
    """Prevent files from growing, as on a full disk."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize("room", [0, 100, 1000, 1800])
def test_a_full_disk_leaves_the_last_whole_file_and_nothing_else(written: Path, room: int) -> None:
    before = written.read_bytes()
    message = rf"last\.ckpt cannot be written \(.*continue with --ckpt_path {re.escape(str(written))}\.$"
    with limited(room), pytest.raises(OSError, match=message):
        save({**CONTENT, "epoch": 4}, written)
    assert written.read_bytes() == before
    assert os.listdir(written.parent) == [written.name]


def write_slowly(path: Path) -> None:
    with written_whole(path) as part:
        part.write_bytes(b"half")
        time.sleep(60)


def test_what_a_killed_process_has_left_is_removed_and_what_is_being_written_is_not(tmp_path: Path) -> None:
    own = tmp_path / ".theirs.part"
    own.write_text("the user's")
    process = multiprocessing.get_context("fork").Process(target=write_slowly, args=(tmp_path / "run" / "a.csv",))
    (tmp_path / "run").mkdir()
    process.start()
    while not any(part.stat().st_size for part in (tmp_path / "run").iterdir()):
        time.sleep(0.01)
    assert remove_parts([tmp_path]) == []
    process.kill()
    process.join()
    assert [part.name for part in remove_parts([tmp_path])] == [f".a.csv.{process.pid}.part"]
    assert list((tmp_path / "run").iterdir()) == []
    assert own.exists()


def test_a_disk_without_locks_takes_files_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with written_whole(tmp_path / "a.csv") as part:
        part.write_text("1,2\n")
        assert remove_parts([tmp_path]) == []  # it could be someone else's
    assert (tmp_path / "a.csv").read_text() == "1,2\n"


def write_half(path: Path) -> None:
    path.write_text("half")
    raise InterruptedError


def test_a_file_with_others_beside_it_appears_with_them_or_not_at_all(tmp_path: Path) -> None:
    with written_with_others(tmp_path / "new" / "a.onnx") as made:
        made.write_text("graph")
        made.with_name("a.onnx.data").write_text("weights")
    assert sorted(os.listdir(tmp_path / "new")) == ["a.onnx", "a.onnx.data"]
    with pytest.raises(InterruptedError), written_with_others(tmp_path / "new" / "a.onnx") as made:
        write_half(made)
    assert (tmp_path / "new" / "a.onnx").read_text() == "graph"
    assert sorted(os.listdir(tmp_path / "new")) == ["a.onnx", "a.onnx.data"]
