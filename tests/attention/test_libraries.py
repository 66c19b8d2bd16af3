"""Attention in networks of torchvision, timm and diffusers: the right places, exact numbers."""

import copy
import importlib
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from dia_lightning.attention import DIALSTM, Branch, attach, attention_layers, check, detach
from dia_lightning.attention._attached_block import AttachedBlock
from dia_lightning.attention._links import Chain, Slot
from dia_lightning.attention._site_table import BLOCK_RULES
from tests.attention.libraries import NETWORKS, build, images, output

BRANCHES: tuple[Branch, ...] = ("conv", "attention", "mlp")


class Constant(nn.Module):
    """A unit whose map is the same number everywhere."""

    def __init__(self, channels: int, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, features: Tensor, state: None) -> tuple[Tensor, None]:
        return features.new_full((len(features), *[1] * (features.ndim - 1)), self.value), None


def attached_blocks(network: nn.Module) -> list[AttachedBlock]:
    return [module for module in network.modules() if isinstance(module, AttachedBlock)]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_map_of_zero_leaves_the_shortcut_and_nothing_else(name: str) -> None:
    network, inputs = build(name)
    silenced = attach(network, Constant, value=0.0, branch_norm=False, branches=BRANCHES)
    passed: list[bool] = []

    def compare(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        entry = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        shortcut = any(
            getattr(block, part, None) is not None and not isinstance(getattr(block, part), nn.Identity)
            for part in ("downsample", "proj", "conv_shortcut")
        )
        if out.shape == entry.shape and not shortcut:
            passed.append(torch.equal(out, entry))

    for block in attached_blocks(silenced):
        block.register_forward_hook(compare, with_kwargs=True)
    output(silenced, inputs)
    assert passed, "no block has an identity shortcut"
    assert all(passed)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_identity_start_is_the_plain_network_bit_for_bit(name: str) -> None:
    network, inputs = build(name)
    with torch.no_grad():
        plain = output(network, inputs)
        attach(network, "dia-lstm", identity=True, branches=BRANCHES)
        assert torch.equal(output(network, inputs), plain)
        assert torch.equal(output(detach(network), inputs), plain)
        doubled = attach(network, Constant, value=2.0, branch_norm=False, branches=BRANCHES)
        assert not torch.allclose(output(doubled, inputs), plain)  # the sites matter to the output


def chain_of(block: AttachedBlock) -> int:
    assert block.dia_links
    return id(block.dia_links[0].chain)


def slots_of(network: nn.Module) -> dict[str, tuple[Slot, Chain]]:
    """Return the slots of a network and their chains by the path of the site."""
    found = {
        f"{path}.{slot.path}": (slot, link.chain)
        for path, block in network.named_modules()
        if isinstance(block, AttachedBlock)
        for link in block.dia_links
        for slot in link.slots
    }
    return dict(sorted(found.items(), key=lambda item: item[1][0].layer))  # as they run


def hooked(network: nn.Module, units: dict[str, nn.Module], slots: dict[str, tuple[Slot, Chain]]) -> None:
    """An independent way to share units: forward hooks, and a state per unit that the first site of a stage resets."""
    states: dict[int, Any] = {}
    first = {id(unit): path for path, unit in reversed(units.items())}

    def recalibrate(path: str, features: Tensor) -> Tensor:
        unit = units[path]
        if first[id(unit)] == path:
            states[id(unit)] = None
        last = slots[path][0].channel_axis == -1
        planes = features.movedim(-1, 1) if last else features
        flat = planes.flatten(2).unsqueeze(-1)  # DIA-LSTM only looks at means over positions
        attention_map, states[id(unit)] = unit(flat, states[id(unit)])
        shape = [*attention_map.shape[:2], *[1] * (planes.ndim - 2)]
        recalibrated: Tensor = planes * attention_map.reshape(shape)
        return recalibrated.movedim(1, -1) if last else recalibrated

    for path, (slot, _) in slots.items():
        site = network.get_submodule(path)
        if slot.before:
            site.register_forward_pre_hook(lambda _, args, path=path: (recalibrate(path, args[0]), *args[1:]))
        else:
            site.register_forward_hook(
                lambda _, __, out, path=path: (
                    (recalibrate(path, out[0]), *out[1:]) if isinstance(out, tuple) else recalibrate(path, out)
                )
            )


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_gradients_equal_those_of_an_independent_implementation(name: str) -> None:
    plain, inputs = build(name, torch.float64)
    attached = attach(copy.deepcopy(plain), "dia-lstm", branch_norm=False, branches=BRANCHES)
    generator = torch.Generator().manual_seed(2)
    units: dict[str, nn.Module] = {}
    by_chain: dict[int, nn.Module] = {}
    reference = copy.deepcopy(plain)
    for block in attached_blocks(attached):
        if "dia" in block._modules:
            with torch.no_grad():
                for parameter in block.dia.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)
            by_chain[chain_of(block)] = copy.deepcopy(block.dia)
    slots = slots_of(attached)
    units = {path: by_chain[id(chain)] for path, (_, chain) in slots.items()}
    hooked(reference, units, slots)
    ours, theirs = output(attached, inputs), output(reference, inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    torch.autograd.backward([ours.square().mean(), theirs.square().mean()])
    wanted = {f"{chain}.{key}": p.grad for chain, unit in by_chain.items() for key, p in unit.named_parameters()}
    for block in attached_blocks(attached):
        if "dia" in block._modules:
            for key, parameter in block.dia.named_parameters():
                expected = wanted[f"{chain_of(block)}.{key}"]
                torch.testing.assert_close(parameter.grad, expected, rtol=1e-8, atol=1e-10)


def test_every_block_class_of_the_table_exists_and_is_tested() -> None:
    tested = {
        f"{base.__module__}.{base.__qualname__}"
        for name in NETWORKS
        for module in build(name)[0].modules()
        for base in type(module).__mro__
    }
    for name in BLOCK_RULES:
        module, _, class_name = name.rpartition(".")
        assert hasattr(importlib.import_module(module), class_name), f"{name} has moved: mend the site table"
        assert name in tested, f"no network of the tests has a {name}"


# ---- what survives in networks of users: see check()


@pytest.mark.parametrize("name", ["torchvision resnet18", "timm resnet18", "timm vit", "diffusers unet"])
@pytest.mark.parametrize("attention", ["dia-lstm", "se", "cbam"])
def test_every_check_holds(name: str, attention: str) -> None:
    network, (args, kwargs) = build(name)
    report = check(attach(network, attention), kwargs or args)
    assert report.ok, f"\n{report}"


def switch_on_checkpointing(network: Any) -> None:
    """Use the library's own switch."""
    (
        network.set_grad_checkpointing
        if hasattr(network, "set_grad_checkpointing")
        else network.enable_gradient_checkpointing
    )()


@pytest.mark.parametrize(
    "name", ["timm resnet18", "timm vit", "timm swin", "timm convnext", "diffusers unet", "diffusers dit"]
)
def test_the_librarys_own_checkpointing_is_exact_with_two_forwards_before_a_backward(name: str) -> None:
    network, inputs = build(name, torch.float64)
    attach(network, "dia-lstm", branches=BRANCHES)
    network.train()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.Dropout):
            module.eval()
    other = tuple(-arg if arg.is_floating_point() else arg for arg in inputs[0]), inputs[1]

    def gradients() -> list[Tensor]:
        torch.manual_seed(0)  # drop path and dropped labels
        network.zero_grad()
        loss = output(network, inputs).square().mean() + 2 * output(network, other).square().mean()
        torch.autograd.backward(loss)
        return [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]

    expected = gradients()
    switch_on_checkpointing(network)
    found = gradients()
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


