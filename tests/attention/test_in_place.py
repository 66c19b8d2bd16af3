"""A network with attention is the plain network plus ``dia``: names, types, attributes, weights."""

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrize import remove_parametrizations
from torchvision.models.resnet import BasicBlock

from dia_lightning.attention import DIALSTM, AttentionUnit, attach, detach
from dia_lightning.models import get_model
from dia_lightning.models.cifar_preresnet import BasicBlock as PreactivationBlock

from .libraries import build, conditional_unet
from .networks import TinyNet, images, randomised, threaded, unit_weights
from .running import Pair


def own(name: str) -> bool:
    return any(part == "dia" or part.startswith(("branch_norm", "unit_norm")) for part in name.split("."))


@pytest.mark.parametrize("name", ["torchvision resnet18", "timm swin", "timm vit", "diffusers unet"])
@pytest.mark.parametrize("attention", ["dia-lstm", "srm"])
def test_names_types_and_order_are_those_of_the_plain_network(name: str, attention: str) -> None:
    plain, _ = build(name)
    attached = attach(copy.deepcopy(plain), attention)
    listings: tuple[Callable[[nn.Module], list[str]], ...] = (
        lambda net: [key for key, _ in net.named_parameters()],
        lambda net: [key for key, _ in net.named_buffers()],
        lambda net: [key for key, _ in net.named_modules()],
        lambda net: list(net.state_dict()),
    )
    for listing in listings:
        assert [key for key in listing(attached) if not own(key)] == listing(plain)
    for path, module in plain.named_modules():
        mine = attached.get_submodule(path)
        assert isinstance(mine, type(module))
        assert repr(type(mine)) == repr(type(module))
        assert vars(mine).keys() - {"dia_links", "dia_chains"} == vars(module).keys()


def test_tables_by_type_find_the_layers_that_carry_attention() -> None:
    attached: Any = attach(torchvision.models.resnet18(), "se")
    table = {nn.BatchNorm2d: "norm", torchvision.models.ResNet: "network"}
    assert table[type(attached.layer1[0].bn2)] == table[type(attached.bn1)] == "norm"
    assert table[type(attached)] == "network"
    assert type(attached.layer1[0].bn2) in (nn.BatchNorm2d,)
    assert type(attached.layer1[0].bn2) is not nn.BatchNorm2d
    assert type(attached.layer1[0].bn2) not in (nn.BatchNorm1d, None)


def test_an_attribute_that_is_written_reaches_the_layer_that_runs() -> None:
    def run(network: Any, rate: float) -> Tensor:
        for layer in network.layers:
            for block in layer.blocks:
                for path in (block.drop_path1, block.drop_path2):
                    if hasattr(path, "drop_prob"):
                        path.drop_prob = rate
        torch.manual_seed(1)
        output: Tensor = network.train()(torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
        return output

    torch.manual_seed(0)
    plain = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        window_size=4,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 4),
        num_classes=10,
        drop_path_rate=0.1,
    )
    attached = attach(copy.deepcopy(plain), "dia-lstm", identity=True)
    outputs = [run(attached, rate) for rate in (0.1, 0.9)]
    assert torch.equal(outputs[0], run(plain, 0.1))
    assert torch.equal(outputs[1], run(plain, 0.9))
    assert not torch.equal(*outputs)


def test_an_average_by_the_names_of_parameters_loads_whole(tiny: Pair) -> None:
    shadow = {name: parameter.detach().clone() for name, parameter in tiny[1].named_parameters()}
    fresh = attach(TinyNet().double().eval(), "dia-lstm")
    loaded = fresh.load_state_dict(shadow, strict=False)
    assert loaded.unexpected_keys == []
    assert all(torch.equal(parameter, shadow[name]) for name, parameter in fresh.named_parameters())


