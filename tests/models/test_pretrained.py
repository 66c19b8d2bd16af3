"""Networks with attention, saved to folders and loaded again."""

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import torchvision
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DConditionModel, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dia_lightning.attention import SqueezeExcitation, attach, attention_layers, detach
from dia_lightning.models import from_pretrained, get_model, push_to_hub, save_pretrained
from dia_lightning.models.pipelines import DIAPipeline, DIAUNet2DModel

pytestmark = pytest.mark.filterwarnings("ignore:.*units serve a single block")
UNET: dict[str, Any] = {
    "sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1,
    "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2,
}  # fmt: skip


class Sequences(nn.Module):
    """A custom network, which needs an example for attention."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.ReLU(), nn.Conv1d(4, 4, 3, padding=1)) for _ in range(4))

    def forward(self, sequence: Tensor, scale: float = 1.0) -> Tensor:
        for block in self.blocks:
            sequence = sequence + scale * block(sequence)
        return sequence


def resnet() -> nn.Module:
    return get_model("cifar_resnet", depth=20, num_classes=3)


def moved(network: nn.Module) -> Any:
    """Give every weight and statistic a value other than its initial one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator))
    return network.eval()


def output(network: Any, *inputs: Any) -> Tensor:
    with torch.no_grad():
        found = network.eval()(*inputs)
    return getattr(found, "sample", found)  # type: ignore[no-any-return]


def layers(network: nn.Module) -> list[tuple[str, int]]:
    return [(layer.path, layer.stage) for layer in attention_layers(network)]


IMAGES, SEQUENCES = torch.randn(2, 3, 32, 32), torch.randn(2, 4, 9)
MOBILE: Any = lambda: torchvision.models.mobilenet_v3_small(num_classes=3)  # noqa: E731
ATTACHED: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, Any]]] = {
    "a stage": (resnet, IMAGES, {"attention": "dia-lstm", "reduction": 8, "identity": True}),
    "blocks": (resnet, IMAGES, {"attention": "se", "share": "block", "plug": [1, 0, 1, 1, 0, 1]}),
    "norms": (lambda: get_model("cifar_preresnet", depth=11), IMAGES, {"attention": "srm"}),
    "groups": (resnet, IMAGES, {"attention": "eca", "sites": [["layer1.*.bn3"], ["layer2.*.bn3"]]}),
    "replaced": (MOBILE, IMAGES, {"attention": "dia-lstm", "existing": "replace"}),
    "shared": (MOBILE, IMAGES, {"attention": None, "existing": "share", "existing_start": "first"}),
    "example": (Sequences, SEQUENCES, {"attention": "dia-lstm", "example": SEQUENCES}),
    "arguments": (Sequences, SEQUENCES, {"attention": "se", "example": {"sequence": SEQUENCES, "scale": 2.0}}),
}


@pytest.mark.parametrize("case", ATTACHED)
def test_a_network_is_attached_and_loaded_as_it_was(case: str, tmp_path: Path) -> None:
    build, inputs, arguments = ATTACHED[case]
    network = moved(attach(build(), **arguments))
    assert save_pretrained(network, tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    loaded = from_pretrained(build(), tmp_path / "new" / "folder")
    assert torch.equal(output(loaded, inputs), output(network, inputs))
    assert layers(loaded) == layers(network)
    assert not loaded.training


def test_every_part_with_attention_is_found_again(tmp_path: Path) -> None:
    def two() -> nn.Sequential:
        return nn.Sequential(Sequences(), Sequences())

    network = two()
    attach(network[0], "se", example=SEQUENCES)
    attach(network[1], "dia-lstm", example=(SEQUENCES, 0.5), share="block")
    save_pretrained(moved(network), tmp_path)
    assert torch.equal(output(from_pretrained(two(), tmp_path), SEQUENCES), output(network, SEQUENCES))
    save_pretrained(network[1], tmp_path / "part")
    assert torch.equal(
        output(from_pretrained(Sequences(), tmp_path / "part"), SEQUENCES), output(network[1], SEQUENCES)
    )


def test_a_plain_network_and_weights_that_layers_share_are_saved_too(tmp_path: Path) -> None:
    def tied() -> nn.Sequential:
        layer = nn.Linear(3, 3)
        return nn.Sequential(layer, nn.Sequential(layer), nn.Linear(3, 3))

    network = moved(tied())
    save_pretrained(network, tmp_path)
    loaded = from_pretrained(tied(), tmp_path)
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in network.state_dict().items())
    assert len(load_file(tmp_path / "model.safetensors")) == 4


