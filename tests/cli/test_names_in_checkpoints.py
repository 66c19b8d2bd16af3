"""What names and paths in a checkpoint make this package build, open or fetch: registered parts and nothing else."""

import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from dia_lightning.attention import attach
from dia_lightning.cli._errors import UserError
from dia_lightning.cli.command import rehearse
from dia_lightning.models import get_model
from dia_lightning.tasks import ClassificationTask, load_task

#: Hyper-parameters that name something outside of the file.
NAMES: dict[str, dict[str, Any]] = {
    "class": {"attention": "imported_canary.Unit"},
    "class_of_torch": {"attention": "torch.nn.modules.linear.Identity"},
    "class_of_ours": {"attention": "dia_lightning.attention.squeeze_excitation.SqueezeExcitation"},
    "function": {"attention": "os.system"},
    "network": {"backbone": "imported_canary.Unit", "backbone_args": {}},
    "hub": {"backbone": "timm/hf-hub:someone/network", "backbone_args": {}},
    "folder": {"backbone": "timm/local-dir:FOLDER", "backbone_args": {}},
    "url": {"backbone": "timm/https://example.com/x", "backbone_args": {}},
    "weights": {"backbone": "torchvision/resnet18", "backbone_args": {"weights": "DEFAULT"}},
    "pretrained": {"backbone": "timm/resnet10t", "backbone_args": {"pretrained": True}},
    "file": {"backbone": "timm/resnet10t", "backbone_args": {"checkpoint_path": "FOLDER/canary.pth"}},
    "config": {"backbone": "timm/resnet10t", "backbone_args": {"pretrained_cfg": {"url": "https://example.com/x"}}},
    "init_from": {"init_from": "FOLDER/canary.pth"},
    "optimizer": {"optimizer": "imported_canary.Unit"},
    "schedule": {"schedule": "imported_canary.Unit"},
    "sites": {"sites": "imported_canary.Unit"},
    "branches": {"branches": ["imported_canary.Unit"]},
    "weights_of_classes": {"class_weights": "FOLDER/canary.pth"},
}

#: Those whose network the command line names too, so that it takes the arguments of that.
READ = ("weights", "pretrained", "file", "config")


@pytest.fixture
def canaries(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The content of a good checkpoint; no class may be built, no file of a folder read, and no address looked up."""
    touched: list[str] = []

    class Unit(nn.Module):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__()
            touched.append("built")

        def forward(self, features: Any, state: Any) -> Any:
            return features, state

    module = ModuleType("imported_canary")
    module.Unit = Unit  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "imported_canary", module)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *args, **options: touched.append(f"looked up {host}"))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, *args, **options: touched.append(url))
    torch.save({}, tmp_path / "canary.pth")
    (tmp_path / "config.json").write_text("{}")
    opened: list[str] = [str(tmp_path / "canary.pth"), str(tmp_path / "config.json")]
    sys.addaudithook(lambda event, args: touched.append(args[0]) if event == "open" and args[0] in opened else None)
    yield torch.load(run_folder / "checkpoints" / "last.ckpt", weights_only=True)
    opened.clear()
    assert not touched


def named(content: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
    """Return a checkpoint with other hyper-parameters."""

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(item) for key, item in value.items()}
        return value.replace("FOLDER", str(folder)) if isinstance(value, str) else value

    return {**content, "hyper_parameters": {**content["hyper_parameters"], **filled(NAMES[name])}}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_in_a_checkpoint_builds_opens_and_fetches_nothing(
    name: str, canaries: dict[str, Any], tmp_path: Path
) -> None:
    content = named(canaries, name, tmp_path)
    torch.save(content, "x.ckpt")
    given = content["hyper_parameters"]["backbone"] if name in READ else "cifar_resnet"
    ways: list[Callable[[], Any]] = [
        lambda: load_task("x.ckpt"),
        lambda: ClassificationTask.load_from_checkpoint("x.ckpt"),
        lambda: rehearse(["test", "-c", "bare.yaml", "--model.backbone", given, "--ckpt_path", "x.ckpt"]),
    ]
    for way in ways:
        with suppress(ValueError, UserError):
            way()


@pytest.mark.parametrize(("name", "message"), [("class", "is not registered"), ("hub", "is read from elsewhere")])
def test_a_name_that_is_not_followed_is_refused_with_what_to_do(
    name: str, message: str, canaries: dict[str, Any], tmp_path: Path
) -> None:
    torch.save(named(canaries, name, tmp_path), "x.ckpt")
    with pytest.raises(ValueError, match=message):
        load_task("x.ckpt")
    own = get_model("cifar_resnet", depth=11, num_classes=10)
    assert (
        ClassificationTask.load_from_checkpoint(
            "x.ckpt", backbone=own, backbone_args=None, attention="dia-lstm"
        ).backbone
        is own
    )


def test_attach_builds_no_class_by_its_path() -> None:
    with pytest.raises(ValueError, match=r"not registered.* attention=Identity, or register it first"):
        attach(get_model("cifar_resnet", depth=11), "torch.nn.modules.linear.Identity")
