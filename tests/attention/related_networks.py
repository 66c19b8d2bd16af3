"""Small networks after papers on other tasks and other neurons, written for the tests; widths and depths are ours."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def by_heads(tokens: Tensor, heads: int) -> Tensor:
    return tokens.reshape(*tokens.shape[:2], heads, -1).transpose(1, 2)  # [B, heads, N, C / heads]


def merged(tokens: Tensor) -> Tensor:
    return tokens.transpose(1, 2).flatten(2)  # [B, N, C]


class ConvBlock(nn.Module):
    """Residual block of arXiv 2409.19933 and 2403.12050 as two convolutions of one width; left out: norms."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        branch: Tensor = self.conv2(F.relu(self.conv1(features)))
        return features + branch


class SpatiotemporalLSTMCell(nn.Module):
    """ST-LSTM cell of PredRNN (arXiv 2103.09504); left out: layer norm in the gates and the decoupling loss."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out_channels = width
        self.from_input = nn.Conv2d(width, 7 * width, 3, padding=1)
        self.from_hidden = nn.Conv2d(width, 4 * width, 3, padding=1, bias=False)
        self.from_memory = nn.Conv2d(width, 3 * width, 3, padding=1, bias=False)
        self.output_gate = nn.Conv2d(2 * width, width, 3, padding=1, bias=False)
        self.fuse = nn.Conv2d(2 * width, width, 1, bias=False)

    def forward(self, features: Tensor, hidden: Tensor, cell: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        g, i, f, g_memory, i_memory, f_memory, o = self.from_input(features).chunk(7, 1)
        g_hidden, i_hidden, f_hidden, o_hidden = self.from_hidden(hidden).chunk(4, 1)
        g_before, i_before, f_before = self.from_memory(memory).chunk(3, 1)
        cell = (f + f_hidden).sigmoid() * cell + (i + i_hidden).sigmoid() * (g + g_hidden).tanh()
        written = (i_memory + i_before).sigmoid() * (g_memory + g_before).tanh()
        memory = (f_memory + f_before).sigmoid() * memory + written
        both = torch.cat([cell, memory], 1)
        hidden = (o + o_hidden + self.output_gate(both)).sigmoid() * self.fuse(both).tanh()
        return hidden, cell, memory


class ResidualLSTMLayer(nn.Module):
    """Layer of a PredRNN stack (arXiv 2103.09504) with a shortcut around its cell, which is our addition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cell = SpatiotemporalLSTMCell(width)

    def forward(
        self, features: Tensor, hidden: Tensor, cell: Tensor, memory: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        hidden, cell, memory = self.cell(features, hidden, cell, memory)
        return features + hidden, hidden, cell, memory


class PredRNN(nn.Module):
    """PredRNN (arXiv 2103.09504) with shortcuts of our own; left out: patches, sampling, forecasts of forecasts."""

    def __init__(self, channels: int = 1, width: int = 6, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Conv2d(channels, width, 1)
        self.layers = nn.ModuleList(ResidualLSTMLayer(width) for _ in range(depth))
        self.head = nn.Conv2d(width, channels, 1)

    def forward(self, video: Tensor) -> Tensor:
        """Map a video [B, T, C, H, W] to the next frame of each."""
        memory = torch.zeros_like(self.embed(video[:, 0]))  # from the last layer to the first one at the next frame
        states = [(memory, memory) for _ in self.layers]
        frames = []
        for frame in video.unbind(1):
            features = self.embed(frame)
            for index, layer in enumerate(self.layers):
                features, hidden, cell, memory = layer(features, *states[index], memory)
                states[index] = hidden, cell
            frames.append(self.head(features))
        return torch.stack(frames, 1)


class SubspaceAttention(nn.Module):
    """MSSA of CRATE (in arXiv 2409.19933): query, key and value are one projection; left out: dropout."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.subspaces = nn.Linear(width, width, bias=False)
        self.merge = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        projected = by_heads(self.subspaces(tokens), self.heads)
        output: Tensor = self.merge(merged(F.scaled_dot_product_attention(projected, projected, projected)))
        return output


class ISTA(nn.Module):
    """Step of ISTA in CRATE (in arXiv 2409.19933), whose shortcut lies inside the ReLU; nothing is left out."""

    def __init__(self, width: int, step: float = 0.1, sparsity: float = 0.1) -> None:
        super().__init__()
        self.dictionary = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(width, width)))
        self.step = step
        self.sparsity = sparsity

    def forward(self, tokens: Tensor) -> Tensor:
        missed = tokens - F.linear(tokens, self.dictionary)
        return F.relu(tokens + self.step * (F.linear(missed, self.dictionary.T) - self.sparsity))


class CRATEBlock(nn.Module):
    """Block of CRATE (in arXiv 2409.19933): ISTA(Z + MSSA(Z)) with pre-norms; nothing is left out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.mssa = SubspaceAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.ista = ISTA(width)

    def forward(self, tokens: Tensor) -> Tensor:
        compressed = tokens + self.mssa(self.norm1(tokens))
        output: Tensor = self.ista(self.norm2(compressed))
        return output


class CCDepth(nn.Module):
    """CCDepth (arXiv 2409.19933) of one CNN level and CRATE; left out: other levels and scales, pose network."""

    def __init__(self, size: int = 16, width: int = 16, depth: int = 3, heads: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.encoder = nn.Sequential(ConvBlock(8), ConvBlock(8))
        self.patches = nn.Conv2d(8, width, 2, stride=2)
        self.positions = nn.Parameter(0.1 * torch.randn(1, (size // 4) ** 2, width))
        self.blocks = nn.Sequential(*(CRATEBlock(width, heads) for _ in range(depth)))
        self.grow = nn.ConvTranspose2d(width, 8, 4, stride=4)
        self.head = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to disparities [B, 1, H, W]."""
        patches = self.patches(F.max_pool2d(self.encoder(self.stem(images)), 2))
        tokens = self.blocks(patches.flatten(2).transpose(1, 2) + self.positions)
        features = tokens.transpose(1, 2).unflatten(2, patches.shape[2:])
        disparity: Tensor = self.head(F.relu(self.grow(features))).sigmoid()
        return disparity


class DemosaicNet(nn.Module):
    """Residual demosaicing network of constant width (arXiv 2403.12050); left out: U-Net and parallel networks."""

    def __init__(self, bands: int = 16, width: int = 12, depth: int = 3) -> None:
        super().__init__()
        self.head = nn.Conv2d(bands, width, 3, padding=1)
        self.body = nn.Sequential(*(ConvBlock(width) for _ in range(depth)))
        self.tail = nn.Conv2d(width, bands, 3, padding=1)

    def forward(self, cube: Tensor) -> Tensor:
        """Fill a cube [B, 16, H, W] in which every pixel has one measured band and zeros."""
        output: Tensor = self.tail(self.body(self.head(cube)))
        return output


class SelfAttention(nn.Module):
    """Self-attention of the ViT that HMA (arXiv 2310.10909) builds on; left out: dropout."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = (by_heads(part, self.heads) for part in self.qkv(tokens).chunk(3, -1))
        output: Tensor = self.out(merged(F.scaled_dot_product_attention(query, key, value)))
        return output


class ViTBlock(nn.Module):
    """Pre-norm block of the ViT that HMA (arXiv 2310.10909) builds on; left out: dropout."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.norm1(tokens))
        output: Tensor = tokens + self.mlp(self.norm2(tokens))
        return output


class MemoryRead(nn.Module):
    """Attention block by which HMA (arXiv 2310.10909) reads memory slots; left out: dropout and top-k."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.slot_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor, slots: Tensor) -> Tensor:
        query, slots = self.query(self.norm(tokens)), self.slot_norm(slots)
        query, key, value = (by_heads(part, self.heads) for part in (query, self.key(slots), self.value(slots)))
        tokens = tokens + merged(F.scaled_dot_product_attention(query, key, value, scale=tokens.shape[-1] ** -0.5))
        output: Tensor = tokens + self.mlp(self.mlp_norm(tokens))
        return output


class HMAViT(nn.Module):
    """ViT with HMA (arXiv 2310.10909) on its class token; left out: momentum encoder, and writing to the queue."""

    def __init__(
        self, size: int = 16, width: int = 16, depth: int = 3, heads: int = 4, classes: int = 5, label_width: int = 4
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.1 * torch.randn(1, (size // 4) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(ViTBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.labels = nn.Embedding(classes + 1, label_width)  # the last one means that the label is unknown
        self.queue: Tensor
        self.register_buffer("queue", F.normalize(torch.randn(8, width + label_width), dim=1))
        self.read_queue = MemoryRead(width + label_width, heads)
        self.memories = nn.Parameter(torch.zeros(classes, width))
        self.read_batch = MemoryRead(width + label_width, heads)
        self.head = nn.Linear(width + label_width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to logits, which depend on all images of the batch."""
        size = len(images)
        patches = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(size, -1, -1), patches], 1) + self.positions
        features = self.norm(self.blocks(tokens))[:, :1]
        samples = torch.cat([features, self.labels.weight[-1].expand(size, 1, -1)], 2)  # [B, 1, C]
        samples = self.read_queue(samples, torch.cat([samples, self.queue.expand(size, -1, -1)], 1))
        samples = samples.transpose(0, 1)  # [1, B, C]
        memories = torch.cat([self.memories, self.labels.weight[:-1]], 1)
        samples = self.read_batch(samples, torch.cat([samples, memories[None]], 1))
        logits: Tensor = self.head(samples[0])
        return logits


class SpectralNet(nn.Module):
    """Spectral network of ADASR (arXiv 2310.07255): 1x1 convolutions, no shortcut; left out: all its other networks."""

    def __init__(self, channels: int = 4, bands: int = 16, width: int = 12) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 1), nn.LeakyReLU(0.2), nn.Conv2d(width, width, 1), nn.LeakyReLU(0.2)
        )
        self.head = nn.Conv2d(width, bands, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Map multispectral images [B, 4, H, W] to hyperspectral ones [B, 16, H, W]."""
        output: Tensor = self.head(self.layers(images)).sigmoid()
        return output


class Spike(torch.autograd.Function):
    """Step function with the derivative of an arc tangent, as used to train spiking networks (arXiv 2010.14619)."""

    @staticmethod
    def forward(ctx: Any, potential: Tensor) -> Tensor:
        ctx.save_for_backward(potential)
        return (potential >= 0).to(potential.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (potential,) = ctx.saved_tensors
        gradient: Tensor = gradients[0] / (1 + (torch.pi * potential).square())
        return gradient


#: At 1, the weight of a shortcut, only the sign of an untrained branch would matter.
THRESHOLD = 0.5


def fire(potential: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
    """Return the spikes of integrate-and-fire neurons, and their potential after a soft reset."""
    potential = potential + current
    spikes: Tensor = Spike.apply(potential - THRESHOLD)
    return spikes, potential - THRESHOLD * spikes


class SpikingBlock(nn.Module):
    """Residual block of integrate-and-fire neurons, which are those of arXiv 2010.14619; the block is our addition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, spikes: Tensor, inner: Tensor, outer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        between, inner = fire(inner, self.bn1(self.conv1(spikes)))
        fired, outer = fire(outer, self.bn2(self.conv2(between)) + spikes)
        return fired, inner, outer


class SpikingNet(nn.Module):
    """One spiking network of an ensemble (arXiv 2010.14619) with shortcuts of our own; left out: the other members."""

    def __init__(self, width: int = 8, depth: int = 3, steps: int = 4, classes: int = 5) -> None:
        super().__init__()
        self.steps = steps
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.blocks = nn.ModuleList(SpikingBlock(width) for _ in range(depth))
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W], the input current of every time step, to logits, the mean over time."""
        current = self.bn(self.stem(images))
        rest = torch.zeros_like(current)
        potential, potentials = rest, [(rest, rest) for _ in self.blocks]
        logits = []
        for _ in range(self.steps):
            spikes, potential = fire(potential, current)
            for index, block in enumerate(self.blocks):
                spikes, inner, outer = block(spikes, *potentials[index])
                potentials[index] = inner, outer
            logits.append(self.head(spikes.mean((2, 3))))
        return torch.stack(logits).mean(0)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def mosaic() -> Tensor:
    """Return cubes [2, 16, 8, 8] of which a 4x4 pattern of filters has measured one band per pixel."""
    rows, columns = torch.arange(8)[:, None] % 4, torch.arange(8) % 4
    measured: Tensor = (4 * rows + columns) == torch.arange(16)[:, None, None]
    return random(2, 16, 8, 8) * measured


#: Name -> how to build a network, and the arguments of its forward.
RELATED: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "predrnn": (PredRNN, (random(2, 3, 1, 8, 8),)),
    "ccdepth": (CCDepth, (random(2, 3, 16, 16),)),
    "demosaicing": (DemosaicNet, (mosaic(),)),
    "hma": (HMAViT, (random(2, 3, 16, 16),)),
    "adasr": (SpectralNet, (random(2, 4, 8, 8),)),
    "spiking": (SpikingNet, (random(2, 3, 8, 8),)),
}