def test_objects_are_given_again(tmp_path: Path) -> None:
    def early(path: str, module: nn.Module) -> bool:
        return path.startswith("layer1.") and path.endswith("bn3")

    network = moved(attach(resnet(), SqueezeExcitation, sites=early, reduction=4))
    save_pretrained(network, tmp_path)
    with pytest.raises(ValueError, match=r"attention was an object .*'object:SqueezeExcitation'.*attention=\.\.\.\)"):
        from_pretrained(resnet(), tmp_path)
    with pytest.raises(ValueError, match=r"sites was an object .*early.*sites=\.\.\."):
        from_pretrained(resnet(), tmp_path, attention=SqueezeExcitation)
    loaded = from_pretrained(resnet(), tmp_path, attention=SqueezeExcitation, sites=early)
    assert torch.equal(output(loaded, IMAGES), output(network, IMAGES))


def test_what_is_no_longer_attached_is_not_saved(tmp_path: Path) -> None:
    network = detach(attach(resnet(), "se"))
    save_pretrained(network, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dia"] == {}
    assert torch.equal(output(from_pretrained(resnet(), tmp_path), IMAGES), output(network, IMAGES))


def test_a_custom_card_is_kept(tmp_path: Path) -> None:
    network = attach(resnet(), "se")
    save_pretrained(network, tmp_path)
    card = (tmp_path / "README.md").read_text()
    save_pretrained(detach(network), tmp_path)
    assert card.startswith("---\n")
    assert "'se'" in card
    assert "'se'" not in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("Mine.")
    save_pretrained(network, tmp_path)
    assert (tmp_path / "README.md").read_text() == "Mine."
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]


# ---- files written by others


def saved(folder: Path, **entries: Any) -> Path:
    """Save a network, with other entries in its config."""
    save_pretrained(attach(resnet(), "se"), folder)
    config = {**json.loads((folder / "config.json").read_text()), **entries}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def words(**arguments: Any) -> dict[str, Any]:
    return {"dia": {"": {"attention": "se", **arguments}}}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"dia": None}, r"does not say which attention .*from_pretrained\(network, folder, attention=\.\.\.\)"),
        ({"dia": ["se"]}, "dia must be an object, got"),
        ({"dia": {"": 3}}, "must say which attention is attached, got 3"),
        ({"dia": {"no.such": {"attention": "se"}}}, "attach.. does not take .* no"),
        ({"dia": {"": {"attention": "os.system"}}}, "Attention 'os.system' is not registered"),
        (words(model=1), "must say which attention"),
        (words(branches=3), "attach.. does not take what the config says"),
        (words(reductions=2), "'se': .*reductions"),
        (words(plug=[1]), "plug has 1 entries, but the network has 6 blocks"),
        (words(example={"tensor": [10**9] * 3, "dtype": "float32"}), "an invalid example"),
        (words(example={"tensor": [1], "dtype": "save"}), "an invalid example"),
        (words(share="block"), "holds a different network: .* weights are missing"),
    ],
)
def test_an_invalid_config_is_refused_and_the_network_stays_plain(
    entries: dict[str, Any], message: str, tmp_path: Path
) -> None:
    network = resnet()
    with pytest.raises(ValueError, match=message) as raised:
        from_pretrained(network, saved(tmp_path, **entries))
    assert "\n" not in str(raised.value)
    assert list(network.state_dict()) == list(resnet().state_dict())


