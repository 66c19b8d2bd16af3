"""Two processes on this CPU train a network with one-block stages exactly as one process does."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dia_lightning.attention import _recalibration as recalibration
from tests.two_processes import run_on_two_processes

from .networks import TinyNet, images, pair

STEPS = 3
NETWORKS: dict[str, dict[str, Any]] = {"plain": {"cells": 1, "plug": None}, "stacked": {"cells": 2, "plug": "11|0|1"}}


def network(cells: int, plug: str | None) -> TinyNet:
    """Return the same network in every process; norms use their running statistics, which DDP does not average."""
    return pair(TinyNet(blocks=(2, 1, 1)).double().eval(), cells=cells, plug=plug, dropout=0.0)[1]


def train(model: nn.Module, samples: slice) -> list[dict[str, torch.Tensor]]:
    """Train for a few steps on some samples of each batch, and return all gradients."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    history = []
    for step in range(STEPS):
        optimizer.zero_grad()
        model(images(8, seed=step)[samples]).square().mean().backward()
        history.append({name: copy.deepcopy(parameter.grad) for name, parameter in model.named_parameters()})
        optimizer.step()
    return history  # type: ignore[return-value]


def run_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.set_num_threads(1)
    recalibration.SMALL_ON_CPU = 0  # as conftest.py does in the process of the tests
    try:
        for name, options in NETWORKS.items():
            model = DistributedDataParallel(network(**options))
            history = train(model, slice(4 * rank, 4 * rank + 4))
            torch.save({"history": history, "weights": model.module.state_dict()}, f"{folder}/{name}-{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the results of training in two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    run_on_two_processes(run_rank, str(folder))
    return folder


@pytest.mark.parametrize("name", NETWORKS)
def test_two_processes_train_one_block_stages_like_one_process(name: str, ranks_folder: Path) -> None:
    first, second = (torch.load(ranks_folder / f"{name}-{rank}.pt") for rank in range(2))
    alone = network(**NETWORKS[name])
    expected = train(alone, slice(None))
    assert expected[-1]["stage3.0.dia.hidden_expand.bias"].abs().max() > 0
    for step in range(STEPS):
        for key, gradient in expected[step].items():
            for ranks in (first, second):
                found = ranks["history"][step][f"module.{key}"]
                torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-12, msg=f"{key}, step {step}")
    for key, value in alone.state_dict().items():
        assert torch.equal(first["weights"][key], second["weights"][key])
        torch.testing.assert_close(first["weights"][key], value, rtol=1e-12, atol=1e-12)
