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
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from dia_lightning.attention import AttentionUnit, attach

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


def run_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.set_num_threads(1)
    try:
        results: dict[str, Any] = {}
        for way in WAYS:
            model = distributed(way)
            results[way] = losses(model, rank)
            if way.startswith("fsdp"):
                config = FullStateDictConfig(offload_to_cpu=True)
                with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, config):
                    results[f"weights of {way}"] = model.state_dict()
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sharded")
    spawn(run_rank, (str(folder),), nprocs=2)  # type: ignore[no-untyped-call]
    first: dict[str, Any] = torch.load(Path(folder) / "0.pt")
    return first


@pytest.mark.parametrize("way", WAYS)
def test_losses_are_those_of_one_process(way: str, results: dict[str, Any]) -> None:
    assert results[way] == pytest.approx(losses(network()), rel=1e-10)


@pytest.mark.parametrize("way", [way for way in WAYS if way.startswith("fsdp")])
def test_the_gathered_weights_have_the_names_of_the_unsharded_network(way: str, results: dict[str, Any]) -> None:
    alone = network()
    losses(alone)
    weights = results[f"weights of {way}"]
    assert set(weights) == set(alone.state_dict())
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(weights[key], value, rtol=1e-8, atol=1e-10)
