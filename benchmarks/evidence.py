"""What attention achieves: the same network trained with and without it, within a time budget."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.arms import Build, attached, cifar_resnet
from benchmarks.captured import Loss, backward
from benchmarks.pack_cifar import unpack
from benchmarks.records import Row
from dia_lightning.analysis import MapRecorder, Protocol, map_correlation, mean_correlation

PROTOCOLS: tuple[Protocol, ...] = ("per-image", "pooled", "centred")
MEAN, DEVIATION = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)  # of CIFAR-100's channels
#: Steps of each arm that are timed, three times; number of recordings of the maps.
CALIBRATION, RECORDINGS = 5, 5


@dataclass(frozen=True)
class Data:
    """Images of both splits on the device, bytes ``[N, 3, H, W]``, and their labels."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    name: str


@dataclass(frozen=True)
class Plan:
    """What to train.

    Args:
        depth: of the ResNet.
        batch: images per step.
        seeds: trainings per arm.
        seconds: for all of them together.
        most_epochs: limit per training, regardless of the time left.
        lr: the largest learning rate, after a fifth of the steps.
        mapped: number of test images whose maps are recorded.
    """

    depth: int
    batch: int
    seeds: int
    seconds: float
    most_epochs: int
    lr: float = 0.1
    mapped: int = 500


def load(file: Path, device: torch.device) -> Data:
    """Read the file that ``benchmarks.pack_cifar`` wrote."""
    splits = {
        name: (torch.from_numpy(pixels).to(device), torch.from_numpy(labels).long().to(device))
        for name, (pixels, labels) in unpack(file).items()
    }
    return Data(splits["train"], splits["test"], file.stem)


def noise(device: torch.device) -> Data:
    """Return random images for a dry run."""
    draw = torch.Generator().manual_seed(0)
    splits = [
        (
            torch.randint(256, (number, 3, 16, 16), generator=draw, dtype=torch.uint8).to(device),
            torch.randint(100, (number,), generator=draw).to(device),
        )
        for number in (32, 16)
    ]
    return Data(splits[0], splits[1], "random images")


def evidence_rows(data: Data, plan: Plan) -> Iterator[Row]:
    """Yield accuracies and correlations of SE's maps, seed by seed, and arm by arm within a seed.

    All trainings have the same number of epochs, as many as the time is likely to allow.
    """
    arms = attached(cifar_resnet(depth=plan.depth))
    start = time.monotonic()
    costs = [_costs(build, data, plan, maps=arm.startswith("SE")) for arm, build in arms.items()]
    epoch, beside = (plan.seeds * sum(seconds) for seconds in zip(*costs, strict=True))
    left = plan.seconds - (time.monotonic() - start)
    epochs = min(plan.most_epochs, max(1, int((0.85 * left - beside) / epoch)))
    yield {"data": data.name, "train_images": len(data.train[0]), "test_images": len(data.test[0]), "epochs": epochs}
    for seed in range(plan.seeds):
        for arm, build in arms.items():
            for row in _training(build, data, plan, epochs, seed, maps=arm.startswith("SE")):
                yield {"arm": arm, "seed": seed, "depth": plan.depth, "epochs": epochs, **row}


def _costs(build: Build, data: Data, plan: Plan, *, maps: bool) -> tuple[float, float]:
    """Return the seconds of an epoch, and those of testing and recording maps in a training."""
    training = _Training(build, data, plan, epochs=1, seed=0)
    chosen = torch.arange(plan.batch, device=data.train[0].device) % len(data.train[0])
    steps = _seconds(lambda: training.steps([chosen] * CALIBRATION), data)
    recordings = RECORDINGS * _seconds(training.correlations, data) if maps else 0
    return steps / CALIBRATION * training.steps_per_epoch, _seconds(training.accuracy, data) + recordings


def _seconds(run: Callable[[], object], data: Data) -> float:
    """Return the seconds of a run, the fastest of three: other programs and kernel selection only make it slower."""
    times = []
    for _ in range(3):
        _wait(data)
        start = time.monotonic()
        run()
        _wait(data)
        times.append(time.monotonic() - start)
    return min(times)


