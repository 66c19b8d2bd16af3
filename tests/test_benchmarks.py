"""The benchmarks count and compare correctly, and the pages are written from what they measured."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import captured, cost, evidence, gpu, pack_cifar, precompile, report, threshold
from benchmarks.arms import DIA, PLAIN, SE_PER_BLOCK, SE_SHARED, WORKLOADS, Family, Workload, cifar_resnet
from benchmarks.kernels import count_kernels
from benchmarks.measures import rows
from benchmarks.memory import saved_bytes
from benchmarks.records import Results
from benchmarks.running import Setting
from benchmarks.timing import interleaved
from dia_lightning.attention import attention_layers

CPU = torch.device("cpu")
OWN = {PLAIN, SE_PER_BLOCK, SE_SHARED, DIA}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the output of a rehearsal of both commands."""
    folder = tmp_path_factory.mktemp("measured")
    pytest.importorskip("pytorchcv")  # its networks are among the arms
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OUT", str(folder))
        patch.setattr("benchmarks.growth.TINY_AXES", {"depth": (20,), "width": (2,)})
        cost.main(["--tiny"])
        gpu.main(["--tiny", "--parts", "evidence", "--seconds", "30"])
        threshold.main(["--tiny", "--runs", "2"])
    torch.set_num_threads(threads)
    return folder / "tiny"


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """The two pages before anything was measured."""
    (tmp_path / "pictures").mkdir()
    for page in report.PLACES:
        (tmp_path / page).write_text((Path(__file__).parents[1] / "docs" / page).read_text())
    return tmp_path


def rows_of(folder: Path, part: str) -> list[dict[str, Any]]:
    files = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return [row for file in files if file["part"] == part for row in file["rows"]]


def test_every_arm_has_its_rows(measured: Path) -> None:
    expected = {(family.made_by, arm) for family in WORKLOADS["tiny"].families for arm in family.arms}
    for part, count in (("time", 2), ("memory", 1), ("kernels", 1)):
        arms = [(row["made_by"], row["arm"]) for row in rows_of(measured, part)]
        assert set(arms) == expected
        assert len(arms) == count * len(expected)
    assert {row["arm"] for row in rows_of(measured, "graphs")} == OWN
    assert {(row["axis"], row["value"], row["arm"]) for row in rows_of(measured, "growth")} == {
        (axis, value, arm) for axis, value in (("depth", 20), ("width", 2)) for arm in OWN - {PLAIN}
    }


def test_the_evidence_has_equal_seeds_and_epochs_for_every_arm(measured: Path) -> None:
    found = rows_of(measured, "evidence")
    assert {(row["arm"], row["seed"]) for row in found if "accuracy" in row} == {
        (arm, seed) for arm in OWN for seed in (0, 1)
    }
    assert {row["epochs"] for row in found} == {2}
    mapped = [row["epoch"] for row in found if "epoch" in row and (row["arm"], row["seed"]) == (SE_PER_BLOCK, 1)]
    assert mapped == [0, 1, 2]


def test_the_report_fills_the_pages_and_does_so_again(measured: Path, docs: Path) -> None:
    prose = {page: _without_tables((docs / page).read_text()) for page in report.PLACES}
    command = ["--results", str(measured), "--docs", str(docs)]
    report.main(command)
    once = {page: (docs / page).read_text() for page in report.PLACES}
    report.main(command)
    assert once == {page: (docs / page).read_text() for page in report.PLACES}
    assert prose == {page: _without_tables(text) for page, text in once.items()}
    assert once["performance.md"].count("| pytorchcv | DIA-LSTM |") == 3  # time, memory, kernels
    assert once["results.md"].count("random images: 32 training and 16 test images, 2 epochs, 2 seeds.") == 1
    assert (docs / report.PICTURE).is_file()


def _without_tables(text: str) -> list[str]:
    parts = text.split("<!-- benchmarks: ")
    return [parts[0], *(part.partition(" -->")[0] + part.partition("<!-- end of ")[2] for part in parts[1:])]


def test_a_page_without_a_place_is_an_error(docs: Path) -> None:
    (docs / "results.md").write_text("# Results\n")
    with pytest.raises(ValueError, match=r"results\.md has no place for 'evidence'"):
        report.main(["--results", str(docs), "--docs", str(docs)])


def test_only_seeds_that_every_arm_has_finished_count(docs: Path, tmp_path: Path) -> None:
    results = Results(tmp_path / "evidence.json", "evidence")
    results.add({"data": "set", "train_images": 10, "test_images": 10, "epochs": 1})
    for arm, seed in [*((arm, 0) for arm in sorted(OWN)), (PLAIN, 1)]:
        results.add({"arm": arm, "seed": seed, "accuracy": 0.5 if seed == 0 else 0.9, "loss": 1.0})
    report.main(["--results", str(tmp_path), "--docs", str(docs)])
    text = (docs / "results.md").read_text()
    assert "1 epochs, 1 seeds." in text
    assert f"| {PLAIN} | 50.00 |" in text
    assert "90.00" not in text.partition("<!-- benchmarks: evidence -->")[2]


