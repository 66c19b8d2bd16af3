import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision import datasets, transforms

from dia_lightning.datamodules import ImageFolderDataModule
from tests.datamodules.tiny_data import pixels, samples_of, write_image_folder


def _data(root: Path, **options: Any) -> ImageFolderDataModule:
    settings: dict[str, Any] = {"image_size": 16, "batch_size": 4, "num_workers": 0, "pin_memory": False, **options}
    return ImageFolderDataModule(root=str(root), **settings)


def test_evaluation_is_the_usual_one_of_imagenet(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    data = _data(tmp_path, image_size=28)
    data.setup("test")
    steps = [transforms.Resize(32), transforms.CenterCrop(28), transforms.ToTensor()]
    normalize = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    reference = datasets.ImageFolder(str(tmp_path / "test"), transforms.Compose([*steps, normalize]))
    assert reference.classes == data.class_names
    for image, label, index in samples_of(data.test_dataloader()):
        torch.testing.assert_close(image, reference[index][0])
        assert label == reference[index][1]


def test_imagenet_sizes_are_256_and_224() -> None:
    data = ImageFolderDataModule(root="anywhere")
    assert (data.resize_size, data.image_shape) == (256, (3, 224, 224))


def test_images_of_every_kind_make_one_batch(tmp_path: Path) -> None:
    write_image_folder(tmp_path, classes=("ant",))
    folder = tmp_path / "train" / "ant"
    Image.fromarray(pixels(20, 20)).save(folder / "grey.png")
    Image.new("RGBA", (20, 20)).save(folder / "clear.png")
    Image.new("CMYK", (20, 20)).save(folder / "ink.jpg")
    Image.frombytes("I;16", (20, 20), bytes(800)).save(folder / "deep.png")
    Image.new("P", (20, 20)).save(folder / "palette.gif")
    data = _data(tmp_path, batch_size=9)
    data.setup("fit")
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (9, 3, 16, 16)


def test_classes_are_the_folders_of_train_without_dot_folders(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    for split in ("train", "val"):
        (tmp_path / split / ".ipynb_checkpoints").mkdir()
    data = _data(tmp_path)
    assert data.class_names == ["ant", "bee", "cat"]
    data.setup("fit")


def test_files_deeper_in_a_class_folder_belong_to_the_class(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    (tmp_path / "test" / "bee" / "deep").mkdir()
    Image.fromarray(pixels(8, 8)).save(tmp_path / "test" / "bee" / "deep" / "x.png")
    data = _data(tmp_path)
    data.setup()
    assert [label for _, label, _ in samples_of(data.test_dataloader())].count(1) == 5
    assert data.sample_name(8) == str(tmp_path / "test" / "bee" / "deep" / "x.png")


@pytest.mark.parametrize("split", ["val", "test"])
def test_class_missing_from_an_evaluation_split_is_named(tmp_path: Path, split: str) -> None:
    write_image_folder(tmp_path)
    shutil.rmtree(tmp_path / split / "bee")
    with pytest.raises(ValueError, match=rf"{split} lacks class.* bee\.$"):
        _data(tmp_path).setup()


@pytest.mark.parametrize("split", ["val", "test"])
def test_class_unknown_to_train_is_named(tmp_path: Path, split: str) -> None:
    write_image_folder(tmp_path)
    (tmp_path / split / "dog").mkdir()
    with pytest.raises(ValueError, match=rf"{split} has class.* that training did not have: dog"):
        _data(tmp_path).setup()


def test_empty_class_folder_is_named(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    (tmp_path / "train" / "dog").mkdir()
    (tmp_path / "train" / "dog" / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"No image in class folder\(s\) dog"):
        _data(tmp_path, predict_folder=str(tmp_path)).setup("fit")


def test_broken_link_is_found_at_setup(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    (tmp_path / "train" / "ant" / "x.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(FileNotFoundError, match=r"ant.x\.png is a broken link"):
        _data(tmp_path).setup("fit")


def test_missing_train_folder_is_explained(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train is not a folder: expected train/CLASS/IMAGE.*\$DIA_DATA"):
        _ = _data(tmp_path).num_classes
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match="has no class folders"):
        _ = _data(tmp_path).class_names


def test_validation_comes_out_of_train_where_there_is_no_folder_for_it(tmp_path: Path) -> None:
    write_image_folder(tmp_path, splits=("train", "test"))
    data = _data(tmp_path, val_split=0.25)
    data.setup("fit")
    assert len(samples_of(data.train_dataloader())) == 9
    assert [label for _, label, _ in samples_of(data.val_dataloader())] == [0, 1, 2]


def test_split_beside_a_validation_folder_is_refused(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    with pytest.raises(ValueError, match=r"val_split must be 0 beside .*val, got 0\.1"):
        _data(tmp_path, val_split=0.1).setup("fit")


def test_validation_folder_is_tested_on_where_there_is_no_test_folder(tmp_path: Path) -> None:
    write_image_folder(tmp_path, splits=("train", "val"))
    data = _data(tmp_path)
    with pytest.warns(UserWarning, match="the validation part is tested on"):
        data.setup("test")
    assert len(samples_of(data.test_dataloader())) == 12


def test_drawn_validation_part_is_tested_on_where_there_are_only_training_images(tmp_path: Path) -> None:
    write_image_folder(tmp_path, splits=("train",))
    data = _data(tmp_path, val_split=0.25)
    data.setup("fit")
    with pytest.warns(UserWarning, match="the validation part drawn from the training set is tested on"):
        data.setup("test")
    data.setup("predict")
    validated, tested = samples_of(data.val_dataloader()), samples_of(data.test_dataloader())
    assert len(tested) == 3
    assert all(torch.equal(one[0], other[0]) for one, other in zip(validated, tested, strict=True))
    assert data.sample_name(0).startswith(str(tmp_path / "train" / "ant"))


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_nothing_to_evaluate_on_is_explained(tmp_path: Path, stage: str) -> None:
    write_image_folder(tmp_path, splits=("train",))
    with pytest.raises(FileNotFoundError, match=r"neither test/CLASS/IMAGE nor val/CLASS/IMAGE.*set val_split"):
        _data(tmp_path).setup(stage)


def test_checkpoint_keeps_the_class_mapping(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    state = _data(tmp_path).state_dict()
    assert state == {"class_names": ["ant", "bee", "cat"]}
    elsewhere = _data(tmp_path / "no_training_images_here")
    elsewhere.load_state_dict(state)
    assert elsewhere.class_names == ["ant", "bee", "cat"]
    (tmp_path / "train" / "dog").mkdir()
    with pytest.raises(ValueError, match="other classes than the checkpoint: dog"):
        _data(tmp_path).load_state_dict(state)


def test_evaluation_does_without_training_images_once_the_classes_are_known(tmp_path: Path) -> None:
    write_image_folder(tmp_path, splits=("test",))
    data = _data(tmp_path)
    data.trained_classes = ["ant", "bee", "cat"]
    data.setup("test")
    assert [label for _, label, _ in samples_of(data.test_dataloader())] == [0] * 4 + [1] * 4 + [2] * 4
    other = _data(tmp_path)
    other.trained_classes = ["ant", "cat"]
    with pytest.raises(ValueError, match=r"test has class.* that training did not have: bee"):
        other.setup("test")


def test_training_images_count_before_the_classes_of_a_checkpoint(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    data = _data(tmp_path)
    data.trained_classes = ["dog", "eel"]
    assert data.class_names == ["ant", "bee", "cat"]


def test_folder_can_be_predicted_without_training_images(tmp_path: Path) -> None:
    Image.fromarray(pixels(30, 20)).save(tmp_path / "x.png")
    data = _data(tmp_path / "nowhere", predict_folder=str(tmp_path))
    data.setup("predict")
    images, index = next(iter(data.predict_dataloader()))
    assert images.shape == (1, 3, 16, 16)
    assert index.tolist() == [0]


@pytest.mark.parametrize(
    ("options", "message"), [({"image_size": 0}, "image_size must"), ({"resize_size": 8}, "got 8")]
)
def test_impossible_size_is_refused(tmp_path: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _data(tmp_path, **options)
