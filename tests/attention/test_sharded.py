"""Two processes that share or shard an attached network train like one process."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from dia_lightning.attention import AttentionUnit, attach
from dia_lightning.attention import _recalibration as recalibration
from tests.two_processes import run_on_two_processes

WAYS = (
    "ddp",
    "fsdp of the root",
    "fsdp of blocks and units",
    "fully_shard of the root",
    "fully_shard of blocks and units",
)


def network() -> nn.Module:
    torch.manual_seed(0)
    plain: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, embed_dim=32, num_heads=2, num_classes=4
    )
    return attach(plain, "dia-lstm").double()


def losses(model: nn.Module, rank: int | None = None) -> list[float]:
    """Train four steps and return the loss of each whole batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(1)
    seen = []
    for _ in range(4):
        images = torch.randn(4, 3, 32, 32, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, 4, (4,), generator=generator)
        mine = slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)
        loss: Tensor = F.cross_entropy(model(images[mine]), labels[mine])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        mean = loss.detach().clone()
        if rank is not None:
            dist.all_reduce(mean)
            mean /= 2
        seen.append(mean.item())
    return seen


def distributed(way: str) -> nn.Module:
    model: Any = network()
    if way == "ddp":
        return DistributedDataParallel(model)
    if way.startswith("fsdp"):
        policy = ModuleWrapPolicy({type(model.blocks[0]), AttentionUnit}) if "blocks" in way else None
        return FullyShardedDataParallel(
            model, device_id=torch.device("cpu"), use_orig_params=True, auto_wrap_policy=policy
        )
    mesh = init_device_mesh("cpu", (2,))
    if "blocks" in way:
        for module in (model.blocks[0].dia, *model.blocks):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return nn.Sequential(model)


def run_rank(rank: int, folder: str, way: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.set_num_threads(1)
    recalibration.SMALL_ON_CPU = 0  # as conftest.py does in the process of the tests
    try:
        model = distributed(way)
        results: dict[str, Any] = {"losses": losses(model, rank)}
        if way.startswith("fsdp"):
            # Without offloading, which crashes on the CPU in torch 2.11.
            with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT):
                results["weights"] = model.state_dict()
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("way", WAYS)
def test_losses_and_weights_are_those_of_one_process(way: str, tmp_path: Path) -> None:
    run_on_two_processes(run_rank, str(tmp_path), way)
    results = torch.load(tmp_path / "0.pt")
    alone = network()
    assert results["losses"] == pytest.approx(losses(alone), rel=1e-10)
    if "weights" in results:  # gathered, under the names of the network that is not sharded
        assert set(results["weights"]) == set(alone.state_dict())
        for key, value in alone.state_dict().items():
            torch.testing.assert_close(results["weights"][key], value, rtol=1e-8, atol=1e-10)
