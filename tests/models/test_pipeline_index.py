"""The folder of a pipeline may name classes of this package and of diffusers; no other class is imported."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file

from dia_lightning.models import from_pretrained
from dia_lightning.models._pipeline_index import check_index
from dia_lightning.models.pipelines import DIAPipeline, DIAUNet2DModel

SMALL: dict[str, Any] = {
    **{"sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1},
    **{"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pipeline, next to a module that must not be imported."""
    (tmp_path / "planted.py").write_text("class Unit: ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    network = DIAUNet2DModel(**SMALL, dia={"attention": "dia-lstm"})
    DIAPipeline(network, DDIMScheduler()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.mark.parametrize(
    "entries",
    [
        {"unet": ["planted", "Unit"]},
        {"scheduler": ["planted", "Unit"]},
        {"scheduler": ["planted", "UnitScheduler"]},
        {"unet": ["diffusers", "AutoencoderKL"]},
        {"unet": ["torch.nn", "Linear"]},
        {"extra": ["planted", "Unit"]},
        {"id2label": ["planted", "Unit"]},
        {"_class_name": ["planted", "Unit"]},
        {"unet": "planted.Unit"},
    ],
)
def test_other_classes_are_refused_before_they_are_imported(entries: dict[str, Any], folder: Path) -> None:
    change(folder / "model_index.json", **entries)
    with pytest.raises(ValueError, match=r"model_index\.json' names .* no class is imported because a file says so"):
        DIAPipeline.from_pretrained(folder)
    assert "planted" not in sys.modules


@pytest.mark.parametrize("entry", ["quantization_config", "auto_map"])
def test_a_config_that_asks_for_another_library_is_refused(entry: str, folder: Path) -> None:
    change(folder / "unet" / "config.json", **{entry: {"quant_method": "planted"}})
    for load, place in ((DIAPipeline.from_pretrained, folder), (DIAUNet2DModel.from_pretrained, folder / "unet")):
        with pytest.raises(ValueError, match=rf"config\.json' names .* as {entry}"):
            load(place)


def test_a_class_in_the_words_of_the_attention_is_not_built(folder: Path) -> None:
    change(folder / "unet" / "config.json", dia={"attention": "torch.nn.modules.linear.Identity"})
    ways: list[Callable[[], Any]] = [
        lambda: DIAPipeline.from_pretrained(folder),
        lambda: DIAUNet2DModel.from_pretrained(folder / "unet"),
        lambda: from_pretrained(DIAUNet2DModel.__mro__[2], folder / "unet"),
    ]
    for way in ways:
        with pytest.raises(ValueError, match="is not registered, and paths are not imported"):
            way()


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("exploded",)


def test_weights_that_may_hold_code_are_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save({**load_file(weights), "x": Bomb()}, weights.with_suffix(".bin"))
    weights.unlink()
    for load, place in ((DIAPipeline.from_pretrained, folder), (DIAUNet2DModel.from_pretrained, folder / "unet")):
        with pytest.raises(OSError, match="safetensors"):
            load(place)
    assert not Path("exploded").exists()


def test_what_the_caller_gives_is_not_checked(folder: Path) -> None:
    change(folder / "model_index.json", scheduler=["planted", "Unit"])
    check_index(folder, ["scheduler"])
    with pytest.raises(ValueError, match="as scheduler"):
        check_index(folder, [])
