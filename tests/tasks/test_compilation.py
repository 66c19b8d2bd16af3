"""`compile` of the tasks: what is compiled, that it trains the same weights, and that nothing falls back to eager."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from dia_lightning.attention import attach
from dia_lightning.callbacks import EMA
from dia_lightning.models import get_model
from dia_lightning.tasks import ClassificationTask, DIATask, load_task
from tests.tasks.conftest import Given, small_trainer
from tests.tasks.test_diffusion import some_batch
from tests.tasks.test_diffusion import tiny_task as tiny_diffusion
from tests.tasks.tiny_detection import BACKBONE, training_batch
from tests.tasks.tiny_detection import tiny_task as tiny_detection

Graphs = list[torch.fx.GraphModule]


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    """The graphs that are made, run by torch without a compiler; a fall back to no graphs at all is an error."""
    made: Graphs = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        made.append(graph)
        return graph.forward

    torch._dynamo.reset()
    config: Any = torch._dynamo.config
    limits = config.patch(recompile_limit=8, accumulated_recompile_limit=256, fail_on_recompile_limit_hit=True)
    with limits, torch.compiler.set_stance(force_backend=keep):
        yield made
    torch._dynamo.reset()


def classifier(**options: Any) -> ClassificationTask:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"attention": "dia-lstm", "lr": 0.05, **options}
    return ClassificationTask("cifar_resnet", 10, backbone_args={"depth": 8, "block": "basic"}, **arguments)


def labelled(count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(count)), torch.arange(count) % 10


def compiled_in(task: nn.Module) -> list[str]:
    return [name for name, module in task.named_modules() if module._compiled_call_impl is not None]


def trained(task: DIATask, batches: list[Any], folder: Path, **options: Any) -> dict[str, Tensor]:
    """Returns the weights in the checkpoint."""
    trainer = small_trainer(folder, **options)
    trainer.fit(task, Given(batches), ckpt_path=folder / "last.ckpt" if trainer.max_epochs == 2 else None)
    trainer.save_checkpoint(folder / "last.ckpt")
    state: dict[str, Tensor] = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    return state


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=key)


def diffusion(**options: Any) -> DIATask:
    network = {"block_out_channels": [8], "layers_per_block": 1, "norm_num_groups": 4}
    return tiny_diffusion(conditional=True, backbone_args=network, **options)


CASES: list[tuple[Callable[..., DIATask], Any, Any, list[str]]] = [
    (classifier, "blocks", labelled(4), ["backbone.layer1.0", "backbone.layer2.0", "backbone.layer3.0"]),
    (tiny_detection, True, training_batch(1, 2), ["detector.backbone"]),
    (diffusion, True, some_batch(4), ["backbone"]),
]


@pytest.mark.parametrize(("new", "compile", "batch", "parts"), CASES, ids=["classification", "detection", "diffusion"])
def test_a_compiled_task_trains_the_same_weights(
    tmp_path: Path, graphs: Graphs, new: Callable[..., DIATask], compile: Any, batch: Any, parts: list[str]
) -> None:
    batches = [batch, batch]
    expected = trained(new(), batches, tmp_path, limit_val_batches=0)
    assert not graphs
    task = new(compile=compile)
    assert compiled_in(task) == parts
    assert_same(trained(task, batches, tmp_path, limit_val_batches=0), expected)
    assert len(graphs) == len(parts)  # and no pieces of graphs


@pytest.mark.parametrize("compiled", ["first", "resumed"])
def test_a_run_goes_on_compiled_otherwise(tmp_path: Path, graphs: Graphs, compiled: str) -> None:
    batches = [labelled(4)]
    states = []
    for first, then in ((False, False), ("blocks", False) if compiled == "first" else (False, "blocks")):
        for epochs, compile in ((1, first), (2, then)):
            callbacks = [EMA(decay=0.5)]  # which copies the task
            task = classifier(attention=None, compile=compile)
            state = trained(task, batches, tmp_path, max_epochs=epochs, limit_val_batches=0, callbacks=callbacks)
        states.append(state)
    assert_same(states[1], states[0])
    assert len(graphs) == 3


def test_a_task_that_is_loaded_to_be_looked_at_is_not_compiled(tmp_path: Path) -> None:
    task, trainer = classifier(compile="blocks"), small_trainer(tmp_path, max_epochs=0, limit_val_batches=0)
    trainer.fit(task, Given([labelled(4)]))
    trainer.save_checkpoint(tmp_path / "kept.ckpt")
    loaded = load_task(tmp_path / "kept.ckpt")
    assert compiled_in(loaded) == []
    again = ClassificationTask.load_from_checkpoint(tmp_path / "kept.ckpt", weights_only=True)
    assert (again.hparams["compile"], compiled_in(again)) == ("blocks", compiled_in(task))
    assert compiled_in(task) != []
    assert_same(loaded.state_dict(), task.state_dict())


def test_a_copy_is_compiled_when_a_trainer_runs_it(tmp_path: Path) -> None:
    task = copy.deepcopy(classifier(compile=True))  # as a process that is spawned gets one
    assert compiled_in(task) == []
    small_trainer(tmp_path, max_epochs=0, limit_val_batches=0).fit(task, Given([labelled(4)]))
    assert compiled_in(task) == ["backbone"]


def test_no_graph_is_missing_for_a_limit_of_torch(graphs: Graphs) -> None:
    task = classifier(attention=None, compile="blocks")
    for training in (True, False):
        for count in (4, 3, 1):
            with torch.set_grad_enabled(training):
                task.train(training)(labelled(count + training)[0])
    assert 8 < len(graphs) <= 15  # three kinds of blocks


@pytest.mark.parametrize("options", [{"attention": "se"}, {"attention": "dia-lstm", "plug": "10|01|11"}])
def test_the_plain_arm_has_the_same_blocks_compiled(options: dict[str, Any]) -> None:
    network: dict[str, Any] = {"backbone_args": {"depth": 14, "block": "basic"}, "compile": "blocks"}
    plain, attached = (ClassificationTask("cifar_resnet", 10, **network, **one) for one in ({}, options))
    blocks = [f"backbone.layer{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1)]
    assert compiled_in(plain) == compiled_in(attached) == blocks
    own = attach(get_model("cifar_resnet", depth=14, block="basic", num_classes=10), "se")
    assert compiled_in(ClassificationTask(own, 10, compile="blocks")) == blocks
    detector = tiny_detection(backbone_args={**BACKBONE, "depth": 14}, compile="blocks")
    assert compiled_in(detector) == [name.replace("backbone", "detector.backbone.body") for name in blocks]
    assert len(compiled_in(diffusion(compile="blocks"))) == 5


def test_what_cannot_be_compiled_is_said() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 10))
    message = r"compile='blocks' finds no residual block in this Sequential\. Compile it as a whole: compile=True"
    with pytest.raises(ValueError, match=message):
        ClassificationTask(network, 10, image_shape=[3, 4, 4], compile="blocks")
    for new in (classifier, tiny_detection, diffusion):
        with pytest.raises(ValueError, match="compile must be False, True or 'blocks', got 'bloks'"):
            new(compile="bloks")


@pytest.mark.slow
def test_blocks_that_are_really_compiled_compute_the_same() -> None:
    torch._dynamo.reset()
    images, labels = labelled(4)
    found: list[dict[str, Tensor]] = []
    for compile in (False, "blocks"):
        torch.manual_seed(0)
        blocks = (BasicBlock(4, 4), BasicBlock(4, 4))  # two graphs
        network = nn.Sequential(nn.Conv2d(3, 4, 1), *blocks, nn.Flatten(), nn.Linear(4 * 8 * 8, 10))
        task = ClassificationTask(network, 10, image_shape=[3, 8, 8], attention="dia-lstm", compile=compile)
        assert len(compiled_in(task)) == (2 if compile else 0)
        loss = nn.functional.cross_entropy(task(images), labels)
        names, weights = zip(*task.named_parameters(), strict=True)
        found.append(dict(zip(names, torch.autograd.grad(loss, weights), strict=True)))
    assert_same(found[1], found[0])
