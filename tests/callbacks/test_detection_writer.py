import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as reference_masks  # type: ignore[import-untyped]
from pycocotools.coco import COCO  # type: ignore[import-untyped]
from pycocotools.cocoeval import COCOeval  # type: ignore[import-untyped]
from torchmetrics.detection import MeanAveragePrecision

from dia_lightning.callbacks import DetectionWriter, RunSummary
from tests.callbacks.tiny_classifier import TinyData, TinyTask, tiny_trainer
from tests.callbacks.tiny_detector import Detections, TinyDetector, TinyScenes, by_index, detections


def read(path: Path | None) -> Any:
    assert path is not None
    return json.loads(path.read_text())


def predict(folder: Path, writer: DetectionWriter, data: TinyScenes, task: TinyDetector | None = None) -> Any:
    tiny_trainer(folder, writer).predict(task or TinyDetector(), datamodule=data, return_predictions=False)
    return read(writer.path)


def run_test(folder: Path, writer: DetectionWriter, data: TinyScenes, task: TinyDetector | None = None) -> Any:
    tiny_trainer(folder, writer).test(task or TinyDetector(), datamodule=data, verbose=False)
    return read(writer.path)


def test_test_writes_ids_of_the_users_files_boxes_as_xywh_and_every_score(tmp_path: Path) -> None:
    assert run_test(tmp_path, DetectionWriter(), TinyScenes(3)) == [
        {"image_id": 999, "category_id": 17, "bbox": [1.5, 2.0, 5.75, 8.0], "score": 0.875},
        {"image_id": 998, "category_id": 90, "bbox": [1.5, 2.0, 5.75, 9.0], "score": 0.875},
        {"image_id": 998, "category_id": 17, "bbox": [0.0, 0.0, 4.0, 6.0], "score": 0.25},
    ]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["detections.images.json", "detections.json"]


def test_images_and_categories_are_named_beside_it(tmp_path: Path) -> None:
    writer = DetectionWriter(filename="all.json", overlays=False)
    predict(tmp_path, writer, TinyScenes(2, predict_folder="photos"))
    assert read(tmp_path / "all.images.json") == {
        "images": [
            {"id": 1, "file_name": "photos/a/0.jpg", "width": 40, "height": 24},
            {"id": 2, "file_name": "photos/b/0.jpg", "width": 44, "height": 26},
        ],
        "annotations": [],
        "categories": [{"id": 3, "name": "cat"}, {"id": 17, "name": "dog, small"}, {"id": 90, "name": "owl"}],
    }


