"""The loss of a batch as evaluation sees it, of every task."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dia_lightning.datamodules import DigitsDataModule
from dia_lightning.tasks import ClassificationTask, DetectionTask, DIATask, DiffusionTask
from tests.tasks.conftest import small_task
from tests.tasks.tiny_detection import tiny_batch, tiny_task

UNET: dict[str, Any] = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "dropout": 0.5}


def classifier(**options: Any) -> ClassificationTask:
    torch.manual_seed(0)
    return small_task(**options)


def diffusion(**options: Any) -> DiffusionTask:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"backbone_args": UNET, "attention": "dia-lstm", "image_shape": [1, 8, 8], **options}
    return DiffusionTask("unet", arguments.pop("num_classes", 10), **arguments)


def batch_of(task: DIATask) -> Any:
    if isinstance(task, DetectionTask):
        return tiny_batch(2, 0, 3)
    options: dict[str, Any] = {"channels": 1, "pixel_range": "symmetric"} if isinstance(task, DiffusionTask) else {}
    data = DigitsDataModule(image_size=8, batch_size=5, limit=20, **options)
    return next(iter(data.evaluation_dataloader("test", count=5)))


TASKS = [
    pytest.param(classifier, id="classification"),
    pytest.param(diffusion, id="diffusion"),
    *(pytest.param(lambda name=name: tiny_task(name), id=name) for name in ("fasterrcnn", "retinanet", "fcos")),
]


@pytest.mark.parametrize("make", TASKS)
def test_the_loss_is_the_same_at_every_call_and_leaves_nothing_behind(make: Any) -> None:
    task = make().eval()
    batch = batch_of(task)
    state = {name: value.clone() for name, value in task.state_dict().items()}
    random = torch.get_rng_state()
    first = task.evaluation_loss(batch)
    assert torch.equal(torch.get_rng_state(), random)
    torch.manual_seed(1)
    assert torch.equal(task.evaluation_loss(batch), first)
    assert first.shape == ()
    assert first > 0
    assert not any(module.training for module in task.modules())
    assert all(torch.equal(value, state[name]) for name, value in task.state_dict().items())


@pytest.mark.parametrize("make", TASKS)
def test_every_weight_of_the_network_gets_a_gradient(make: Any) -> None:
    task = make().eval()
    task.evaluation_loss(batch_of(task)).backward()
    network: Any = task.detector.backbone if isinstance(task, DetectionTask) else task.backbone
    without = [name for name, weight in network.named_parameters() if weight.grad is None]
    assert without == []


def test_that_of_a_classifier_is_a_sum_over_images_without_smoothing() -> None:
    task = classifier(label_smoothing=0.3).eval()
    images, labels, index = batch_of(task)
    whole = task.evaluation_loss((images, labels, index))
    parts = [task.evaluation_loss((images[i : i + 1], labels[i : i + 1])) for i in range(len(images))]
    assert whole.item() == pytest.approx(sum(part.item() for part in parts), rel=1e-5)
    assert whole.item() == pytest.approx(len(images) * F.cross_entropy(task(images), labels).item(), rel=1e-5)


@pytest.mark.parametrize("conditional", [False, True])
def test_that_of_a_diffusion_task_has_the_noise_of_its_validation(conditional: bool) -> None:
    task = diffusion(conditional=conditional).eval()
    images, labels, index = batch_of(task)
    noise, timesteps = task.evaluation_noise(images, index)
    noisy = task.noise.add_noise(images, noise, timesteps)
    predicted = task(noisy, timesteps, labels)
    wanted = (predicted - noise).square().flatten(1).mean(1).sum()  # the target of epsilon is the noise
    torch.testing.assert_close(task.evaluation_loss((images, labels, index)), wanted)
    part = task.evaluation_loss((images[3:], labels[3:], index[3:])) + task.evaluation_loss(
        (images[:3], labels[:3], index[:3])
    )
    torch.testing.assert_close(part, wanted)


def test_that_of_a_diffusion_task_refuses_other_pixels() -> None:
    with pytest.raises(ValueError, match=r"must be in \[-1, 1\]"):
        diffusion().eval().evaluation_loss((torch.full((2, 1, 8, 8), 3.0), torch.zeros(2, dtype=torch.int64)))


def test_that_of_a_detector_is_torchvisions_sum_of_losses_times_the_images() -> None:
    task = tiny_task("retinanet", attention=None).eval()  # draws nothing
    images, targets, _ = tiny_batch(2, 3)
    found = task.evaluation_loss((images, targets))
    norms = [module for module in task.detector.modules() if isinstance(module, nn.BatchNorm2d)]
    task.train()
    for norm in norms:
        norm.eval()
    transform: Any = task.detector.transform
    transform.eval()
    parts: list[Tensor] = list(task.losses(images, [{n: t[n] for n in ("boxes", "labels")} for t in targets]).values())
    assert found.item() == pytest.approx(2 * sum(part.item() for part in parts), rel=1e-5)


def test_a_task_without_one_says_so() -> None:
    with pytest.raises(ValueError, match=r"DIATask has no evaluation_loss, which an analysis needs\. Define it"):
        DIATask().evaluation_loss(None)
