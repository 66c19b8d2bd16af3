"""Where channels, samples and positions lie: sequences, tokens, volumes, padding, ambiguous layouts."""

import copy
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.export import Dim, export

from dia_lightning.attention import CBAM, AttentionCondenser, SpatialPyramidAttention, attach, list_attention

from .networks import TinyNet, lstm_step, randomised, unit_weights

every_unit = pytest.mark.parametrize("name", ["cbam", "dia-lstm", "dsu", "eca", "se", "sge", "spa", "srm", "stac"])


class Block(nn.Module):
    """A residual block of any number of position axes."""

    def __init__(self, dims: int, width: int = 8) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
        self.conv, self.norm = conv(width, width, 3, padding=1), norm(width)

    def forward(self, features: Tensor) -> Tensor:
        output: Tensor = (features + self.norm(self.conv(features))).relu()
        return output


SHAPES = {1: (2, 8, 20), 2: (2, 8, 6, 7), 3: (2, 8, 4, 6, 8)}  # one axis as long as there are channels


@every_unit
@pytest.mark.parametrize("dims", SHAPES)
def test_units_work_on_sequences_images_and_volumes(name: str, dims: int) -> None:
    plain: Any = randomised(nn.Sequential(*(Block(dims) for _ in range(3))).double().eval())
    network: Any = randomised(attach(copy.deepcopy(plain), name, sites="*.norm"), seed=1)
    network.load_state_dict(plain.state_dict(), strict=False)
    features = expected = torch.randn(SHAPES[dims], dtype=torch.float64, requires_grad=True)
    unit, state = network[0].dia, None
    for index, block in enumerate(plain):
        branch = block.norm(block.conv(expected))
        norm = {} if not hasattr(network[index], "unit_norm") else {"norm": network[index].unit_norm}
        attention_map, state = unit(branch.unsqueeze(-1) if dims == 1 else branch, state, **norm)
        assert attention_map.ndim == max(4, dims + 2)
        expected = (expected + branch * (attention_map.squeeze(-1) if dims == 1 else attention_map)).relu()
    torch.testing.assert_close(network(features), expected, rtol=0, atol=1e-12)
    network.train()(features).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("name", ["se", "eca", "dia-lstm", "dsu"])
@pytest.mark.parametrize("dims", [1, 3])
def test_channel_units_squeeze_over_all_positions(name: str, dims: int) -> None:
    network: Any = randomised(attach(nn.Sequential(Block(dims)).double().eval(), name, sites="*.norm"))
    features = torch.randn(SHAPES[dims], dtype=torch.float64)
    branch = network[0].norm(network[0].conv(features))
    mean = branch.flatten(2).mean(2)
    gate = network[0].dia(mean[:, :, None, None])[0].reshape(2, 8, *[1] * dims)  # of one position, the mean
    torch.testing.assert_close(network(features), (features + branch * gate).relu(), rtol=0, atol=1e-12)