@pytest.mark.parametrize("samples", [1, 6])
def test_pycocotools_reads_both_files(tmp_path: Path, samples: int) -> None:
    predict(tmp_path, DetectionWriter(), TinyScenes(samples + 1, predict_folder="photos"))
    found = COCO(tmp_path / "detections.images.json").loadRes(str(tmp_path / "detections.json"))
    for index in range(samples + 1):
        expected, entries = by_index(index), found.loadAnns(found.getAnnIds(imgIds=[index + 1]))
        boxes = torch.tensor([entry["bbox"] for entry in entries]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        torch.testing.assert_close(boxes, expected["boxes"])
        assert [entry["score"] for entry in entries] == expected["scores"].tolist()
        names = [found.cats[entry["category_id"]]["name"] for entry in entries]
        assert names == [TinyScenes().class_names[label - 1] for label in expected["labels"].tolist()]


def test_masks_are_run_lengths_that_pycocotools_decodes(tmp_path: Path) -> None:
    data = TinyScenes(2)
    sizes = [(image.shape[1], image.shape[2]) for image in data.images]

    def answer(index: int) -> Detections:
        return detections((2, 3, 9, 8, 1, 0.9), (5, 5, 20, 21, 2, 0.3), masks=sizes[index])

    entries = run_test(tmp_path, DetectionWriter(), data, TinyDetector(answer))
    for number, entry in enumerate(entries):
        expected = answer(number // 2)["masks"][number % 2, 0].numpy() >= 0.5
        assert isinstance(entry["segmentation"]["counts"], str)
        np.testing.assert_array_equal(reference_masks.decode(entry["segmentation"]), expected)


def scattered(index: int, seed: int) -> Detections:
    """Boxes near those of every seed, with random labels and scores."""
    place, noise = (torch.Generator().manual_seed(number) for number in (index, 100 * seed + index))
    corners = torch.rand(8, 2, generator=place) * 20 + torch.randn(8, 2, generator=noise)
    sizes = torch.rand(8, 2, generator=place) * 10 + 5
    labels = torch.randint(1, 4, (8,), generator=place)
    scores = torch.rand(8, generator=noise).sort(descending=True).values
    return {"boxes": torch.cat([corners, corners + sizes], 1), "labels": labels, "scores": scores}


def test_pycocotools_finds_the_map_of_the_detections_in_the_file(tmp_path: Path) -> None:
    data = TinyScenes(8, truth=lambda index: scattered(index, 0))
    run_test(tmp_path, DetectionWriter(), data, TinyDetector(lambda index: scattered(index, 1)))
    truth = read(tmp_path / "detections.images.json")
    for index, target in enumerate(data.targets):
        for (left, top, right, bottom), label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": data.image_id(index),
                    "category_id": data.category_ids[label - 1],
                    "bbox": [left, top, right - left, bottom - top],
                    "area": (right - left) * (bottom - top),
                    "iscrowd": 0,
                }
            )
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    users_file = COCO(tmp_path / "truth.json")
    evaluation = COCOeval(users_file, users_file.loadRes(str(tmp_path / "detections.json")), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    recalls = np.linspace(0, 1, 101).tolist()  # torchmetrics' own are rounded to float32
    metric = MeanAveragePrecision(rec_thresholds=recalls)
    metric.update([scattered(index, 1) for index in range(8)], data.targets)
    assert 0.1 < evaluation.stats[0] < 0.9
    assert float(metric.compute()["map"]) == pytest.approx(evaluation.stats[0], abs=1e-6)


def test_only_scores_from_the_threshold_on_are_written(tmp_path: Path) -> None:
    entries = run_test(tmp_path, DetectionWriter(score_threshold=0.875), TinyScenes(6))
    assert [entry["score"] for entry in entries] == [0.875] * 4


def test_the_task_knows_its_classes_better_than_the_datamodule(tmp_path: Path) -> None:
    task = TinyDetector()
    task.class_names, task.category_ids = ["ant", "bee", "wasp"], [7, 8, 9]
    assert run_test(tmp_path, DetectionWriter(), TinyScenes(2), task)[0]["category_id"] == 8
    assert read(tmp_path / "detections.images.json")["categories"][1] == {"id": 8, "name": "bee"}


def test_without_a_datamodule_images_and_categories_are_numbered(tmp_path: Path) -> None:
    writer = DetectionWriter()
    tiny_trainer(tmp_path, writer).predict(TinyDetector(), TinyScenes(2).predict_dataloader())
    assert [(entry["image_id"], entry["category_id"]) for entry in read(writer.path)] == [(2, 2)]
    assert read(tmp_path / "detections.images.json")["categories"] == [{"id": 2, "name": "2"}]


def test_ids_of_the_folder_to_predict_are_not_given_to_the_test_set(tmp_path: Path) -> None:
    data = TinyScenes(2, predict_folder="photos")
    data.image_id = lambda index: 5  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="Image ids of the test set are not known while predict_folder is set"):
        entries = run_test(tmp_path, DetectionWriter(), data)
    assert entries[0]["image_id"] == 2
    assert read(tmp_path / "detections.images.json")["images"][1]["file_name"] == "test/1"


def test_no_detection_at_all_is_an_empty_list_with_all_images(tmp_path: Path) -> None:
    assert predict(tmp_path, DetectionWriter(), TinyScenes(3), TinyDetector(lambda index: detections())) == []
    assert len(read(tmp_path / "detections.images.json")["images"]) == 3


def test_padding_samples_are_left_out(tmp_path: Path) -> None:
    predict(tmp_path, DetectionWriter(), TinyScenes(6, padding=2))
    assert [image["id"] for image in read(tmp_path / "detections.images.json")["images"]] == [1000, 999, 998, 997]
    assert len(list((tmp_path / "pictures").rglob("*.png"))) == 4


