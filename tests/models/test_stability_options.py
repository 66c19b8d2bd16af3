"""Networks without shortcuts and without norms: what the options remove, and that attention can still be attached."""

from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dia_lightning.attention import attach, check, detach
from dia_lightning.models import CifarNetwork, cifar_resnet

BLOCKS: tuple[Literal["basic", "bottleneck"], ...] = ("basic", "bottleneck")
DEPTH = {"basic": 14, "bottleneck": 20}  # two blocks per stage


def build(block: Literal["basic", "bottleneck"] = "basic", **options: Any) -> CifarNetwork:
    torch.manual_seed(0)
    return cifar_resnet(depth=DEPTH[block], block=block, num_classes=5, **options)


def images(seed: int = 1) -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def stages(network: CifarNetwork) -> list[list[nn.Module]]:
    return [list(network.get_submodule(f"layer{stage}").children()) for stage in (1, 2, 3)]


@pytest.mark.parametrize("block", BLOCKS)
def test_the_remaining_layers_keep_their_initial_weights(block: Literal["basic", "bottleneck"]) -> None:
    whole = build(block).state_dict()
    for options in ({"no_shortcut": [1, 2, 3]}, {"norm": False}):
        rest = build(block, **options).state_dict()
        assert len(rest) < len(whole)
        assert all(torch.equal(weight, whole[name]) for name, weight in rest.items())


@pytest.mark.parametrize("block", BLOCKS)
def test_without_a_shortcut_a_block_is_its_branch(block: Literal["basic", "bottleneck"]) -> None:
    network, whole = build(block, no_shortcut=[2]), build(block)
    features = whole.layer1(whole.relu(whole.bn1(whole.conv1(images()))))
    assert torch.equal(network.layer1(network.relu(network.bn1(network.conv1(images())))), features)
    first = stages(network)[1][0]
    assert not any("downsample" in name for name, _ in first.named_parameters())

    without, with_it = first(features), stages(whole)[1][0]
    nn.init.zeros_(with_it.get_parameter("downsample.1.weight"))  # a shortcut of zeros
    torch.testing.assert_close(without, with_it(features), rtol=0, atol=0)
    again = stages(network)[1][1]
    last = "bn2" if block == "basic" else "bn3"
    nn.init.zeros_(again.get_parameter(f"{last}.weight"))  # a branch of zeros: with a shortcut features would remain
    assert again(without).abs().max() == 0
    assert any(name.startswith("layer3.0.downsample") for name in network.state_dict())


def test_without_norms_the_network_is_convolutions_and_relu() -> None:
    network = build(norm=False)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
    weight = dict(network.named_parameters())
    features = F.relu(F.conv2d(images(), weight["conv1.weight"], padding=1))
    for stage in (1, 2, 3):
        for number in (0, 1):
            place, stride = f"layer{stage}.{number}", 2 if stage > 1 and number == 0 else 1
            branch = F.relu(F.conv2d(features, weight[f"{place}.conv1.weight"], stride=stride, padding=1))
            branch = F.conv2d(branch, weight[f"{place}.conv2.weight"], padding=1)
            if f"{place}.downsample.0.weight" in weight:
                features = F.conv2d(features, weight[f"{place}.downsample.0.weight"], stride=stride)
            features = F.relu(branch + features)
    expected = features.mean((2, 3)) @ weight["fc.weight"].T + weight["fc.bias"]
    torch.testing.assert_close(network(images()), expected)


def test_without_norms_features_scale_with_the_images() -> None:
    network = build("bottleneck", norm=False).double()
    nn.init.zeros_(network.get_parameter("fc.bias"))
    torch.testing.assert_close(network(1000 * images().double()), 1000 * network(images().double()))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("options", [{"no_shortcut": [1, 3]}, {"norm": False}], ids=str)
def test_attention_goes_in_and_comes_out(block: Literal["basic", "bottleneck"], options: dict[str, Any]) -> None:
    network = build(block, **options)
    before = network(images())
    keys = list(network.state_dict())
    attach(network, "dia-lstm", reduction=2)
    assert [name for name, _ in network.named_modules() if name.endswith(".dia")] == [
        f"layer{stage}.0.dia" for stage in (1, 2, 3)
    ]
    report = check(network, images())
    assert report.ok, str(report)
    detach(network)
    assert list(network.state_dict()) == keys
    torch.testing.assert_close(network.train()(images()), before)


def test_an_identity_start_leaves_outputs_as_they_are() -> None:
    network = build(norm=False, no_shortcut=[3]).eval()
    before = network(images())
    torch.testing.assert_close(attach(network, "dia-lstm", identity=True)(images()), before)


@pytest.mark.parametrize("stages", [[0], [4], [1, "2"]])
def test_missing_stages_are_refused(stages: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"no_shortcut takes stage numbers 1, 2 and 3, got"):
        build(no_shortcut=stages)
