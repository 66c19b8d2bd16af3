from pathlib import Path

import numpy as np
import pytest
import torch

from dia_lightning.datamodules import STL10DataModule, stl10
from tests.datamodules.tiny_data import pixels, write_stl10


def test_images_are_upright_and_labels_start_at_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_stl10(tmp_path, stl10._Labelled, monkeypatch)
    data = STL10DataModule(root=str(tmp_path), batch_size=20, num_workers=0, pin_memory=False)
    data.setup("test")
    images, labels, _ = next(iter(data.test_dataloader()))
    stored = pixels(20, 3, 96, 96, seed=20)  # channel, column, row
    np.testing.assert_allclose(data.denormalize(images) * 255, stored.transpose(0, 1, 3, 2), atol=1e-3)
    assert labels.tolist() == [i % 10 for i in range(20)]


def test_unlabelled_images_are_not_needed_and_never_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    folder = write_stl10(tmp_path, stl10._Labelled, monkeypatch)
    assert not (folder / "unlabeled_X.bin").exists()
    data = STL10DataModule(root=str(tmp_path), val_split=10, batch_size=10, num_workers=0, pin_memory=False)
    data.prepare_data()
    data.setup("fit")
    labels = torch.cat([labels for _, labels in data.train_dataloader()])
    assert len(labels) == 30
    assert set(labels.tolist()) == set(range(10))


def test_missing_data_are_explained(tmp_path: Path, no_network: None) -> None:
    data = STL10DataModule(root=str(tmp_path), download=False)
    with pytest.raises(FileNotFoundError, match=r"91f7769df0f17e558f3565bffb0c7dfb.*\$DIA_STL10_URL"):
        data.prepare_data()
