"""A detector that answers by rote and a datamodule of a few kilobytes that keep the contracts the callbacks rely on."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

NAMES = ["cat", "dog, small", "owl"]
CATEGORY_IDS = [3, 17, 90]
Detections = dict[str, Tensor]


def detections(
    *rows: tuple[float, float, float, float, int, float], masks: tuple[int, int] | None = None
) -> Detections:
    """Detections of one image from rows (x1, y1, x2, y2, label, score); with `masks` [H, W] each box is filled."""
    values = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    found = {"boxes": values[:, :4], "labels": values[:, 4].long(), "scores": values[:, 5]}
    if masks is not None:
        found["masks"] = torch.full((len(rows), 1, *masks), 0.25)
        for mask, row in zip(found["masks"], rows, strict=True):
            left, top, right, bottom = (int(edge) for edge in row[:4])
            mask[:, top:bottom, left:right] = 0.75
    return found


def by_index(index: int) -> Detections:
    """No, one or two detections that follow from the index."""
    rows = [(1.5, 2.0, 7.25, 9.0 + index, 1 + index % 3, 0.875), (0.0, 0.0, 4.0, 6.0, 2, 0.25)]
    return detections(*rows[: index % 3])


class TinyDetector(LightningModule):
    """Answers with what `answer` says about an index."""

    def __init__(self, answer: Callable[[int], Detections] = by_index, stop_at: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.class_names: list[str] | None = None
        self.category_ids: list[int] | None = None
        self.answer = answer
        self.stop_at = stop_at

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.weight**2

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return self.predict_step((batch[0], batch[2]), batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return self.predict_step((batch[0], batch[2]), batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        _, index = batch
        if self.stop_at is not None and self.stop_at in index:
            raise RuntimeError("stop here")
        return {"index": index, "detections": [self.answer(max(int(i), 0)) for i in index]}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class _Scenes(Dataset[tuple[Any, ...]]):
    def __init__(self, data: "TinyScenes") -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data.images)

    def __getitem__(self, row: int) -> tuple[Any, ...]:
        return self.data.images[row], self.data.targets[row], int(self.data.index[row])


class TinyScenes(LightningDataModule):
    """Images of different sizes whose objects are those that `truth` says.

    With `padding`, the last samples of val, test and predict carry the index -1.
    """

    def __init__(
        self,
        samples: int = 6,
        *,
        padding: int = 0,
        batch_size: int = 2,
        predict_folder: str | None = None,
        truth: Callable[[int], Detections] = by_index,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.images = [torch.rand(3, 24 + 2 * i, 40 + 4 * (i % 2), generator=generator) for i in range(samples)]
        self.targets = []
        for i in range(samples):
            target = truth(i)
            target["iscrowd"] = torch.zeros(len(target.pop("scores")), dtype=torch.int64)
            if "masks" in target:
                target["masks"] = (target["masks"][:, 0] >= 0.5).byte()
            self.targets.append(target)
        self.index = torch.arange(samples)
        self.index[samples - padding :] = -1
        self.batch_size = batch_size
        self.predict_folder = predict_folder
        self.class_names = NAMES
        self.category_ids = CATEGORY_IDS

    def sample_name(self, index: int) -> str:
        return f"{self.predict_folder or 'coco'}/{'ab'[index % 2]}/{index // 2}.jpg"

    def image_id(self, index: int) -> int:
        return index + 1 if self.predict_folder else 1000 - index

    def _loader(self, *columns: int) -> DataLoader[tuple[Any, ...]]:
        def collate(samples: list[tuple[Any, ...]]) -> tuple[Any, ...]:
            images, targets, index = zip(*samples, strict=True)
            every = (list(images), list(targets), torch.tensor(index))
            return tuple(every[column] for column in columns)

        return DataLoader(_Scenes(self), batch_size=self.batch_size, collate_fn=collate)

    def train_dataloader(self) -> DataLoader[tuple[Any, ...]]:
        return self._loader(0, 1)

    def val_dataloader(self) -> DataLoader[tuple[Any, ...]]:
        return self._loader(0, 1, 2)

    def test_dataloader(self) -> DataLoader[tuple[Any, ...]]:
        return self._loader(0, 1, 2)

    def predict_dataloader(self) -> DataLoader[tuple[Any, ...]]:
        return self._loader(0, 2)