def test_what_cannot_be_measured_is_named(docs: Path, tmp_path: Path) -> None:
    family = Family("nobody", ("no_such_package",), {})
    results = Results(tmp_path / "time.json", "time")
    for row in rows(Workload("net", 2, 32, 10, 3, (family,)), Setting(CPU), []):
        results.add(row)
    report.main(["--results", str(tmp_path), "--docs", str(docs)])
    assert "| nobody | left out: no_such_package not installed |" in (docs / "performance.md").read_text()


def test_an_error_on_a_gpu_is_a_row_and_does_not_stop_what_follows() -> None:
    def fail() -> nn.Module:
        raise RuntimeError("no kernel\nand more")

    workload = Workload("net", 2, 32, 10, 3, (Family("somebody", (), {PLAIN: fail}),))
    [row] = gpu._rows(workload, Setting(CPU), [], None)
    assert (row["made_by"], row["arm"], row["left_out"]) == ("somebody", "the others", "RuntimeError: no kernel")


@pytest.mark.parametrize("name", [name for name in WORKLOADS if name != "resnet20"])
def test_the_number_of_sites_is_that_of_the_network(name: str) -> None:
    with torch.device("meta"):
        network = WORKLOADS[name].families[0].arms[DIA]()
    assert len(attention_layers(network)) == WORKLOADS[name].sites


def test_saved_bytes_count_each_activation_once_and_no_parameter() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    images = torch.randn(5, 3)
    saved = saved_bytes(lambda: network(images).sum(), network.parameters())
    assert saved == 4 * (5 * 3 + 5 * 4)  # the input, and the output of ReLU, which two layers save


def test_views_do_not_count_as_kernels() -> None:
    numbers = torch.randn(6, requires_grad=True)
    forward: Callable[[], Tensor] = lambda: (numbers.view(2, 3).t() * 2).relu().sum()  # noqa: E731
    assert count_kernels(forward, CPU) == 3
    backward: Callable[[], None] = forward().backward
    assert count_kernels(backward, CPU) == 3  # of ones, of ReLU, of the product; the sum's is a view


def test_a_drift_of_the_machine_does_not_change_a_ratio() -> None:
    speed = iter(np.linspace(1, 2, 100))
    plain, twice = (lambda: None), (lambda: None)
    timing = interleaved(plain, twice, lambda run: next(speed) * (2 if run is twice else 1), rounds=10)
    assert (timing.low, timing.ratio, timing.high) == pytest.approx((2, 2, 2))
    assert timing.rounds == 10


def test_a_step_has_the_gradients_of_its_batch_alone() -> None:
    network = nn.Linear(3, 2)
    images, labels = torch.randn(2, 4, 3), torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0]])
    loss: Callable[[Tensor, Tensor], Tensor] = lambda x, y: F.cross_entropy(network(x), y)  # noqa: E731
    backward = captured.backward(network, loss, images[0], labels[0])
    for batch in zip(images, labels, strict=True):
        value = loss(*batch)
        expected = torch.autograd.grad(value, list(network.parameters()))
        assert torch.equal(backward(*batch), value)
        assert all(torch.equal(p.grad, g) for p, g in zip(network.parameters(), expected, strict=True))  # type: ignore[arg-type]


def test_what_is_not_compiled_in_time_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    (tmp_path / "kernel.best_config").touch()
    precompile.main(["--tiny", "--minutes", "0", "--processes", "2"])
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(
        f"precompile: ResNet14, 32x32, compile, {arm}: not compiled in time" for arm in OWN
    )
    assert not list(tmp_path.iterdir())  # tilings that were chosen on a busy GPU are chosen again


def test_packing_keeps_images_and_the_limit(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    smooth = draw.integers(0, 256, (200, 3, 8, 8), dtype=np.uint8)
    splits = {name: (smooth, np.arange(200) % 10) for name in ("train", "test")}
    kept = pack_cifar.pack(tmp_path / "small.npz", splits, limit=20_000, test_share=0.25)
    assert (tmp_path / "small.npz").stat().st_size <= 20_000
    for name, (pixels, labels) in pack_cifar.unpack(tmp_path / "small.npz").items():
        assert 0 < kept[name] == len(labels) < 200
        assert len(set(np.bincount(labels))) == 1
        assert np.array_equal(pixels, smooth[: len(labels)])  # classes come in turns here


def test_augmented_images_are_crops_of_padded_ones_or_their_mirrors() -> None:
    images = torch.randint(1, 256, (16, 3, 8, 8), dtype=torch.uint8)
    padded = F.pad(images, (4, 4, 4, 4))
    for image, wide in zip(evidence.augmented(images), padded, strict=True):
        crops = [wide[:, top : top + 8, left : left + 8] for top in range(9) for left in range(9)]
        assert any(torch.equal(image, crop) or torch.equal(image, crop.flip(2)) for crop in crops)


def test_arms_of_other_libraries_are_networks_of_the_same_plain_size() -> None:
    plain = sum(parameter.numel() for parameter in cifar_resnet(depth=164)().parameters())
    own, other = (partial(family.arms.__getitem__, PLAIN) for family in WORKLOADS["resnet164"].families)
    assert [sum(parameter.numel() for parameter in build()().parameters()) for build in (own, other)] == [plain, plain]
