"""The command `sites`, and `models --sites`."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dia_lightning.attention import attach, find_sites
from dia_lightning.cli.commands.models import parameters_of
from dia_lightning.models import get_model
from dia_lightning.tasks import DetectionTask, DiffusionTask
from tests.cli.conftest import Run
from tests.tasks.conftest import small_task, small_trainer


@pytest.fixture
def sites(run: Run, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Calls the command and returns what it prints."""

    def call(*args: str) -> str:
        capsys.readouterr()
        run("sites", *args)
        return capsys.readouterr().out

    return call


def added(printed: str) -> tuple[int, list[int]]:
    """Return the parameters that attention adds, and those of each stage."""
    first, _, table = printed.partition("\n")
    total = re.search(r"adds? ([\d,]+) \(", first)
    assert total is not None
    column = re.findall(r"^ +\d+ .* ([\d,]+)  (?:conv|attention|mlp) ", table, re.MULTILINE)
    return int(total[1].replace(",", "")), [int(cell.replace(",", "")) for cell in column]


def test_a_named_network_is_shown_as_python_prints_it(sites: Callable[..., str]) -> None:
    printed = sites("torchvision/resnet50")
    assert printed.startswith("torchvision/resnet50: 25,557,032 parameters; dia-lstm, one per stage, would add ")
    total, stages = added(printed)
    assert total == sum(stages) == parameters_of("torchvision/resnet50", "dia-lstm") - 25_557_032
    table = [re.sub(" +", " ", line) for line in str(find_sites(get_model("torchvision/resnet50"))).splitlines()]
    lines = [re.sub(" +", " ", line) for line in printed.splitlines()[2:]]
    assert [re.sub(r" (parameters|[\d,]+) (branch|conv) ", r" \2 ", line) for line in lines] == table


@pytest.mark.parametrize("share", ["stage", "block"])
@pytest.mark.parametrize("name", ["preresnet164", "timm/vit_tiny_patch16_224"])
def test_the_parameters_of_the_stages_are_all_that_attach_adds(
    sites: Callable[..., str], name: str, share: str
) -> None:
    total, stages = added(sites(name, "--attention", "cbam", "--share", share, "--reduction", "8"))
    plain = get_model(name)
    before = sum(parameter.numel() for parameter in plain.parameters())
    attach(plain, "cbam", share=share, reduction=8)  # type: ignore[arg-type]
    assert total == sum(stages) == sum(parameter.numel() for parameter in plain.parameters()) - before


def test_branches_and_sizes_can_be_chosen(sites: Callable[..., str]) -> None:
    printed = sites("timm/vit_tiny_patch16_224", "--branches", "mlp")
    assert "attn.proj ..." not in printed
    assert "12  blocks.0 ... blocks.11\n      its branch is of the kind 'attention'" in printed
    assert " 16x16 " in sites("torchvision/resnet18", "--image_size", "64")


def test_what_a_checkpoint_has_is_shown(sites: Callable[..., str], run_folder: Path) -> None:
    printed = sites("best")
    assert "the attention that it has adds" in printed
    task = torch.load(run_folder / "checkpoints" / "last.ckpt", weights_only=True)
    units = sum(value.numel() for key, value in task["state_dict"].items() if ".dia." in key)
    total, stages = added(printed)
    assert total == sum(stages) == units
    assert "dia-lstm, one per block, would add" in sites("last", "--share", "block")


def test_a_plug_leaves_blocks_out(sites: Callable[..., str], tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path)
    trainer.strategy.connect(small_task(backbone_args={"depth": 20}, plug="01|11|10"))
    trainer.save_checkpoint(tmp_path / "plugged.ckpt")
    printed = sites(str(tmp_path / "plugged.ckpt"))
    assert "no attention is attached here" in printed
    assert "\n  2  layer1.0, layer3.1\n" in printed


def test_all_tasks_have_sites(sites: Callable[..., str], tmp_path: Path) -> None:
    network = {"block_out_channels": [8, 16], "layers_per_block": 1}
    tasks = {
        "diffusion": DiffusionTask("unet", image_shape=[1, 8, 8], backbone_args=network, attention="se"),
        "detection": DetectionTask("retinanet", "torchvision/resnet18", num_classes=3, attention="se"),
    }
    for name, task in tasks.items():
        trainer = small_trainer(tmp_path)
        trainer.strategy.connect(task)
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
        total, stages = added(sites(str(tmp_path / f"{name}.ckpt")))
        assert total == sum(stages) > 0


def test_a_config_is_built(sites: Callable[..., str]) -> None:
    printed = sites("-c", "tiny.yaml")
    assert printed.startswith("tiny.yaml: ")
    assert "the attention that it has adds" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere.ckpt",), "there is no such file"),
        (("resnet146",), "Did you mean 'resnet164'"),
        (("torchvision/vgg11",), "VGG has no residual branch"),
        (("resnet164", "--attention", "dia"), "Did you mean 'dia-lstm'"),
        ((), "Give either a network"),
        (("resnet164", "-c", "tiny.yaml"), "Give either a network"),
        (("timm/vit_tiny_patch16_224", "--image_size", "100"), "does not run on the example"),
    ],
)
def test_mistakes_are_one_line(fails: Callable[..., str], arguments: tuple[str, ...], message: str) -> None:
    assert message in fails("sites", *arguments)


def test_models_tells_which_take_attention(
    run: Run, fails: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    run("models", "torchvision/*net*_0", "--sites")
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["torchvision/mnasnet1_0"] == "yes  2+2+2+1+3"
    assert lines["torchvision/shufflenet_v2_x1_0"] == "no   it has no shortcut"
    assert "needs a pattern" in fails("models", "--sites")
