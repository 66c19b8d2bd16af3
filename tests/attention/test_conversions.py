"""Networks that other code takes apart, converts, transforms or traces."""

import copy
import warnings
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn.utils import fuse_conv_bn_eval
from torchvision.models import resnet18
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock

from dia_lightning.attention import attach

from .networks import (
    TinyNet,
    Weights,
    images,
    outstanding,
    pair,
    randomised,
    threaded,
    unit_weights,
)
from .running import Pair, assert_gradients

# networks that other code takes apart or converts


def own_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for name, parameter in model.named_parameters() if ".dia." in name)


def test_an_intermediate_layer_getter_keeps_and_trains_every_unit(
    resnet18_pair: tuple[nn.Module, nn.Module],
) -> None:
    plain, attached = resnet18_pair
    getter = IntermediateLayerGetter(attached, {"layer2": "a", "layer4": "b"})
    assert own_parameters(getter) == own_parameters(attached) > 0
    outputs = getter(images(2, 64))
    expected = threaded(plain, unit_weights(attached), images(2, 64))
    logits = cast(Any, attached).fc(outputs["b"].mean((2, 3)))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in getter.parameters())


def test_a_feature_pyramid_keeps_and_trains_every_unit() -> None:
    attached = attach(resnet18(), "dia-lstm")
    returned = {f"layer{k}": str(k) for k in (1, 2, 3, 4)}
    pyramid = BackboneWithFPN(attached, returned, [64, 128, 256, 512], 16)
    assert own_parameters(pyramid) == own_parameters(attached) > 0
    sum(level.square().mean() for level in pyramid(images(2, 64, dtype=torch.float32)).values()).backward()
    assert all(parameter.grad is not None for parameter in pyramid.body.parameters())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["dia-lstm", "srm", "cbam"])
def test_conversion_to_synchronised_norms_keeps_the_attention(name: str, training: bool) -> None:
    _, attached = pair(TinyNet().double().train(training), name)
    expected = copy.deepcopy(attached)(images(4))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(attached))  # type: ignore[no-untyped-call]
    assert not any(type(module) is nn.BatchNorm2d for module in converted.modules())
    torch.testing.assert_close(converted(images(4)), expected, rtol=0, atol=1e-12)
    assert converted.state_dict().keys() == attached.state_dict().keys()