def _training(build: Build, data: Data, plan: Plan, epochs: int, seed: int, *, maps: bool) -> Iterator[Row]:
    start = time.monotonic()
    training = _Training(build, data, plan, epochs, seed)
    recorded = {round(part * epochs / (RECORDINGS - 1)) for part in range(RECORDINGS)} if maps else set()
    for epoch in range(epochs + 1):
        if epoch > 0:
            training.epoch()
        if epoch in recorded:
            yield {"epoch": epoch, **training.correlations()}
    accuracy = training.accuracy()
    yield {"accuracy": accuracy, "seconds": time.monotonic() - start, "loss": training.last_loss}


class _Training:
    def __init__(self, build: Build, data: Data, plan: Plan, epochs: int, seed: int) -> None:
        torch.manual_seed(seed)
        device = data.train[0].device
        self.data, self.plan = data, plan
        self.network: nn.Module = build().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.steps_per_epoch = max(1, len(data.train[0]) // plan.batch)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), lr=plan.lr, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        steps = max(epochs * self.steps_per_epoch, 3 * CALIBRATION)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, plan.lr, total_steps=steps, pct_start=0.2, cycle_momentum=False
        )
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=device.type == "cuda")
        self.loss = torch.zeros((), device=device)
        self._backward: Loss | None = None

    @property
    def last_loss(self) -> float | None:
        """Loss of the last step; ``None`` if the training has diverged."""
        loss = float(self.loss)
        return loss if math.isfinite(loss) else None

    def epoch(self) -> None:
        order = torch.randperm(len(self.data.train[0]), device=self.data.train[0].device)
        self.steps(torch.split(order, self.plan.batch)[: self.steps_per_epoch])

    def steps(self, batches: Sequence[Tensor]) -> None:
        for batch in batches:
            self.step(batch)

    def step(self, chosen: Tensor) -> None:
        self.network.train()
        images, labels = normalised(augmented(self.data.train[0][chosen])), self.data.train[1][chosen]
        if self._backward is None:
            self._backward = backward(self.network, self._loss, images, labels)
        self.loss = self._backward(images, labels)
        self.optimizer.step()
        self.schedule.step()

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        with self.autocast():
            return F.cross_entropy(self.network(images), labels)

    def accuracy(self) -> float:
        """Share of test images that are classified correctly."""
        self.network.eval()
        right = 0
        with torch.no_grad(), self.autocast():
            for images, labels in zip(*(torch.split(part, 1000) for part in self.data.test), strict=True):
                right += int((self.network(normalised(images)).argmax(1) == labels).sum())
        return right / len(self.data.test[1])

    def correlations(self) -> Row:
        """Mean correlation between the maps of layers within a stage, by each protocol."""
        self.network.eval()
        images = self.data.test[0][: self.plan.mapped]
        with torch.no_grad(), self.autocast(), MapRecorder(self.network, replicates=0) as recorder:
            for batch in torch.split(images, 250):
                self.network(normalised(batch))
        return {name: mean_correlation(map_correlation(recorder.stages, name)) for name in PROTOCOLS}


def augmented(images: Tensor) -> Tensor:
    """Pad by 4 black pixels and crop, and flip half of the images, all at random ``[B, 3, H, W]``."""
    number, channels, height, width = images.shape
    device = images.device
    down, right = torch.randint(9, (2, number, 1), device=device)
    rows = down + torch.arange(height, device=device)  # [B, H]
    columns = right + torch.arange(width, device=device)  # [B, W]
    columns = torch.where(torch.rand(number, 1, device=device) < 0.5, columns, columns.flip(1))
    which = torch.arange(number, device=device)[:, None, None, None]
    colour = torch.arange(channels, device=device)[None, :, None, None]
    return F.pad(images, (4, 4, 4, 4))[which, colour, rows[:, None, :, None], columns[:, None, None, :]]


def normalised(images: Tensor) -> Tensor:
    """Return bytes as values with mean 0 and deviation 1, channels last."""
    mean, deviation = (torch.tensor(value, device=images.device)[:, None, None] for value in (MEAN, DEVIATION))
    numbers = (images / 255 - mean) / deviation
    return numbers.contiguous(memory_format=torch.channels_last)


def _wait(data: Data) -> None:
    if data.train[0].device.type == "cuda":
        torch.cuda.synchronize()
