import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.connectors import data_connector
from lightning.pytorch.utilities.parsing import lightning_getattr, lightning_setattr
from PIL import Image

from dia_lightning.datamodules import (
    CIFAR10DataModule,
    ClassificationDataModule,
    DigitsDataModule,
    FashionMNISTDataModule,
    ImageFolderDataModule,
    SampleError,
)
from tests.datamodules.conftest import Kind
from tests.datamodules.tiny_data import pixels, pretend_ranks, samples_of, write_fashion_mnist

COMMON = {
    "root": None,
    "batch_size": 128,
    "eval_batch_size": None,
    "num_workers": None,
    "pin_memory": None,
    "split_seed": 42,
    "augment": "basic",
    "mixup": 0.0,
    "cutmix": 0.0,
    "sampling": "shuffle",
    "drop_last": True,
    "limit": None,
    "download": True,
    "predict_folder": None,
    "bit_depth": 16,
}
VAL_SPLITS = {"DigitsDataModule": 250, "FashionMNISTDataModule": 5000, "STL10DataModule": 500}


def _make(kind: Kind, **options: Any) -> ClassificationDataModule:
    """Build a data module that fits the tiny data."""
    if kind.__name__ == "STL10DataModule":
        options.setdefault("val_split", 10)
    return kind(**{"batch_size": 4, "num_workers": 0, "pin_memory": False, **options})


def _tiny(**options: Any) -> DigitsDataModule:
    return DigitsDataModule(**{"image_size": 8, "channels": 1, "batch_size": 16, "pin_memory": False, **options})


# Every data module


@pytest.mark.filterwarnings("ignore:val_split=0")
def test_batches_keep_the_contract(any_kind: Kind, no_network: None) -> None:
    data = _make(any_kind)
    data.prepare_data()
    data.setup()
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (4, *data.image_shape)
    assert images.dtype == torch.float32
    assert labels.shape == (4,)
    assert labels.dtype == torch.int64
    for loader in (data.val_dataloader(), data.test_dataloader()):
        images, labels, index = next(iter(loader))
        assert images.shape == (4, *data.image_shape)
        assert index.tolist() == [0, 1, 2, 3]
        assert index.dtype == torch.int64
        assert 0 <= labels.min() <= labels.max() < data.num_classes
    images, index = next(iter(data.predict_dataloader()))
    assert images.shape == (4, *data.image_shape)
    assert index.tolist() == [0, 1, 2, 3]


def test_facts_are_known_right_after_construction(any_kind: Kind) -> None:
    data = _make(any_kind)
    assert len(set(data.class_names)) == data.num_classes
    assert len(data.mean) == len(data.std) == data.image_shape[0]