def test_samples_in_any_order_are_sorted(tmp_path: Path) -> None:
    data = TinyScenes(5)
    data.index = torch.tensor([3, 1, 4, 0, 2])
    predict(tmp_path, DetectionWriter(), data)
    images = read(tmp_path / "detections.images.json")["images"]
    assert [image["id"] for image in images] == [1000, 999, 998, 997, 996]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ((1, 2, 3, 4, 1, float("nan")), r"box \[1.0, 2.0, 3.0, 4.0\], score nan"),
        ((1, 2, float("inf"), 4, 1, 0.5), r"box \[1.0, 2.0, inf, 4.0\], score 0.5"),
    ],
)
def test_a_detection_that_is_not_finite_is_refused_with_the_name_of_its_image(
    tmp_path: Path, row: tuple[float, float, float, float, int, float], what: str
) -> None:
    task = TinyDetector(lambda index: detections(row) if index == 3 else by_index(index))
    with pytest.raises(ValueError, match=rf"Sample 3 \(coco/b/1.jpg\) has a detection that is not finite: {what}"):
        predict(tmp_path, DetectionWriter(overlays=False), TinyScenes(6), task)
    assert not (tmp_path / "detections.json").exists()


def test_a_label_beyond_the_classes_is_refused(tmp_path: Path) -> None:
    task = TinyDetector(lambda index: detections((1, 2, 3, 4, 4, 0.5)))
    with pytest.raises(ValueError, match="Label 4 is none of the 3 classes, whose labels are 1 to 3"):
        predict(tmp_path, DetectionWriter(), TinyScenes(2), task)


def test_names_that_do_not_fit_the_category_ids_are_refused(tmp_path: Path) -> None:
    task = TinyDetector()
    task.class_names = ["ant"]
    with pytest.raises(ValueError, match="There are 1 class_names and 3 category_ids"):
        predict(tmp_path, DetectionWriter(), TinyScenes(2), task)


def test_a_classifier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"'detections': list of B dicts} .* but returned \['index', 'probabilities'\]"
    ):
        tiny_trainer(tmp_path, DetectionWriter()).predict(TinyTask(), datamodule=TinyData())


def test_boxes_and_scores_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    wrong = {"boxes": torch.zeros(2, 4), "labels": torch.ones(2).long(), "scores": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"must be boxes \[N, 4\], .* but are {'boxes': \[2, 4\], 'labels': \[2\]"):
        predict(tmp_path, DetectionWriter(), TinyScenes(2), TinyDetector(lambda index: wrong))


def test_a_second_run_in_the_same_folder_overwrites_nothing(tmp_path: Path) -> None:
    predict(tmp_path, DetectionWriter(), TinyScenes(2))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    writer = DetectionWriter()
    predict(tmp_path, writer, TinyScenes(3), TinyDetector(lambda index: by_index(index + 1)))
    assert writer.path == tmp_path / "detections-v1.json"
    assert all(path.read_bytes() == content for path, content in before.items())
    assert len(list((tmp_path / "pictures" / "predict" / "detections-v1").iterdir())) == 3
    assert len(read(tmp_path / "detections-v1.images.json")["images"]) == 3


def test_an_interrupted_run_keeps_its_images_and_the_next_run_leaves_them(tmp_path: Path) -> None:
    writer = DetectionWriter()
    with (
        pytest.warns(UserWarning, match=r"The detections are not complete; .* are in .*detections.part0.jsonl"),
        pytest.raises(RuntimeError, match="stop here"),
    ):
        predict(tmp_path, writer, TinyScenes(6), TinyDetector(stop_at=5))
    part = tmp_path / "detections.part0.jsonl"
    assert [json.loads(line)["index"] for line in part.read_text().splitlines()] == [0, 1, 2, 3]
    predict(tmp_path, writer, TinyScenes(2))
    assert writer.path == tmp_path / "detections-v1.json"
    assert len(part.read_text().splitlines()) == 4


def test_predict_draws_every_image_in_its_own_size_and_files_of_one_name_apart(tmp_path: Path) -> None:
    data = TinyScenes(4, predict_folder="photos")
    predict(tmp_path, DetectionWriter(), data)
    pictures = sorted((tmp_path / "pictures" / "predict" / "detections").iterdir())
    assert [path.name for path in pictures] == ["000000_0.png", "000001_0.png", "000002_1.png", "000003_1.png"]
    for path, image in zip(pictures, data.images, strict=True):
        with Image.open(path) as picture:
            assert picture.size == (image.shape[2], image.shape[1])


