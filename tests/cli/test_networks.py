"""The command `models`."""

import math
import re
from collections.abc import Callable

import pytest
from torch import nn

from dia_lightning.attention import _registry, attention_builder, list_attention
from dia_lightning.cli.commands.models import FORMULAS, parameters_of
from dia_lightning.models import get_model
from tests.cli.conftest import Run


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "plain", "with_dia"),
    [
        ("resnet164", 1_727_284, 1_946_132),
        ("preresnet164", 1_726_388, 1_961_364),
        ("wrn52_4", 12_072_500, 12_298_516),
        ("resnext101_8x32", 32_138_244, 33_006_020),
    ],
)
def test_the_papers_networks_have_the_papers_sizes(name: str, plain: int, with_dia: int) -> None:
    assert (parameters_of(name), parameters_of(name, "dia-lstm")) == (plain, with_dia)


def test_all_networks_and_units_are_listed(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("models")
    printed = capsys.readouterr().out
    assert re.search(r"^resnet164 +1,727,284 +1,946,132$", printed, re.MULTILINE)
    assert re.search(r"^se +580 +8,464  2\*C\*H", printed, re.MULTILINE)
    assert all(f"\n{name} " in printed for name in list_attention())
    assert "networks of torchvision: dia-lightning models 'torchvision/*'" in printed


def test_a_pattern_lists_names_without_building_networks(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*_: object) -> None:
        raise AssertionError("a network was built")

    monkeypatch.setattr("dia_lightning.cli.commands.models.get_model", build)
    run("models", "torchvision/resnet*")
    names = capsys.readouterr().out.split()
    assert "torchvision/resnet50" in names
    assert all(name.startswith("torchvision/resnet") for name in names)


def test_cost_compares_the_arms(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("models", "--cost", "torchvision/resnet18", "--image_size", "64", "--reduction", "16", "--repeats", "1")
    lines = capsys.readouterr().out.splitlines()
    rows = {line[21:35].strip(): line[35:].split() for line in lines[1:5]}
    assert list(rows) == ["none", "se per block", "se shared", "dia-lstm"]
    plain, dia = rows["none"], rows["dia-lstm"]
    assert plain[0] == f"{count(get_model('torchvision/resnet18')):,}"
    assert float(plain[1]) == pytest.approx(0.297, abs=0.001)  # 1.82 GMACs at 224 pixels: 2 * 1.82 * (64 / 224) ** 2
    assert plain[2] == "1.00"
    cells = [2 * (width * (width // 16) * 5 + width // 16 + 4 * width) for width in (64, 128, 256, 512)]
    assert int(dia[0].replace(",", "")) - int(plain[0].replace(",", "")) == sum(cells)


def test_a_network_without_residual_blocks_has_no_arms(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("models", "--cost", "torchvision/vgg11")
    assert "VGG has no residual branch" in capsys.readouterr().err


@pytest.mark.parametrize("width", [48, 128, 256])
@pytest.mark.parametrize("name", sorted(set(FORMULAS) - {"eca"}))
def test_a_units_formula_gives_its_size(name: str, width: int) -> None:
    formula, _, bottleneck = FORMULAS[name].partition(", H = ")
    names: dict[str, int | Callable[..., int]] = {"C": width, "min": min}
    if bottleneck:
        names["H"] = width // int(bottleneck.removeprefix("C/"))
    assert eval(formula, names) == count(attention_builder(name, {})(width))


def test_every_unit_has_a_formula() -> None:
    classes = {name for name, builder in _registry._BUILDERS.items() if isinstance(builder, type)}
    built_in = {name for name in classes if _registry._BUILDERS[name].__module__.startswith("dia_lightning.")}
    assert set(FORMULAS) == built_in


@pytest.mark.parametrize("width", [1, 16, 48, 64, 128, 256, 2048])
def test_the_formula_of_eca_gives_its_size(width: int) -> None:
    formula, _, rule = FORMULAS["eca"].removeprefix("k, k = ").partition(", ")
    assert rule == "plus 1 if even"
    kernel_size = eval(formula, {"C": width, "log2": math.log2})
    assert kernel_size + (kernel_size % 2 == 0) == count(attention_builder("eca", {})(width))