def test_files_that_are_damaged_or_of_another_network_are_refused(tmp_path: Path) -> None:
    def message(network: Any = None, source: Any = tmp_path, **arguments: Any) -> str:
        with pytest.raises(ValueError, match=r".") as raised:
            from_pretrained(resnet() if network is None else network, source, **arguments)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    assert "has no config.json" in message()
    saved(tmp_path)
    assert "fc.weight" in message(get_model("cifar_resnet", depth=20, num_classes=4))
    assert "weights are missing" in message(get_model("cifar_resnet", depth=29, num_classes=3))
    assert "already has attention" in message(attach(resnet(), "se"))
    assert "neither a network nor a class of diffusers" in message(nn.Linear)
    assert "not describe a UNet2DModel" in message(UNet2DModel, saved(tmp_path, block_out_channels=3))
    for source in (tmp_path / "missing", str(tmp_path / "missing"), tmp_path / "config.json", "./here", "a/b/c"):
        assert "neither a folder nor the name of a repository" in message(source=source)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-9])
    assert "missing or damaged" in message()
    (tmp_path / "model.safetensors").unlink()
    torch.save(resnet().state_dict(), tmp_path / "pytorch_model.bin")
    assert "Other formats, which may hold code, are not read" in message()
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"fc.weight": "../w.safetensors"}}')
    assert "names '../w.safetensors', which is no" in message()
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    assert "has no weight_map" in message()
    (tmp_path / "config.json").write_text("{")
    assert "is not JSON" in message()
    (tmp_path / "config.json").write_text("[]")
    assert "must hold a JSON object, got a list" in message()


def test_weights_may_lie_in_several_files(tmp_path: Path) -> None:
    network = moved(attach(resnet(), "se"))
    save_pretrained(network, tmp_path)
    weights = list(load_file(tmp_path / "model.safetensors").items())
    (tmp_path / "model.safetensors").unlink()
    parts = {"one.safetensors": dict(weights[:9]), "two.safetensors": dict(weights[9:])}
    for name, part in parts.items():
        save_file(part, tmp_path / name)
    index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(output(from_pretrained(resnet(), tmp_path), IMAGES), output(network, IMAGES))


# ---- the Hub


def test_a_repository_is_made_filled_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    class Api:
        def __init__(self, **options: Any) -> None:
            calls.append(options)

        def create_repo(self, repo_id: str, **options: Any) -> Any:
            calls.append({"repo_id": repo_id, **options})

        def upload_folder(self, *, folder_path: str, **options: Any) -> str:
            Path(folder_path).rename(tmp_path / "hub")
            Path(folder_path).mkdir()
            calls.append(options)
            return "https://huggingface.co/me/net/commit/1"

    def download(repo_id: str, **options: Any) -> str:
        calls.append({"repo_id": repo_id, **options})
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    network = moved(attach(resnet(), "dia-lstm"))
    url = push_to_hub(network, "me/net", private=True, token="secret", commit_message="First")
    assert url == "https://huggingface.co/me/net/commit/1"
    assert calls == [
        {"token": "secret"},
        {"repo_id": "me/net", "private": True, "exist_ok": True},
        {"repo_id": "me/net", "commit_message": "First"},
    ]
    options: dict[str, Any] = {"revision": "v1", "token": "t", "cache_dir": tmp_path, "local_files_only": True}
    loaded = from_pretrained(resnet(), "me/net", **options)
    assert torch.equal(output(loaded, IMAGES), output(network, IMAGES))
    patterns = calls[-1].pop("allow_patterns")
    assert calls[-1] == {"repo_id": "me/net", **options}
    assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in patterns)


def test_errors_of_the_hub_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise OSError("404\n\nRepository Not Found")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match=r"'me/net' is not a folder, and .* \(OSError: 404 Repository Not Found\)"):
        from_pretrained(resnet(), "me/net")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fail)
    with pytest.raises(ValueError, match=r"refuses 'me/net' \(OSError: 404 .*hf auth login"):
        push_to_hub(resnet(), "me/net")


def test_without_huggingface_hub_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = attach(resnet(), "se")
    save_pretrained(network, tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    from_pretrained(resnet(), tmp_path)  # a folder needs none
    for share in (lambda: from_pretrained(resnet(), "me/net"), lambda: push_to_hub(network, "me/net")):
        with pytest.raises(ImportError, match=r'huggingface_hub: pip install "dia-lightning\[hub\]"'):
            share()
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r'safetensors: pip install "dia-lightning\[hub\]"'):
        from_pretrained(resnet(), tmp_path)