def test_walks_over_children_find_every_attention_once() -> None:
    """From diffusers: a layer that was listed twice took the wrong processor."""
    plain: Any = conditional_unet()
    processors = list(plain.attn_processors)
    assert list(attach(plain, "se", branches=["conv", "attention"]).attn_processors) == processors


@pytest.mark.parametrize("attention", ["dia-lstm", "se", "srm", "cbam"])
def test_hooks_on_every_module_see_tensors(attention: str) -> None:
    attached = attach(torchvision.models.resnet18(), attention).eval()
    shapes: dict[str, list[torch.Size]] = {}
    for path, module in attached.named_modules():
        module.register_forward_hook(
            lambda _, args, output, path=path: shapes.setdefault(path, []).extend((args[0].shape, output.shape))
        )
    attached(torch.randn(2, 3, 64, 64))
    assert len(shapes["layer1.0.dia"]) == 2 * 2  # in and out, in each of the two blocks
    assert shapes["layer1.0.dia"][0] == (2, 64, 16, 16)
    assert shapes["layer1.0.bn2"] == [(2, 64, 16, 16)] * 2


def test_a_hook_on_a_site_may_replace_the_output_of_the_layer(tiny: Pair) -> None:
    def double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return 2 * output

    for network in tiny:
        network.stage1[1].bn2.register_forward_hook(double)
    expected = threaded(tiny[0], unit_weights(tiny[1]), images())
    torch.testing.assert_close(tiny[1](images()), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("who", ["site", "block"])
def test_a_forward_set_on_an_instance_is_used(tiny: Pair, who: str) -> None:
    """As accelerate, bitsandbytes and many tutorials do."""
    expected = tiny[1](images())
    module = tiny[1].stage1[1] if who == "block" else tiny[1].stage1[1].bn2
    calls = []
    forward = module.forward

    def counted(*args: Any) -> Any:
        calls.append(1)
        return forward(*args)

    module.forward = counted
    assert torch.equal(tiny[1](images()), expected)
    assert calls == [1]


# Weights, and what is done to layers


def test_pruning_a_site_and_a_new_parameter_on_it_are_saved() -> None:
    network: Any = attach(get_model("cifar_wrn", depth=10, widen_factor=1, num_classes=5), "dia-lstm").eval()
    site = network.layer1[0].conv2
    before = site.weight.detach().clone()
    prune.l1_unstructured(site, "weight", amount=0.5)  # type: ignore[no-untyped-call]
    smallest = before.abs().flatten().sort().values[before.numel() // 2 - 1]
    assert torch.equal(site.weight, before * (before.abs() > smallest))
    site.gain = nn.Parameter(torch.ones(1))
    assert {"layer1.0.conv2.weight_orig", "layer1.0.conv2.weight_mask", "layer1.0.conv2.gain"} <= set(
        network.state_dict()
    )
    network.load_state_dict(network.state_dict())


@pytest.mark.parametrize("when", ["before", "after"])
def test_parametrizations_of_a_site_come_and_go(tiny: Pair, when: str) -> None:
    plain, _ = tiny
    if when == "before":
        parametrizations.weight_norm(plain.stage1[1].conv2)
    attached = randomised(attach(copy.deepcopy(plain), "dia-lstm", sites="stage*.conv2"), seed=1)
    expected = attached(images())
    if when == "after":
        parametrizations.weight_norm(attached.stage1[1].conv2)
        torch.testing.assert_close(attached(images()), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(copy.deepcopy(attached)(images()), expected, rtol=0, atol=1e-12)
    again = detach(copy.deepcopy(attached))
    assert not any("dia_links" in vars(module) for module in again.modules())
    for network in (attached, again):
        output = network(images())
        remove_parametrizations(network.stage1[1].conv2, "weight")
        torch.testing.assert_close(network(images()), output, rtol=0, atol=1e-12)
    assert type(again.stage1[1].conv2) is nn.Conv2d
    torch.testing.assert_close(attached(images()), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("attention", ["cbam", "dia-lstm", "dsu", "eca", "se", "sge", "spa", "srm", "stac"])
@pytest.mark.parametrize("identity", [True, False])
def test_a_network_from_the_meta_device_starts_as_was_asked_for(attention: str, identity: bool) -> None:
    plain = torchvision.models.resnet18(num_classes=5).eval()
    with torch.device("meta"):
        network = attach(torchvision.models.resnet18(num_classes=5), attention, identity=identity).eval()
    network.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.fill_(7)  # what lay in the memory before
    for module in network.modules():  # as FSDP and Lightning do after materialising
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    network.load_state_dict(plain.state_dict(), strict=False)
    batch = images(2, 64, dtype=torch.float32)
    if identity:
        assert torch.equal(network(batch), plain(batch))
    units = [module for module in network.modules() if isinstance(module, AttentionUnit)]
    assert len(units) == 4
    assert all(not (tensor == 7).all() for unit in units for tensor in (*unit.parameters(), *unit.buffers()))


def test_zero_biases_of_the_authors_come_back_with_reset_parameters() -> None:
    network = attach(get_model("cifar_wrn", depth=10, widen_factor=1), "dia-lstm")
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.ones_(module.bias)
            module.reset_parameters()
    biases = {name: tensor for name, tensor in network.named_parameters() if ".dia." in name and name.endswith("bias")}
    assert len(biases) == 3 * 4
    assert not any(bias.any() for bias in biases.values())


def test_weights_of_version_0_1_load_and_compute_the_same() -> None:
    stored = torch.load(Path(__file__).parent / "files" / "weights_0.1.pt", weights_only=True)
    network = attach(nn.Sequential(*(PreactivationBlock(4, 4) for _ in range(3))), "srm").eval()
    before = sorted(stored["state_dict"])
    network.load_state_dict(stored["state_dict"])
    assert sorted(stored["state_dict"]) == before
    torch.testing.assert_close(network(stored["input"]), stored["output"], rtol=0, atol=1e-6)
    assert "1.unit_norm.running_mean" in network.state_dict()
    nested = nn.ModuleDict({"backbone": network})
    nested.load_state_dict({f"backbone.{key}": value for key, value in stored["state_dict"].items()})


def test_parameters_are_in_the_order_of_version_0_1_as_optimizers_number_them() -> None:
    stored = torch.load(Path(__file__).parent / "files" / "weights_0.1.pt", weights_only=True)
    network = attach(nn.Sequential(*(PreactivationBlock(4, 4) for _ in range(3))), "srm")
    names = [name.replace("conv2.branch_norm", "branch_norm").replace("conv2.unit_norm", "unit_norm")
             for name in stored["parameters"]]  # fmt: skip
    assert [name for name, _ in network.named_parameters()] == names


def test_loaders_that_walk_the_names_of_tensors_load_whole(tiny: Pair, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    torch.save(tiny[1].state_dict(), tmp_path / "weights.pt")
    with accelerate.init_empty_weights():
        network = attach(TinyNet().double(), "dia-lstm").eval()
    network = accelerate.load_checkpoint_and_dispatch(network, str(tmp_path / "weights.pt"), device_map={"": "cpu"})
    assert torch.equal(network(images()), tiny[1](images()))


def test_weights_that_are_mapped_from_a_file_are_assigned(tiny: Pair, tmp_path: Path) -> None:
    torch.save(tiny[1].state_dict(), tmp_path / "weights.pt")
    with torch.device("meta"):
        network = attach(TinyNet().double(), "dia-lstm").eval()
    weights = torch.load(tmp_path / "weights.pt", mmap=True, weights_only=True)
    network.load_state_dict(weights, assign=True)
    assert torch.equal(network(images()), tiny[1](images()))


# When attention comes too late, or into something that does not support it


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "compile": lambda network: torch.compile(network),
    "ddp": nn.parallel.DistributedDataParallel,
    "fsdp": lambda network: FullyShardedDataParallel(network, device_id=torch.device("cpu")),
    "fully_shard": lambda network: nn.Sequential(fully_shard(network, mesh=init_device_mesh("cpu", (1,)))),
}


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapped_network_is_refused(wrap: str, tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        wrapped = WRAPPERS[wrap](TinyNet())
        for network in (wrapped, nn.ModuleDict({"backbone": wrapped})):
            with pytest.raises(ValueError, match="Attach before wrapping, sharding or compiling the network"):
                attach(network, "se")
    finally:
        torch.distributed.destroy_process_group()


def test_a_network_that_was_compiled_in_place_is_refused() -> None:
    network = TinyNet()
    network.stage1[0].compile(backend="eager")
    with pytest.raises(ValueError, match=r"stage1\.0 is already wrapped \(compile\(\)\)"):
        attach(network, "se")


def test_scripting_is_refused_with_what_to_use(tiny: Pair) -> None:
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script cannot compile.*torch\.export"):
        torch.jit.script(tiny[1])


class Named(BasicBlock):  # type: ignore[misc]
    """A block with a norm of that name."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.unit_norm = nn.Identity()


def test_a_name_of_a_norm_that_is_in_use_is_refused_and_the_network_left_alone() -> None:
    network = nn.Sequential(Named(), Named())
    with pytest.raises(ValueError, match="Named already has an attribute 'unit_norm'"):
        attach(network, "srm")
    assert type(network[0]) is Named
    attach(network, "se")  # which adds no norm


# A module may be a site of one block, a block itself, and an owner of further ones


def test_roles_of_one_module_add_up_and_come_apart() -> None:
    from dia_lightning.attention._attached_block import AttachedBlock, ChainOwner
    from dia_lightning.attention._attached_site import AttachedSite
    from dia_lightning.attention._roles import add_role, remove_role

    modules = [BasicBlock(8, 8), BasicBlock(8, 8)]
    orders = [(AttachedSite, ChainOwner, AttachedBlock), (AttachedBlock, AttachedSite, ChainOwner)]
    for module, roles in zip(modules, orders, strict=True):
        for role in roles:
            add_role(module, role)
    assert type(modules[0]) is type(modules[1])
    copied = pickle.loads(pickle.dumps(modules[0]))
    assert type(copied) is type(modules[0])
    for module, roles in zip(modules, orders, strict=True):
        for role in roles:
            remove_role(module, role)
        assert type(module) is BasicBlock


# Blocks of every kind


class Residual(nn.Sequential):
    """The usual idiom: a sequence that is added to its input."""

    def forward(self, features: Tensor) -> Tensor:
        output: Tensor = features + super().forward(features)  # type: ignore[no-untyped-call]
        return output


@pytest.mark.parametrize("attention", ["dia-lstm", "srm"])
def test_a_block_that_is_a_sequence_does_not_run_the_attention_as_a_layer(attention: str) -> None:
    plain: Any = nn.Sequential(*(Residual(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)) for _ in range(3))).double().eval()
    network: Any = randomised(attach(copy.deepcopy(plain), attention, sites="*.1"), seed=1)
    assert len(network[0]) == 2
    features = expected = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    state = None
    for index, block in enumerate(network):
        branch = nn.functional.batch_norm(
            block[0](expected), block[1].running_mean, block[1].running_var, block[1].weight, block[1].bias
        )
        norm = {} if index == 0 or attention != "srm" else {"norm": block.unit_norm}
        attention_map, state = network[0].dia(branch, state, **norm)
        expected = expected + branch * attention_map
    torch.testing.assert_close(network(features), expected, rtol=0, atol=1e-12)
    assert [type(module) for module in detach(network).modules()] == [type(module) for module in plain.modules()]


def test_an_instance_of_the_class_of_an_attached_block_is_a_plain_block(tiny: Pair) -> None:
    features = tiny[0].stem(images())
    block = type(tiny[1].stage1[1])(8, 8).double().eval()
    block.load_state_dict(tiny[0].stage1[1].state_dict())
    assert torch.equal(block(features), tiny[0].stage1[1](features))


class Registered(BasicBlock):  # type: ignore[misc]
    """A block that keeps its subclasses, and guards its attributes."""

    known: ClassVar[list[str]] = []

    def __init_subclass__(cls, **options: Any) -> None:
        Registered.known.append(cls.__name__)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith(("__", "dia")):
            raise AttributeError(f"{name} is not for you")
        super().__setattr__(name, value)


def test_registries_of_subclasses_and_guarded_attributes_of_blocks_are_left_alone() -> None:
    network = nn.Sequential(Registered(8, 8), Registered(8, 8)).eval()
    attach(network, "dia-lstm")
    assert network(torch.randn(2, 8, 6, 6)).shape == (2, 8, 6, 6)
    detach(network)
    assert Registered.known == []


def test_blocks_in_checkpoint_wrappers_share_as_without() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    network: Any = TinyNet()
    for stage in (network.stage1, network.stage3):
        for index, block in enumerate(stage):
            stage[index] = checkpoint_wrapper(block)
    attach(network, "se")
    assert sum(isinstance(module, AttentionUnit) for module in network.modules()) == 3
    network(images(dtype=torch.float32)).sum().backward()


def test_a_network_whose_blocks_share_nothing_gives_a_warning() -> None:
    network = nn.Sequential(*(nn.Sequential(BasicBlock(8, 8), nn.Dropout()) for _ in range(3)))
    with pytest.warns(UserWarning, match=r"3 of 3 units serve a single block.*0\.0\.bn2 \(8 channels\), 1\.0"):
        attach(network, "dia-lstm")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(TinyNet(blocks=(2, 2, 3)), "dia-lstm")
        attach(TinyNet(blocks=(1, 1, 1)), "dia-lstm", share="block")
    with pytest.warns(UserWarning, match=r"1 of 3 units serve a single block.*stage2\.0"):
        attach(TinyNet(blocks=(2, 1, 3)), "dia-lstm")


@pytest.mark.parametrize("what", ["network", "block", "layer"])
def test_what_a_compiler_has_kept_runs_plain_after_detaching(tiny: Pair, what: str) -> None:
    plain, attached = tiny
    kept: Any = torch.compile(attached, backend="eager")
    if what == "block":
        attached.stage1[1] = torch.compile(attached.stage1[1], backend="eager")
    elif what == "layer":
        attached.stage1[1].bn2 = torch.compile(attached.stage1[1].bn2, backend="eager")
    run = kept if what == "network" else attached
    run(images())
    detach(attached)
    assert torch.equal(run(images()), plain(images()))


# Units of every kind


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda features: features.mean((2, 3), keepdim=True), r"must return \(map, state\).*got a Tensor"),
        (lambda features: (features.mean((2, 3)), None), r"a map of 4 axes .* got shape \(2, 8\)"),
        (lambda features: (features, None, None), r"must return \(map, state\)"),
        (lambda features: (features[..., :3, :], None), r"broadcasts against features .* got shape \(2, 8, 3, 6\)"),
    ],
    ids=["no state", "no axes", "three", "other positions"],
)
def test_a_unit_that_returns_something_else_is_refused(result: Any, message: str) -> None:
    class Unit(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()

        def forward(self, features: Tensor, state: Any) -> Any:
            return result(features)

    network = attach(nn.Sequential(BasicBlock(8, 8)), Unit)
    with pytest.raises(RuntimeError, match=message):
        network(torch.randn(2, 8, 6, 6))


def test_a_unit_that_replaces_another_one_is_used(tiny: Pair) -> None:
    other = copy.deepcopy(tiny[1])
    fresh = DIALSTM(8).double()
    other.stage1[0].dia = fresh
    tiny[1].stage1[0].dia.load_state_dict(fresh.state_dict())
    assert torch.equal(other(images()), tiny[1](images()))
