"""Detection from the command line: what is written for a folder of images."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from dia_lightning.tasks import DetectionTask, load_task
from tests.cli.conftest import call
from tests.datamodules.tiny_detection import BCCD_LAYOUT, CATEGORIES, write_coco

CONFIG = {
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 1,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": [
            {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs", "name": "cells"}}
        ],
        "callbacks": [
            {"class_path": "ModelCheckpoint", "init_args": {"filename": "last", "enable_version_counter": False}},
            {"class_path": "DetectionWriter"},
        ],
    },
    "model": {
        "class_path": "DetectionTask",
        "init_args": {
            "detector": "fasterrcnn",
            "backbone": "cifar_resnet",
            "backbone_args": {"depth": 8, "block": "basic", "stem_stride": 4},
            "detector_args": {"min_size": 64, "max_size": 64, "fpn_channels": 16, "representation_size": 32},
            "attention": "dia-lstm",
        },
    },
    "data": {
        "class_path": "CocoDetectionDataModule",
        "init_args": {"root": "cells", "batch_size": 2, "num_workers": 0, **BCCD_LAYOUT},
    },
}


@pytest.fixture
def trained_on_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder in which a detector was trained on categories whose ids have gaps, and a folder of photos."""
    monkeypatch.chdir(tmp_path)
    write_coco(tmp_path / "cells")
    Path("cells.yaml").write_text(yaml.safe_dump(CONFIG))
    Path("photos").mkdir()
    Image.new("RGB", (70, 50), "grey").save("photos/a.png")
    call("fit", "-c", "cells.yaml")
    return tmp_path


def test_a_folder_is_predicted_with_the_ids_of_the_training_file_also_where_that_file_is_not(
    trained_on_cells: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (trained_on_cells / "cells" / "instances_train.json").unlink()
    options = ["--data.root", "elsewhere", "--data.predict_folder", "photos", "--ckpt_path", "last"]
    call("predict", "-c", "cells.yaml", *options)
    run = trained_on_cells / "runs" / "cells" / "version_1"
    named = json.loads((run / "detections.images.json").read_text())
    assert {category["id"]: category["name"] for category in named["categories"]} == CATEGORIES
    found = json.loads((run / "detections.json").read_text())
    assert found
    assert {detection["category_id"] for detection in found} <= set(CATEGORIES)
    assert (run / "pictures" / "predict" / "detections" / "000000_a.png").is_file()


def test_a_checkpoint_knows_the_categories(trained_on_cells: Path) -> None:
    task = load_task(trained_on_cells / "runs" / "cells" / "version_0" / "checkpoints" / "last.ckpt")
    assert isinstance(task, DetectionTask)
    assert task.category_ids == list(CATEGORIES)
    assert task.class_names == list(CATEGORIES.values())