@pytest.mark.filterwarnings("ignore:val_split=0")
def test_denormalize_inverts_the_normalisation(any_kind: Kind) -> None:
    data = _make(any_kind)
    data.setup("validate")
    images = next(iter(data.val_dataloader()))[0]
    restored = data.denormalize(images)
    torch.testing.assert_close((restored * 255).round() / 255, restored, atol=1e-5, rtol=0)
    mean, std = (torch.tensor(v)[:, None, None] for v in (data.mean, data.std))
    torch.testing.assert_close((restored - mean) / std, images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("augment", ["none", "flips", "basic", "auto", "strong"])
@pytest.mark.filterwarnings("ignore:val_split=0")
def test_every_augmentation_gives_images_of_the_right_shape(any_kind: Kind, augment: str) -> None:
    data = _make(any_kind, augment=augment)
    data.setup("fit")
    for _, (images, _) in zip(range(3), data.train_dataloader(), strict=False):
        assert images.shape == (4, *data.image_shape)
        assert images.isfinite().all()


def test_command_line_shows_every_argument(any_kind: Kind) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(any_kind, "data")
    defaults = parser.get_defaults().data.as_dict()
    assert defaults.items() >= COMMON.items()
    assert defaults["val_split"] == VAL_SPLITS.get(any_kind.__name__, 0)
    with pytest.raises(jsonargparse.ArgumentError, match="batch_size"):
        parser.parse_args(["--data.batch_size=many"])
    assert parser.parse_args(["--data.val_split=0.25"]).data.val_split == 0.25
    assert isinstance(parser.parse_args(["--data.val_split=25"]).data.val_split, int)


def test_hyperparameters_load_without_running_code(any_kind: Kind) -> None:
    data = _make(any_kind, limit=3)
    file = io.BytesIO()
    torch.save({"hparams": dict(data.hparams), "state": data.state_dict()}, file)
    file.seek(0)
    hparams = torch.load(file, weights_only=True)["hparams"]
    assert hparams["limit"] == 3
    assert set(hparams) >= {*COMMON, "val_split"}


def test_paths_and_numbers_of_numpy_load_without_running_code(any_kind: Kind, tmp_path: Path) -> None:
    numbers = {"batch_size": np.int64(4), "mixup": np.float32(0.5), "val_split": np.float64(0.5)}
    data = _make(any_kind, root=tmp_path, predict_folder=tmp_path / "photos", **numbers)
    file = io.BytesIO()
    torch.save({"hparams": dict(data.hparams), "image_shape": data.image_shape}, file)
    file.seek(0)
    hparams = torch.load(file, weights_only=True)["hparams"]
    assert (hparams["root"], hparams["predict_folder"]) == (str(tmp_path), str(tmp_path / "photos"))
    assert {name: hparams[name] for name in numbers} == {"batch_size": 4, "mixup": 0.5, "val_split": 0.5}


def test_sizes_from_numpy_load_without_running_code() -> None:
    for kind in (DigitsDataModule, ImageFolderDataModule):
        data = kind(image_size=np.int64(16))
        file = io.BytesIO()
        torch.save({"hparams": dict(data.hparams), "image_shape": data.image_shape}, file)
        file.seek(0)
        assert torch.load(file, weights_only=True)["image_shape"] == (3, 16, 16)


@pytest.mark.filterwarnings("ignore:val_split=0")
def test_everything_a_worker_gets_can_be_pickled(any_kind: Kind) -> None:
    data = _make(any_kind, augment="strong", mixup=0.2, cutmix=1.0)
    data.setup("fit")
    loader = data.train_dataloader()
    dataset, collate = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
    images, labels = collate([dataset[i] for i in range(4)])
    assert images.shape == (4, *data.image_shape)
    assert labels.shape == (4, data.num_classes)


# Splits


def test_validation_samples_are_not_trained_on(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    data = FashionMNISTDataModule(root=str(tmp_path), val_split=0.2, augment="none", batch_size=16, num_workers=0)
    data.setup("fit")
    train = torch.cat([image[None] for image, _ in samples_of(data.train_dataloader())])
    val = torch.cat([image[None] for image, _, _ in samples_of(data.val_dataloader())])
    assert (len(train), len(val)) == (160, 40)
    assert torch.cdist(train.flatten(1), val.flatten(1)).min() > 1


def test_split_is_the_same_in_every_run_and_another_with_another_seed() -> None:
    def val(seed: int) -> list[str]:
        data = _tiny(split_seed=seed)
        data.setup("validate")
        dataset: Any = data.val_dataloader().dataset
        return [dataset.name(i) for i in range(len(dataset))]

    assert val(1) == val(1)
    assert val(1) != val(2)


@pytest.mark.parametrize("val_split", [0, 1, 0.1])
@pytest.mark.parametrize("batch_size", [1, 7])
def test_evaluation_sees_every_sample_once(val_split: float, batch_size: int) -> None:
    data = _tiny(val_split=val_split, batch_size=batch_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data.setup("validate")
    seen = torch.cat([index for _, _, index in data.val_dataloader()])
    assert seen.tolist() == list(range({0: 250, 1: 1, 0.1: 155}[val_split]))


def test_without_validation_part_the_test_set_is_used_with_one_warning() -> None:
    data = _tiny(val_split=0)
    with pytest.warns(UserWarning, match="validating on the test set"):
        data.setup("fit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.setup("validate")
        data.setup("test")
    for validated, tested in zip(data.val_dataloader(), data.test_dataloader(), strict=True):
        assert torch.equal(validated[0], tested[0])


def test_setup_twice_changes_nothing() -> None:
    data = _tiny()
    data.setup("fit")
    before = data.train_dataloader().dataset
    data.setup("fit")
    assert data.train_dataloader().dataset is before


def test_setup_opens_only_what_the_stage_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    load = DigitsDataModule.load_split

    def record(self: DigitsDataModule, split: Any) -> Any:
        opened.append(split)
        return load(self, split)

    monkeypatch.setattr(DigitsDataModule, "load_split", record)
    _tiny().setup("test")
    assert opened == ["test"]
    opened.clear()
    _tiny().setup("fit")
    assert "test" not in opened


def test_limit_keeps_the_classes_even_in_every_split() -> None:
    data = _tiny(limit=20)
    data.setup()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        dataset: Any = loader.dataset
        assert torch.bincount(torch.tensor(dataset.labels)).tolist() == [2] * 10
    assert len(samples_of(data.predict_dataloader())) == 20


# Loaders


def test_any_split_can_be_seen_as_in_evaluation() -> None:
    data = DigitsDataModule(image_size=8, batch_size=100, augment="strong", split_seed=1)
    images, labels, index = (torch.cat(column) for column in zip(*data.evaluation_dataloader("train"), strict=True))
    assert index.tolist() == list(range(1297))
    again = torch.cat([batch[0] for batch in data.evaluation_dataloader("train")])
    assert torch.equal(images, again)  # no augmentation
    assert len(labels) == 1297
    _, few, _ = next(iter(data.evaluation_dataloader("test", count=50)))
    assert few.bincount().tolist() == [5] * 10  # of 25 each
    assert sum(len(batch[0]) for batch in data.evaluation_dataloader("val", count=1000)) == 250


def test_training_is_shuffled_and_drops_the_last_batch() -> None:
    data = _tiny(augment="none", limit=20)
    data.setup("fit")
    loader = data.train_dataloader()
    first, second = (torch.cat([labels for _, labels in loader]) for _ in range(2))
    assert len(first) == 16
    assert not torch.equal(first, second)


def test_last_training_batch_is_kept_on_request() -> None:
    data = _tiny(drop_last=False, limit=20)
    data.setup("fit")
    assert [len(labels) for _, labels in data.train_dataloader()] == [16, 4]


def test_evaluation_has_its_own_batch_size() -> None:
    data = _tiny(eval_batch_size=50)
    data.setup("test")
    assert data.test_dataloader().batch_size == 50


def test_batch_size_finder_reaches_the_loaders() -> None:
    data, model = _tiny(), LightningModule()
    model.trainer = Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    model.trainer._data_connector.attach_datamodule(model, data)
    data.setup("fit")
    lightning_setattr(model, "batch_size", 8)  # as the finder does
    assert lightning_getattr(model, "batch_size") == 8
    assert data.train_dataloader().batch_size == data.val_dataloader().batch_size == 8


class _PerDevice(DigitsDataModule):
    def __init__(self, *, batch_size: int = 64, devices: int = 2, **common: Any) -> None:
        super().__init__(batch_size=batch_size // devices, **common)


def test_the_loaders_have_the_batch_size_that_a_subclass_hands_on() -> None:
    data = _PerDevice(batch_size=32, num_workers=0)
    data.setup("fit")
    assert data.train_dataloader().batch_size == data.val_dataloader().batch_size == 16
    assert data.hparams["batch_size"] == 32  # what builds the subclass again


def test_workers_stay_alive_and_are_not_waited_for_for_ever() -> None:
    data = _tiny(num_workers=2)
    data.setup("fit")
    loader = data.train_dataloader()
    assert loader.num_workers == 2
    assert loader.persistent_workers
    assert loader.timeout == 300


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_share_the_cpus_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fashion_mnist(tmp_path)
    data = FashionMNISTDataModule(root=str(tmp_path), val_split=20, pin_memory=False)
    data.setup("test")
    monkeypatch.setattr("dia_lightning.datamodules._loader_processes._cpu_count", lambda: 6)
    assert data.test_dataloader().num_workers == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert data.test_dataloader().num_workers == 2
    pretend_ranks(data, ranks=8, rank=0)
    assert data.test_dataloader().num_workers == 0


def test_damaged_image_in_a_worker_is_named_with_its_index(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.fromarray(pixels(8, 8)).save(tmp_path / name)
    (tmp_path / "b.png").write_bytes(b"")
    data = _tiny(predict_folder=str(tmp_path), num_workers=1)
    data.setup("predict")
    with pytest.raises(SampleError, match=r"Sample 1 \(.*b\.png\) cannot be loaded: .*0 bytes"):
        list(data.predict_dataloader())


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_together_see_every_sample_once_and_mark_the_rest(ranks: int) -> None:
    seen, batches = [], set()
    for rank in range(ranks):
        data = _tiny(val_split=251)
        pretend_ranks(data, ranks, rank)
        data.setup("validate")
        indices = [index for _, _, index in data.val_dataloader()]
        seen += torch.cat(indices).tolist()
        batches.add(len(indices))
    assert sorted(index for index in seen if index >= 0) == list(range(251))
    assert set(seen) - set(range(251)) == {-1}
    assert len(seen) == -(-251 // ranks) * ranks
    assert len(batches) == 1


class _Linear(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(64, 10)
        self.seen: list[int] = []

    def training_step(self, batch: Any, batch_index: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.head(batch[0].flatten(1)), batch[1])

    def validation_step(self, batch: Any, batch_index: int) -> None:
        self.seen += batch[2].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def _fit(data: ClassificationDataModule, folder: Path) -> tuple[_Linear, Trainer, list[str]]:
    task = _Linear()
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(task, datamodule=data)
    return task, trainer, [str(w.message) for w in caught if issubclass(w.category, PossibleUserWarning)]


def test_trainer_fits_and_its_checkpoint_gives_the_data_module_back(tmp_path: Path) -> None:
    task, trainer, _ = _fit(_tiny(limit=64, mixup=0.2), tmp_path)
    assert trainer.global_step == 4
    assert task.seen == list(range(64))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    again = DigitsDataModule.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert again.image_shape == (1, 8, 8)
    assert again.hparams["limit"] == 64


def test_only_the_advice_on_workers_is_silenced_and_only_if_none_are_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_connector, "suggested_max_num_workers", lambda devices: 8)
    asked_for = _fit(_tiny(limit=64, num_workers=0), tmp_path)[2]
    assert any("many workers" in text for text in asked_for)
    assert _fit(_tiny(limit=64), tmp_path)[2] == []


# Prediction


def test_folder_to_predict_is_read_in_order_at_the_networks_size_and_channels(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    Image.fromarray(pixels(20, 30, 3)).save(tmp_path / "b.png")
    Image.fromarray(pixels(9, 9)).save(tmp_path / "deep" / "a.png")
    Image.new("RGBA", (50, 8)).save(tmp_path / "a.webp")
    for channels in (1, 3):
        data = _tiny(channels=channels, predict_folder=str(tmp_path))
        data.setup("predict")
        images, index = next(iter(data.predict_dataloader()))
        assert images.shape == (3, channels, 8, 8)
        assert [data.sample_name(i) for i in index] == [
            str(tmp_path / name) for name in ("a.webp", "b.png", "deep/a.png")
        ]


def test_test_set_is_predicted_without_a_folder_and_its_samples_have_names() -> None:
    data = _tiny(limit=20)
    data.setup()
    for tested, predicted in zip(data.test_dataloader(), data.predict_dataloader(), strict=True):
        assert torch.equal(tested[0], predicted[0])
    assert data.sample_name(0).startswith("test/")
    with pytest.raises(IndexError, match="padding"):
        data.sample_name(-1)


def test_folder_without_images_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path} has no image"):
        _tiny(predict_folder=str(tmp_path)).setup("predict")
    with pytest.raises(FileNotFoundError, match="is neither a folder nor an image file"):
        _tiny(predict_folder=str(tmp_path / "gone")).setup("predict")


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"batch_size must be a whole number of 1 or more, got 0\."),
        ({"batch_size": "8"}, r"batch_size must be a whole number of 1 or more, got '8'\."),
        ({"batch_size": 8.0}, r"batch_size must be a whole number of 1 or more, got 8\.0"),
        ({"batch_size": None}, "batch_size must be a whole number of 1 or more, got None"),
        ({"eval_batch_size": 0}, "eval_batch_size must be a whole number of 1 or more, or None, got 0"),
        ({"num_workers": -1}, "num_workers must be .* 0 or more, or None, got -1"),
        ({"limit": True}, "limit must be .* 1 or more, or None, got True"),
        ({"split_seed": "a"}, "split_seed must be a whole number of 0 or more, got 'a'"),
        ({"image_size": "32"}, "image_size must be a whole number of 8 or more, got '32'"),
        ({"mixup": -0.1}, r"mixup must be a number of 0 or more, got -0\.1"),
        ({"cutmix": float("nan")}, "cutmix must be a number of 0 or more, got nan"),
        ({"cutmix": "1"}, "cutmix must be a number of 0 or more, got '1'"),
        ({"val_split": -1}, "val_split must be a number of samples .* or a fraction below 1 .*, got -1"),
        ({"val_split": 1.0}, r"val_split must be .* a fraction below 1 .*, got 1\.0"),
        ({"val_split": 2.5}, r"val_split must be .*, got 2\.5"),
        ({"val_split": "0.1"}, r"val_split must be .*, got '0\.1'"),
        ({"augment": "strnog"}, r"augment must be one of none, flips, basic, auto, strong, got 'strnog'\."),
    ],
)
def test_option_out_of_range_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DigitsDataModule(**options)


@pytest.mark.parametrize("val_split", [1547, 5000, 0.9999, 0.0001])
def test_split_that_leaves_nothing_is_refused(val_split: float) -> None:
    with pytest.raises(ValueError, match=f"val_split={val_split} takes .* of 1547"):
        _tiny(val_split=val_split).setup("fit")


def test_training_set_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size=16 is more than the 10 training samples"):
        _tiny(limit=10).setup("fit")
    _tiny(limit=10, drop_last=False).setup("fit")
    _tiny(limit=10).setup("test")


def test_training_set_smaller_than_a_batch_per_process_is_refused() -> None:
    data = _tiny(limit=20)
    pretend_ranks(data, ranks=2, rank=0)
    with pytest.raises(ValueError, match=r"\(10 per process\)"):
        data.setup("fit")


def test_unknown_stage_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stage must be .*, got 'train'"):
        _tiny().setup("train")


# Where the data are


def test_root_is_the_argument_then_the_environment_then_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DIA_DATA", raising=False)
    assert CIFAR10DataModule().root == tmp_path / ".cache" / "dia_lightning"
    monkeypatch.setenv("DIA_DATA", str(tmp_path / "env"))
    assert CIFAR10DataModule().root == tmp_path / "env"
    assert CIFAR10DataModule(root=str(tmp_path / "own")).root == tmp_path / "own"
    assert ImageFolderDataModule(root="~/own").root == tmp_path / "own"