# ---- diffusers' own save_pretrained


def unet(**attention: Any) -> UNet2DModel:
    return moved(attach(UNet2DModel(**UNET), **{"attention": "dia-lstm", "reduction": 2, **attention}))


NOISY = torch.randn(2, 3, 8, 8), 3


def test_a_unet_that_diffusers_saved_loads_with_its_attention(tmp_path: Path) -> None:
    network = unet()
    config = dict(network.config)
    network.save_pretrained(tmp_path)
    assert dict(network.config) == config
    expected = output(network, *NOISY)
    for loaded in (
        from_pretrained(UNet2DModel, tmp_path),
        from_pretrained(UNet2DModel(**UNET), tmp_path),
        DIAUNet2DModel.from_pretrained(tmp_path),
    ):
        assert torch.equal(output(loaded, *NOISY), expected)
        loaded.save_pretrained(tmp_path / "again")
        assert torch.equal(output(from_pretrained(UNet2DModel, tmp_path / "again"), *NOISY), expected)


def test_the_class_of_diffusers_says_how_to_load_the_attention(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet().save_pretrained(tmp_path)
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    plain = UNet2DModel.from_pretrained(tmp_path)
    assert "from_pretrained(UNet2DModel, folder) loads the attention too" in caplog.text
    with pytest.raises(ValueError, match=r"loaded without the attention .*dia_lightning\.models\.from_pretrained"):
        DIAPipeline(plain, DDIMScheduler())
    caplog.clear()
    from_pretrained(UNet2DModel, tmp_path)
    DIAUNet2DModel.from_pretrained(tmp_path)
    assert caplog.text == ""
    detach(unet()).save_pretrained(tmp_path / "plain")
    assert "dia" not in (tmp_path / "plain" / "config.json").read_text()


def test_other_networks_of_diffusers_load_too(tmp_path: Path) -> None:
    build = {**UNET, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 8,
             "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 4}  # fmt: skip
    network = moved(attach(UNet2DConditionModel(**build), "dia-lstm"))
    network.save_pretrained(tmp_path)
    inputs = torch.randn(2, 4, 8, 8), 3, torch.randn(2, 5, 8)
    assert torch.equal(output(from_pretrained(UNet2DConditionModel, tmp_path), *inputs), output(network, *inputs))


def test_a_custom_unit_is_passed_to_the_unet_again(tmp_path: Path) -> None:
    network = unet(attention=SqueezeExcitation)
    network.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"attention was an object.*DIAUNet2DModel\.from_pretrained"):
        DIAUNet2DModel.from_pretrained(tmp_path)
    given = {"attention": SqueezeExcitation, "reduction": 2}
    for loaded in (
        DIAUNet2DModel.from_pretrained(tmp_path, dia=given),
        from_pretrained(UNet2DModel, tmp_path, attention=SqueezeExcitation),
    ):
        assert torch.equal(output(loaded, *NOISY), output(network, *NOISY))


@pytest.mark.parametrize("kind", [DDPMPipeline, DIAPipeline])
def test_a_pipeline_around_an_attached_unet_loads_with_its_attention(kind: Any, tmp_path: Path) -> None:
    network = unet()
    kind(network, DDPMScheduler()).save_pretrained(tmp_path)
    pipelines = [DIAPipeline, DDPMPipeline] if kind is DIAPipeline else [DIAPipeline]
    for loader in pipelines:
        loaded = loader.from_pretrained(tmp_path)
        assert torch.equal(output(loaded.unet, *NOISY), output(network, *NOISY))
    loaded = DIAPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert loaded.unet.dtype == torch.bfloat16


def test_attention_around_a_unet_is_reported_as_lost(tmp_path: Path) -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = UNet2DModel(**UNET)

        def forward(self, images: Tensor) -> Any:
            return self.unet(images, 3)

    module = attach(Module(), "se", example=NOISY[0])
    with pytest.warns(UserWarning, match=r"around this UNet2DModel.*attach\(module\.network"):
        module.unet.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"around this UNet2DModel.*Save that module"):
        save_pretrained(module.unet, tmp_path)