# ---- networks inside others


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_detector_trains_and_saves_the_attention_of_its_backbone(when: str) -> None:
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    body = torchvision.models.resnet18(weights=None)
    if when == "before":
        attach(body, "dia-lstm")
    layers = {f"layer{stage}": str(stage) for stage in range(1, 5)}
    backbone = BackboneWithFPN(body, layers, in_channels_list=[64, 128, 256, 512], out_channels=32)
    detector = FasterRCNN(backbone, num_classes=3, min_size=64, max_size=64, rpn_pre_nms_top_n_train=50)
    if when == "after":
        attach(detector, "dia-lstm")
    units = [name for name, _ in detector.named_parameters() if ".dia." in name]
    expected = sum(parameter.numel() for width in (64, 128, 256, 512) for parameter in DIALSTM(width).parameters())
    assert sum(dict(detector.named_parameters())[name].numel() for name in units) == expected
    assert {name for name in detector.state_dict() if ".dia." in name} == set(units)
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    losses = detector([torch.rand(3, 64, 64)], [target])
    torch.autograd.backward(sum(losses.values()))
    assert all(dict(detector.named_parameters())[name].grad is not None for name in units)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_features_only_network_keeps_its_attention(when: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model("resnet18", features_only=when == "after")
    if when == "before":
        from timm.models._features import FeatureListNet

        network = FeatureListNet(attach(network, "dia-lstm"), out_indices=(1, 2, 3, 4))
    else:
        attach(network, "dia-lstm")
    features = network(images(64)[0][0])
    torch.autograd.backward([feature.square().mean() for feature in features])
    units = [parameter for name, parameter in network.named_parameters() if ".dia." in name]
    assert len(units) == 4 * 8
    assert all(parameter.grad is not None for parameter in units)


def test_attention_modules_of_the_network_itself_stay() -> None:
    network, _ = build("timm seresnet50")
    own = {name for name, module in network.named_modules() if type(module).__name__ == "SEModule"}
    attach(network, "dia-lstm")
    kept = {name for name, module in network.named_modules() if type(module).__name__ == "SEModule"}
    assert kept == own


def test_branches_of_a_transformer_can_be_chosen() -> None:
    for branches, sites in ((["attention"], ["attn.proj"]), (["mlp"], ["mlp.fc2"]), (None, ["attn.proj", "mlp.fc2"])):
        network = attach(build("timm vit")[0], "se", branches=branches)  # type: ignore[arg-type]
        found = [layer.path for layer in attention_layers(network)]
        assert found == [f"blocks.{block}.{site}" for block in range(3) for site in sites]


def test_attention_blocks_of_a_unet_are_left_out_unless_asked_for() -> None:
    kinds = {type(block).__name__ for block in attached_blocks(attach(build("diffusers unet")[0], "se"))}
    assert kinds == {"ResnetBlock2D"}
    asked = attach(build("diffusers unet")[0], "se", branches=["conv", "attention"])
    assert {type(block).__name__ for block in attached_blocks(asked)} == {"ResnetBlock2D", "Attention"}


def test_blocks_of_a_unet_share_across_its_parts_at_one_resolution() -> None:
    network = attach(build("diffusers unet")[0], "dia-lstm")
    owners = sorted(name for name, module in network.named_modules() if isinstance(module, DIALSTM))
    assert owners == [
        "down_blocks.0.resnets.0.dia",
        "down_blocks.1.resnets.0.dia",  # and the middle, and the first blocks on the way up
        "up_blocks.1.resnets.0.dia",
    ]