def test_spatial_units_have_kernels_and_grids_of_three_axes_in_volumes() -> None:
    cbam: Any = attach(nn.Sequential(Block(3)), "cbam", kernel_size=3, sites="*.norm")[0].dia
    assert cbam.conv.weight.shape == (1, 2, 3, 3, 3)
    pyramid: Any = attach(nn.Sequential(Block(3)), "spa", sites="*.norm")[0].dia
    assert pyramid.reduce.in_features == (4**3 + 2**3 + 1) * 8
    features = torch.randn(2, 8, 4, 8, 4)
    parts = [features.reshape(2, 8, n, 4 // n, n, 8 // n, n, 4 // n).mean((3, 5, 7)).flatten(1) for n in (4, 2, 1)]
    expected = pyramid.expand(pyramid.reduce(torch.cat(parts, dim=1)).relu()).sigmoid()
    torch.testing.assert_close(pyramid(features)[0].flatten(1), expected)
    condenser: Any = attach(nn.Sequential(Block(3)), "stac", sites="*.norm")[0].dia
    cells = features.reshape(2, 8, 2, 2, 2, 4, 2, 2).mean((3, 5, 7)).flatten(1)
    grid = condenser.expand(condenser.reduce(cells).relu()).sigmoid().reshape(2, 8, 2, 2, 2)
    for axis, width in ((2, 2), (3, 4), (4, 2)):
        grid = grid.repeat_interleave(width, axis)
    torch.testing.assert_close(condenser(features)[0], grid)


@pytest.mark.parametrize("unit", [AttentionCondenser, CBAM, SpatialPyramidAttention])
def test_other_numbers_of_axes_are_refused(unit: Any) -> None:
    with pytest.raises(ValueError, match="spatial_dims must be 2 or 3, got 4"):
        unit(8, spatial_dims=4)


# Tokens


class Attention(nn.Module):
    """A transformer block that takes tokens first, as torch's attention does by default."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, batch_first=batch_first)
        self.inner, self.outer = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(tokens, tokens, tokens)[0]
        output: Tensor = tokens + self.outer(self.inner(tokens).relu())
        return output


@pytest.mark.parametrize("name", ["dia-lstm", "se", "sge", "srm"])
def test_tokens_first_and_samples_first_are_the_same_attention(name: str) -> None:
    first, other = encoder(name, batch_first=True), encoder(name, batch_first=False)
    other.load_state_dict(first.state_dict())
    tokens = torch.randn(3, 7, 16, dtype=torch.float64)
    found = other(tokens.transpose(0, 1)).transpose(0, 1)
    torch.testing.assert_close(found, first(tokens), rtol=0, atol=1e-12)
    torch.testing.assert_close(found[:1], first(tokens[:1]), rtol=0, atol=1e-12)


def test_the_sample_axis_next_to_a_layer_that_takes_tokens_first_is_not_guessed() -> None:
    with pytest.raises(ValueError, match=r"whether .* come first at 0\.outer, because 'attn' takes tokens first"):
        attach(nn.Sequential(Attention(batch_first=False)), "se", sites="*.outer")
    network = randomised(attach(nn.Sequential(Attention(batch_first=False)).double(), "se", sites="*.attn"))
    tokens = torch.randn(7, 3, 16, dtype=torch.float64)
    torch.testing.assert_close(network(tokens)[:, :1], network(tokens[:, :1]), rtol=0, atol=1e-12)


def test_a_site_that_returns_a_tuple_has_its_first_entry_recalibrated() -> None:
    plain: Any = randomised(nn.Sequential(*(Attention(batch_first=True) for _ in range(2))).double().eval())
    network: Any = randomised(attach(copy.deepcopy(plain), "dia-lstm", sites="*.attn"), seed=1)
    network.load_state_dict(plain.state_dict(), strict=False)
    weights, state = unit_weights(network)[""], None
    tokens = expected = torch.randn(2, 5, 16, dtype=torch.float64)
    for block in plain:
        branch = block.attn(expected, expected, expected)[0]
        attention_map, state = lstm_step(weights, branch.transpose(1, 2)[..., None], state)
        expected = expected + branch * attention_map[..., 0].transpose(1, 2)
        expected = expected + block.outer(block.inner(expected).relu())
    torch.testing.assert_close(network(tokens), expected, rtol=0, atol=1e-12)


def encoder(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, **options)
    return randomised(attach(nn.TransformerEncoder(layer, 3).double().eval(), name, sites="layers.*.linear2"))


@pytest.mark.parametrize("name", ["dia-lstm", "se"])
@pytest.mark.parametrize("padded", [False, True])
def test_torchs_encoder_computes_the_same_where_it_would_fuse_its_layers(name: str, padded: bool) -> None:
    network = encoder(name, batch_first=True)
    tokens = torch.randn(2, 7, 16, dtype=torch.float64)
    padding = torch.arange(7)[None] >= torch.tensor([[4], [7]]) if padded else None
    expected = network(tokens, src_key_padding_mask=padding)  # with autograd nothing is fused
    with torch.no_grad():
        found = network(tokens, src_key_padding_mask=padding)
    real = torch.ones(2, 7, dtype=torch.bool) if padding is None else ~padding
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-12)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", ["dia-lstm", "dsu", "se", "eca"])
def test_padded_tokens_do_not_count(name: str, batch_first: bool) -> None:
    network = encoder(name, batch_first=batch_first)
    tokens = torch.randn(2, 7, 16, dtype=torch.float64)
    padding = torch.arange(7)[None] >= torch.tensor([[4], [7]])

    def run(tokens: Tensor, padding: Tensor | None) -> Tensor:
        found: Tensor = network(tokens if batch_first else tokens.transpose(0, 1), src_key_padding_mask=padding)
        return found if batch_first else found.transpose(0, 1)

    torch.testing.assert_close(run(tokens, padding)[0, :4], run(tokens[:1, :4], None)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["cbam", "sge", "spa", "srm", "stac"])
def test_units_that_would_count_padding_refuse_it(name: str) -> None:
    network = encoder(name, batch_first=True)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    network(torch.randn(2, 7, 16, dtype=torch.float64), src_key_padding_mask=padding)  # marks none
    padding[0, 5:] = True
    with pytest.raises(RuntimeError, match=r"would count padded tokens.*dia-lstm, dsu, se, eca"):
        network(torch.randn(2, 7, 16, dtype=torch.float64), src_key_padding_mask=padding)


class Masked(nn.Module):
    """A block on tokens that takes a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.Linear(16, 16)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        output: Tensor = tokens + self.outer(tokens)
        return output


LENGTHS = torch.tensor([[4], [7]])
REAL = torch.arange(7)[None] < LENGTHS


def added(lowest: float) -> Tensor:
    return torch.zeros(2, 1, 1, 7).masked_fill(~REAL[:, None, None], lowest)


MASKS = {
    "of keys": REAL,
    "of keys, as integers": REAL.long(),
    "of keys, as numbers": REAL.float(),
    "of keys by queries": REAL[:, None],
    "of keys by heads and queries": REAL[:, None, None],
    "of pairs": REAL[:, None] & REAL[:, :, None],
    "of pairs by heads": REAL[:, None, None] & REAL[:, None, :, None],
    "added": added(float("-inf")),
    "the lowest number added": added(torch.finfo().min),
    "-1e9 added": added(-1e9),
    "-1e4 added": added(-1e4),
}


def test_a_condenser_of_one_cell_leaves_padding_out() -> None:
    network: Any = randomised(attach(nn.Sequential(Masked()).double(), "stac", size=1, sites="*.outer"))
    tokens = torch.randn(2, 7, 16, dtype=torch.float64)
    alone = network[0](tokens[:1, :4])
    torch.testing.assert_close(network[0](tokens, REAL)[:1, :4], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", MASKS)
def test_masks_are_read_as_their_libraries_write_them(kind: str) -> None:
    network: Any = randomised(attach(nn.Sequential(Masked()).double(), "se", sites="*.outer"))
    tokens = torch.randn(2, 7, 16, dtype=torch.float64)
    found = network[0](tokens, attention_mask=MASKS[kind])
    assert torch.equal(found, network[0](tokens, MASKS[kind]))  # by position
    for sample, length in enumerate((4, 7)):
        alone = network[0](tokens[sample : sample + 1, :length])
        torch.testing.assert_close(found[sample, :length], alone[0], rtol=0, atol=1e-12)


class Patterned(Masked):
    """A block whose mask is named as in torch and timm."""

    def forward(self, tokens: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        return super().forward(tokens)


@pytest.mark.parametrize("size", [2, 7])
@pytest.mark.parametrize("mask", [torch.ones(7, 7).tril().bool(), torch.zeros(7, 7), torch.ones(1, 1, 7, 7).bool()])
def test_a_pattern_of_pairs_under_the_name_of_torch_is_not_padding(mask: Tensor, size: int) -> None:
    network: Any = randomised(attach(nn.Sequential(Patterned()).double(), "se", sites="*.outer"))
    tokens = torch.randn(size, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(network[0](tokens, mask), network[0](tokens), rtol=0, atol=1e-12)


class Strange(Masked):
    """A block whose mask has a name that does not show what it marks."""

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(tokens)


def test_an_unknown_mask_of_samples_is_refused() -> None:
    network: Any = attach(nn.Sequential(Strange()), "se", sites="*.outer")
    with pytest.raises(RuntimeError, match="does not know whether 'mask' of a Strange marks padded tokens"):
        network[0](torch.randn(2, 7, 16), REAL)


class Flagged(Masked):
    """A block that marks real tokens in some other way."""

    def forward(self, tokens: Tensor, valid: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
        return super().forward(tokens)


def test_flags_of_samples_by_any_name_are_refused() -> None:
    network: Any = attach(nn.Sequential(Flagged()), "se", sites="*.outer")
    for option in ({"valid": REAL}, {"attn_mask": REAL}):
        with pytest.raises(RuntimeError, match="does not know whether"):
            network[0](torch.randn(2, 7, 16), **option)
    network[0](torch.randn(2, 7, 16), valid=torch.rand(2, 7))  # may be anything


def test_a_causal_transformer_is_refused() -> None:
    network = encoder("dia-lstm", batch_first=True)
    causal = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="does not suit causal networks"):
        network(torch.randn(2, 7, 16, dtype=torch.float64), mask=causal, is_causal=True)


@pytest.mark.parametrize("name", ["dia-lstm", "dsu", "se", "eca"])
def test_what_stands_in_the_padding_does_not_matter(name: str) -> None:
    network: Any = attach(nn.Sequential(Masked()), name, sites="*.outer").half()
    tokens = torch.full((2, 7, 16), 60.0).half()
    expected = network[0](tokens, REAL)
    tokens[0, 4:] = float("nan")
    assert torch.equal(network[0](tokens, REAL)[REAL], expected[REAL])
    assert expected.isfinite().all()


@pytest.mark.parametrize("mask", [torch.ones(7, 7).tril().bool(), torch.zeros(7, 7), torch.ones(1, 1, 7, 7).bool()])
def test_an_attention_pattern_common_to_all_samples_is_not_padding(mask: Tensor) -> None:
    network: Any = randomised(attach(nn.Sequential(Masked()).double(), "cbam", sites="*.outer"))
    tokens = torch.randn(2, 7, 16, dtype=torch.float64)
    assert torch.equal(network[0](tokens, mask), network[0](tokens))


def test_a_sample_of_naflexvit_does_not_depend_on_the_padding_of_its_batch() -> None:
    torch.manual_seed(0)
    network = timm.create_model("naflexvit_base_patch16_gap", embed_dim=32, depth=3, num_heads=2, num_classes=10).eval()
    attach(network, "dia-lstm")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    patches = torch.randn(1, 12, 16 * 16 * 3)
    places = torch.stack([torch.arange(12) // 4, torch.arange(12) % 4], dim=1)[None]
    outputs = []
    for length in (12, 48):
        full = {
            "patches": torch.zeros(1, length, patches.shape[2]),
            "patch_coord": torch.zeros(1, length, 2, dtype=torch.long),
            "patch_valid": torch.arange(length)[None] < 12,
        }
        full["patches"][:, :12], full["patch_coord"][:, :12] = patches, places
        with torch.no_grad():
            outputs.append(network(full))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-4 * outputs[0].abs().max().item())


# Layouts that do not fit


class Normed(nn.Module):
    """A block that ends in a norm over the channels, which come second."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), norm

    def forward(self, features: Tensor) -> Tensor:
        output: Tensor = features + self.norm(self.conv(features))
        return output


def test_layer_norms_of_convolutional_networks_have_their_channels_second() -> None:
    from timm.layers import LayerNorm2d
    from torchvision.models.convnext import LayerNorm2d as TorchvisionLayerNorm2d

    for norm in (LayerNorm2d(8), TorchvisionLayerNorm2d(8)):
        network: Any = randomised(attach(nn.Sequential(Normed(norm)).double(), "se", sites="*.norm"))
        features = torch.randn(2, 8, 5, 8, dtype=torch.float64)  # as wide as there are channels
        branch = network[0].norm(network[0].conv(features))
        expected = features + branch * network[0].dia(branch)[0]
        torch.testing.assert_close(network(features), expected, rtol=0, atol=1e-12)


def test_channels_on_another_axis_than_expected_are_named() -> None:
    network: Any = attach(nn.Sequential(Normed(nn.BatchNorm2d(8))), "se", sites="*.norm")
    network[0].norm = nn.AdaptiveAvgPool2d((5, 7))
    network[0].conv = nn.Conv2d(8, 4, 1)
    message = r"needs features \[B, 8, \.\.\.\] of 4 axes, got a Tensor of shape \(2, 4, 5, 7\)"
    with pytest.raises(RuntimeError, match=message):
        network(torch.randn(2, 8, 5, 7))


def test_an_image_without_a_batch_is_refused() -> None:
    network = attach(nn.Sequential(Normed(nn.Conv2d(8, 8, 1))), "se", sites="*.norm")
    with pytest.raises(RuntimeError, match=r"of 4 axes, got a Tensor of shape \(8, 8, 8\)"):
        network(torch.randn(8, 8, 8))  # as high as there are channels


def test_layers_that_are_never_called_are_refused_with_what_to_name() -> None:
    with pytest.raises(ValueError, match=r"'0\.attn\.out_proj' is never called.*Name the module around it"):
        attach(nn.Sequential(Attention(batch_first=True)), "se", sites="*.out_proj")


# Batches without samples, exports with free sizes


@every_unit
def test_an_empty_batch_gives_an_empty_batch(name: str) -> None:
    network = attach(torchvision.models.resnet18(num_classes=5).eval(), name)
    assert network(torch.zeros(0, 3, 64, 64)).shape == (0, 5)


@every_unit
def test_an_export_takes_images_of_every_size(name: str) -> None:
    network = attach(TinyNet().eval(), name)
    free = ({0: Dim("batch", min=1, max=64), 2: Dim("height", min=5, max=512), 3: Dim("width", min=5, max=512)},)
    program = export(network, (torch.randn(2, 3, 12, 16),), dynamic_shapes=free)
    other = torch.randn(3, 3, 17, 9)
    torch.testing.assert_close(program.module()(other), network(other), rtol=0, atol=1e-5)


def test_every_unit_of_the_package_is_tested_here() -> None:
    own = {name for name in list_attention() if "-" not in name or name == "dia-lstm"}  # others belong to other tests
    assert own == set(every_unit.args[1])