def test_timms_norm_conversions_keep_the_attention(tiny: Pair) -> None:
    layers = pytest.importorskip("timm.layers")
    freeze = pytest.importorskip("timm.utils.model").freeze_batch_norm_2d
    expected = tiny[1](images())
    frozen = freeze(copy.deepcopy(tiny[1]))
    torch.testing.assert_close(frozen(images()), expected, rtol=0, atol=1e-10)
    converted = layers.convert_sync_batchnorm(copy.deepcopy(tiny[1]))
    torch.testing.assert_close(converted(images()), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_layer_put_into_a_slot_after_attaching_carries_the_attention_on(tiny: Pair, index: int) -> None:
    plain, attached = tiny
    for network in tiny:
        network.stage1[index].bn2 = randomised(nn.GroupNorm(2, 8).double(), seed=3)
    expected = threaded(plain, unit_weights(attached), images())
    torch.testing.assert_close(attached(images()), expected, rtol=0, atol=1e-12)
    assert isinstance(attached.stage1[index].bn2, nn.GroupNorm)


def test_fusing_a_site_into_its_convolution_keeps_the_attention(tiny: Pair) -> None:
    expected = tiny[1](images())
    block = tiny[1].stage1[1]
    block.conv2, block.bn2 = fuse_conv_bn_eval(block.conv2, block.bn2), nn.Identity()
    torch.testing.assert_close(tiny[1](images()), expected, rtol=0, atol=1e-12)


class Adapter(nn.Module):
    """Holds the layer that it adds to, as LoRA does."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.down = nn.Conv2d(8, 2, 1, bias=False)
        self.up = nn.Conv2d(2, 8, 1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        output: Tensor = self.base_layer(features) + self.up(self.down(features))
        return output


def test_an_adapter_around_a_site_takes_its_place_and_gives_it_back(tiny: Pair) -> None:
    plain, attached = tiny
    adapter = randomised(Adapter(plain.stage1[1].bn2).double().eval(), seed=3)
    original, copied = attached.stage1[1].bn2, copy.deepcopy(adapter)
    plain.stage1[1].bn2, attached.stage1[1].bn2 = adapter, copied
    copied.base_layer = original
    original.load_state_dict(adapter.base_layer.state_dict())
    expected = threaded(plain, unit_weights(attached), images())
    torch.testing.assert_close(attached(images()), expected, rtol=0, atol=1e-12)
    assert {name for name in attached.state_dict() if "base_layer" in name} == {
        f"stage1.1.bn2.base_layer.{name}" for name in original.state_dict()
    }
    assert type(original) is nn.BatchNorm2d  # the adapter has the attention now
    plain.stage1[1].bn2, attached.stage1[1].bn2 = adapter.base_layer, original
    expected = threaded(plain, unit_weights(attached), images())
    torch.testing.assert_close(attached(images()), expected, rtol=0, atol=1e-12)


def test_a_slot_that_is_gone_is_named(tiny: Pair) -> None:
    del tiny[1].stage1[1].bn2
    with pytest.raises(RuntimeError, match=r"belongs to 'bn2' of a BasicBlock, but nothing is there any more.*detach"):
        tiny[1](images())
    assert outstanding() == 0


def test_a_layer_replaced_before_a_full_compilation_is_named(tiny: Pair) -> None:
    tiny[1].stage1[1].bn2 = nn.BatchNorm2d(8).double().eval()
    with pytest.raises(Exception, match=r"'bn2' of a BasicBlock was replaced after attach\(\)\. Run the network once"):
        torch.compile(tiny[1], backend="eager", fullgraph=True)(images())
    expected = copy.deepcopy(tiny[1])(images())
    assert torch.equal(torch.compile(tiny[1], backend="eager")(images()), expected)


def test_fusing_other_norms_is_exact(tiny: Pair) -> None:
    expected = tiny[1](images())
    for block in tiny[1].stage3:
        block.conv1, block.bn1 = fuse_conv_bn_eval(block.conv1, block.bn1), nn.Identity()
    torch.testing.assert_close(tiny[1](images()), expected, rtol=0, atol=1e-12)


# function transforms, inference mode, low precision


def test_functional_call_with_named_parameters_is_exact(tiny: Pair) -> None:
    attached = tiny[1]
    other = randomised(copy.deepcopy(attached), seed=5)
    weights = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    assert torch.equal(functional_call(attached, weights, (images(),)), other(images()))


def test_functional_call_with_a_state_dict_is_exact(tiny: Pair) -> None:
    attached = tiny[1]
    before = attached(images())
    other = randomised(copy.deepcopy(attached), seed=5)
    output = functional_call(attached, dict(other.state_dict()), (images(),))
    assert torch.equal(output, other(images()))
    assert torch.equal(attached(images()), before)


def test_vmap_over_the_weights_of_an_ensemble_is_exact(tiny: Pair) -> None:
    members = [randomised(copy.deepcopy(tiny[1]), seed=seed) for seed in range(3)]
    parameters, buffers = stack_module_state(members)
    batch = images()

    def run(parameters: Weights, buffers: Weights) -> Tensor:
        output: Tensor = functional_call(tiny[1], (parameters, buffers), (batch,))
        return output

    outputs = vmap(run)(parameters, buffers)
    expected = torch.stack([member(batch) for member in members])
    torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-12)
    assert outstanding() == 0


def test_gradients_per_sample_are_exact(tiny: Pair) -> None:
    attached = tiny[1]
    parameters = {name: parameter.detach() for name, parameter in attached.named_parameters()}

    def loss(parameters: Weights, image: Tensor) -> Tensor:
        output: Tensor = functional_call(attached, parameters, (image[None],)).square().sum()
        return output

    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, images(3))
    for sample in range(3):
        attached.zero_grad()
        attached(images(3)[sample : sample + 1]).square().sum().backward()
        for name, parameter in attached.named_parameters():
            torch.testing.assert_close(per_sample[name][sample], parameter.grad, rtol=1e-10, atol=1e-12)


def test_a_directional_derivative_equals_finite_differences(tiny: Pair) -> None:
    direction = images(seed=3)
    slope = jvp(tiny[1], (images(),), (direction,))[1]
    step = 1e-6
    expected = (tiny[1](images() + step * direction) - tiny[1](images() - step * direction)) / (2 * step)
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-6)


def test_second_derivatives_equal_those_of_the_network_threaded_by_hand(tiny: Pair) -> None:
    plain, attached = tiny
    units = unit_weights(attached)
    found = []
    for run in (attached, lambda batch: threaded(plain, units, batch)):
        batch = images().requires_grad_()
        (first,) = torch.autograd.grad(run(batch).square().sum(), batch, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), batch)[0])
    torch.testing.assert_close(*found, rtol=0, atol=1e-9)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_training_after_a_forward_without_autograd_is_exact(tiny: Pair, mode: Callable[[], Any]) -> None:
    with mode():
        tiny[1](images(seed=1))
        tiny[1].stage3[0](tiny[1].stage2(tiny[1].stage1(tiny[1].stem(images(seed=2)))))  # abandoned in mid-stage
    assert_gradients(tiny, tiny[1](images()).square().sum(), images())


def test_frozen_early_blocks_may_run_without_autograd(tiny: Pair) -> None:
    attached = tiny[1]
    with torch.no_grad():
        features = attached.stage1[0](attached.stem(images()))
    output = attached.stage1[2](attached.stage1[1](features))
    output.sum().backward()
    assert attached.stage1[1].conv1.weight.grad is not None


def test_bfloat16_autocast_drifts_little_over_18_blocks() -> None:
    model = nn.Sequential(*(BasicBlock(8, 8) for _ in range(18))).double().eval()
    attached = attach(model, "dia-lstm")
    value = torch.randn(4, 8, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        exact = attached(value)
        attached.float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = attached(value.float())
    assert ((rounded.double() - exact).norm() / exact.norm()).item() <= 1e-2


@pytest.mark.parametrize("name", ["dia-lstm", "dsu", "se", "eca", "cbam", "sge", "srm", "spa", "stac"])
def test_channels_last_features_stay_channels_last_through_the_network(name: str) -> None:
    attached = attach(TinyNet(), name).to(memory_format=torch.channels_last)
    seen = []
    for block in (attached.stage1[0], attached.stage3[3]):
        block.bn2.register_forward_hook(lambda *event: seen.append(event[2]))
        block.register_forward_hook(lambda *event: seen.append(event[2]))
    attached(images(dtype=torch.float32).contiguous(memory_format=torch.channels_last))
    assert len(seen) == 4
    assert all(value.is_contiguous(memory_format=torch.channels_last) for value in seen)


# symbolic tracing


def test_symbolic_tracing_through_attached_blocks_is_refused_with_the_fix(tiny: Pair) -> None:
    with pytest.raises(RuntimeError, match=r"torch.fx cannot trace .*leaf_modules"):
        torch.fx.symbolic_trace(tiny[1])
    with pytest.raises(RuntimeError, match=r"leaf_modules"):
        create_feature_extractor(tiny[1], ["stage3"])


@pytest.mark.parametrize("leaf", [BasicBlock, None], ids=["plain class", "attached class"])
def test_symbolic_tracing_with_blocks_as_leaves_is_exact(tiny: Pair, leaf: type | None) -> None:
    attached = tiny[1]
    leaves = [leaf or type(attached.stage1[0])]
    extractor = create_feature_extractor(attached, ["head"], tracer_kwargs={"leaf_modules": leaves})
    output = extractor(images())["head"]
    assert own_parameters(extractor) == own_parameters(attached) > 0
    assert_gradients(tiny, output.square().sum(), images())


def test_jit_tracing_is_exact(tiny: Pair) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(tiny[1], (images(),))  # type: ignore[no-untyped-call]
    torch.testing.assert_close(traced(images(5, seed=1)), tiny[1](images(5, seed=1)), rtol=0, atol=1e-12)


def test_distributed_checkpointing_reads_and_writes_the_weights(tiny: Pair) -> None:
    attached = tiny[1]
    weights = get_model_state_dict(attached)
    assert weights.keys() == attached.state_dict().keys()
    other = randomised(copy.deepcopy(attached), seed=5)
    set_model_state_dict(other, weights)
    assert torch.equal(other(images()), attached(images()))