@pytest.mark.parametrize(("threshold", "is_drawn"), [(0.875, True), (0.9, False)])
def test_overlays_show_detections_from_their_own_threshold_on(tmp_path: Path, threshold: float, is_drawn: bool) -> None:
    data = TinyScenes(2)
    predict(tmp_path, DetectionWriter(score_threshold=0.9, overlay_threshold=threshold), data)
    with Image.open(tmp_path / "pictures" / "predict" / "detections" / "000001_0.png") as picture:
        plain = (data.images[1].permute(1, 2, 0) * 255).round().byte().numpy()
        assert (np.asarray(picture) != plain).any() == is_drawn


def test_overlays_can_be_left_out_and_test_draws_none(tmp_path: Path) -> None:
    predict(tmp_path, DetectionWriter(overlays=False), TinyScenes(2))
    run_test(tmp_path, DetectionWriter(), TinyScenes(2))
    assert not (tmp_path / "pictures").exists()


def test_a_long_file_name_is_shortened(tmp_path: Path) -> None:
    data = TinyScenes(1)
    data.sample_name = lambda index: "ü" * 120 + ".jpg"  # type: ignore[method-assign]
    predict(tmp_path, DetectionWriter(), data)
    assert len(list((tmp_path / "pictures").rglob("000000_ü*.png"))) == 1


def test_a_picture_that_cannot_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "pictures").write_text("a file in the way")
    with pytest.warns(UserWarning, match=r"000001_0.png was not written"):
        assert len(predict(tmp_path, DetectionWriter(), TinyScenes(2))) == 1


def test_the_summary_names_the_detections(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = tiny_trainer(tmp_path, RunSummary(), DetectionWriter())
    trainer.predict(TinyDetector(), datamodule=TinyScenes(2), return_predictions=False)
    assert f"detections: {tmp_path / 'detections.json'}\n" in capsys.readouterr().out.replace(":  ", ": ")


@pytest.mark.parametrize("filename", ["", ".json", "all.csv", "../all.json"])
def test_a_filename_that_is_no_plain_json_name_is_refused(filename: str) -> None:
    with pytest.raises(ValueError, match=r"filename must be a plain name that ends in '\.json'"):
        DetectionWriter(filename=filename)


@pytest.mark.parametrize("option", ["score_threshold", "overlay_threshold"])
def test_a_threshold_in_percent_is_refused(option: str) -> None:
    with pytest.raises(ValueError, match=rf"{option} must be from 0 to 1, got 50"):
        DetectionWriter(**{option: 50})  # type: ignore[arg-type]


def test_the_callback_can_be_copied_and_pickled() -> None:
    writer = DetectionWriter(filename="all.json")
    assert copy.deepcopy(writer).filename == pickle.loads(pickle.dumps(writer)).filename == "all.json"


TWO_PROCESSES = """
import sys
from pathlib import Path
from dia_lightning.callbacks import DetectionGrid, DetectionWriter, RunSummary
from tests.callbacks.tiny_classifier import tiny_trainer
from tests.callbacks.tiny_detector import TinyDetector, TinyScenes

callbacks = [DetectionGrid(num_images=2), DetectionWriter(), RunSummary()]
trainer = tiny_trainer(Path(sys.argv[1]), *callbacks, devices=2, strategy="ddp_fork")
task, data = TinyDetector(), TinyScenes(7)
trainer.fit(task, datamodule=data)
trainer.test(task, datamodule=data, verbose=False)
trainer.predict(task, datamodule=data, return_predictions=False)
"""


def test_two_processes_write_each_image_once(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", TWO_PROCESSES, str(tmp_path)]
    printed = subprocess.check_output(command, env=environment, cwd=tmp_path, text=True, timeout=200)
    alone = tmp_path / "alone"
    assert read(tmp_path / "detections.json") == run_test(alone, DetectionWriter(), TinyScenes(7))
    for name in ("detections", "detections-v1"):
        assert read(tmp_path / f"{name}.images.json") == read(alone / "detections.images.json")
    assert read(tmp_path / "detections-v1.json") == read(alone / "detections.json")
    assert not list(tmp_path.glob("*.part*"))
    assert len(list((tmp_path / "pictures" / "predict" / "detections-v1").iterdir())) == 7
    assert len(list((tmp_path / "pictures").rglob("step=*.png"))) == 2
    assert printed.count("detections-v1.json") == 1
