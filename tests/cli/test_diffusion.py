"""Diffusion from the command line: every shipped config, and what the program says."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torchvision import datasets

from dia_lightning.__main__ import main
from dia_lightning.datamodules import DigitsDataModule
from dia_lightning.tasks import ClassificationTask, DetectionTask, DiffusionTask, load_task
from tests.callbacks.random_inception import write_inception_weights
from tests.datamodules import tiny_data
from tests.tasks.conftest import small_trainer

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder, with tiny data for every config below `data`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dia-lightning"])
    data = tmp_path / "data"
    data.mkdir()
    tiny_data.write_fashion_mnist(data, train=6000)
    tiny_data.write_image_folder(data, splits=("train", "val", "test"), classes=("all",))
    tiny_data.write_cifar(data, datasets.CIFAR10, monkeypatch)
    return tmp_path


def tiny_options(config: dict[str, Any]) -> list[str]:
    options = ["--data.batch_size", "4", "--data.limit", "4", "--data.root", "data", "--data.num_workers", "0"]
    options += ["--trainer.enable_progress_bar", "false", "--trainer.max_steps", "2"]
    options += [
        "--model.backbone",
        "unet",
        "--model.backbone_args",
        "{block_out_channels: [8, 16], layers_per_block: 1}",
    ]
    if config["data"]["class_path"] == "ImageFolderDataModule":
        options += ["--data.image_size", "16", "--data.val_split", "0"]
    return options


@pytest.mark.parametrize("path", sorted((CONFIGS / "diffusion").glob("*.yaml")), ids=lambda path: str(path.stem))
def test_config_trains_and_tests(path: Path, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = yaml.safe_load(path.read_text())
    main(["fit", "-c", str(path), "-c", str(CONFIGS / "trainer" / "smoke.yaml"), *tiny_options(config)])
    run = Path("runs") / config["trainer"]["logger"][0]["init_args"]["name"] / "version_0"
    assert [file.name[:6] for file in (run / "checkpoints").glob("best-*.ckpt")] == ["best-e"]
    printed = capsys.readouterr().out
    assert printed.count("Test metric") == 1
    assert "test/loss" in printed
    task = load_task(run / "checkpoints" / "last.ckpt")
    assert isinstance(task, DiffusionTask)
    assert list(task.sample(1, steps=2).shape[1:]) == task.image_shape


def test_folder_of_images_without_classes_is_trained_on(workplace: Path) -> None:
    (workplace / "photos").mkdir()
    for number in range(8):
        Image.fromarray(tiny_data.pixels(20, 30, 3, seed=number)).save(workplace / "photos" / f"{number}.jpg")
    path = CONFIGS / "diffusion" / "celeba64.yaml"
    options = [*tiny_options(yaml.safe_load(path.read_text())), "--data.root", "photos", "--data.val_split", "2"]
    main(["fit", "-c", str(path), "-c", str(CONFIGS / "trainer" / "smoke.yaml"), *options])
    task = load_task("runs/diffusion_celeba64/version_0/checkpoints/last.ckpt")
    assert task.class_names == ["images"]
    assert task.image_shape == [3, 16, 16]


@pytest.mark.parametrize("path", sorted((CONFIGS / "diffusion").glob("*.yaml")), ids=lambda path: str(path.stem))
def test_config_describes_a_network_that_suits_its_data(path: Path) -> None:
    model = yaml.safe_load(path.read_text())["model"]["init_args"]
    shape = {"digits": (1, 8, 8), "fashion_mnist": (1, 28, 28), "cifar10_ddpm": (3, 32, 32), "celeba64": (3, 64, 64)}
    names = ("conditional", "attention", "share")
    with torch.device("meta"):
        DiffusionTask(
            model["backbone"],
            10,
            image_shape=list(shape[path.stem]),
            backbone_args=model.get("backbone_args"),
            **{name: model[name] for name in names},
        )


def test_a_checkpoint_tests_from_the_command_line_as_in_python(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = CONFIGS / "diffusion" / "digits.yaml"
    options = [
        "-c",
        str(path),
        "-c",
        str(CONFIGS / "trainer" / "smoke.yaml"),
        *tiny_options(yaml.safe_load(path.read_text())),
    ]
    main(["fit", *options, "--test_after_fit", "false"])
    capsys.readouterr()
    main(["test", *options, "--ckpt_path", "last"])
    printed = capsys.readouterr().out
    checkpoint = Path("runs/diffusion_digits/version_0/checkpoints/last.ckpt")
    data = DigitsDataModule(image_size=8, channels=1, pixel_range="symmetric", augment="none", batch_size=4, limit=4)
    (result,) = small_trainer(workplace).test(load_task(checkpoint), data, verbose=False)
    shown = re.search(r"test/loss\W+([\d.]+)", printed)  # with lines around it where rich is installed
    assert shown is not None
    assert float(shown[1]) == pytest.approx(result["test/loss"], rel=1e-5)


SCORES = {"classifier": ["test/frechet_distance", "test/class_agreement"], "fid": ["test/fid", "test/kid"]}


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((CONFIGS / "scores").glob("*.yaml")), ids=lambda path: str(path.stem))
def test_config_adds_scores_to_a_test(path: Path, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["-c", str(CONFIGS / "diffusion" / "digits.yaml"), "-c", str(CONFIGS / "trainer" / "smoke.yaml")]
    options += ["--trainer.enable_progress_bar", "false", "--data.limit", "10", "-c", str(path)]
    options += ["--trainer.callbacks.num_samples", "10", "--trainer.callbacks.steps", "2"]
    if path.stem == "fid":
        options += ["--trainer.callbacks.inception", str(write_inception_weights(workplace / "inception.pth"))]
    else:  # where the config expects the classifier
        trainer = small_trainer(workplace, max_epochs=0)
        trainer.fit(ClassificationTask("cifar_resnet", 10), DigitsDataModule(image_size=8, batch_size=10))
        trainer.save_checkpoint("runs/digits/version_0/checkpoints/last.ckpt")
    main(["test", *options])
    printed = capsys.readouterr().out
    for name in (*SCORES[path.stem], "test/generated_images"):
        assert name in printed


def test_a_classifier_that_is_not_there_is_named(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configs = ["-c", str(CONFIGS / "diffusion" / "digits.yaml"), "-c", str(CONFIGS / "scores" / "classifier.yaml")]
    with pytest.raises(SystemExit):
        main(["test", *configs, "--trainer.accelerator", "cpu"])
    message = "There is no classifier 'runs/digits/version_0/checkpoints/last.ckpt'. Train one on the same classes"
    assert message in capsys.readouterr().err


def test_epochs_without_validation_are_kept_too(workplace: Path) -> None:
    options = ["--trainer.max_epochs", "2", "--trainer.check_val_every_n_epoch", "5", "--test_after_fit", "false"]
    main(["fit", "-c", str(CONFIGS / "diffusion" / "digits.yaml"), "--data.limit", "64", *options])
    checkpoint = torch.load("runs/diffusion_digits/version_0/checkpoints/last.ckpt", weights_only=True)
    assert (checkpoint["epoch"], checkpoint["global_step"]) == (1, 2)


def test_pictures_of_a_test_carry_the_step_of_the_weights(workplace: Path) -> None:
    options = ["-c", str(CONFIGS / "diffusion" / "digits.yaml"), "--data.limit", "64"]
    main(["fit", *options, "--trainer.max_epochs", "3", "--trainer.check_val_every_n_epoch", "2"])
    pictures = Path("runs/diffusion_digits/version_0/pictures")
    assert [path.name for path in pictures.glob("test/samples/*")] == ["step=000002.png"]  # the best of one validation
    main(["test", *options, "--ckpt_path", "runs/diffusion_digits/version_0/checkpoints/last.ckpt"])
    pictures = Path("runs/diffusion_digits/version_1/pictures")
    assert [path.name for path in pictures.glob("test/samples/*")] == ["step=000003.png"]


def test_the_shape_of_the_images_comes_from_the_data_alone(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["-c", str(CONFIGS / "diffusion" / "digits.yaml"), "--trainer.fast_dev_run", "true"]
    with pytest.raises(SystemExit):
        main(["fit", *options, "--model.image_shape", "[1, 8, 8]"])
    assert "--model.image_shape [1, 8, 8]: the shape of the images comes from the data" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["fit", *options, "--data.image_size", "9"])
    assert "error: unet has 2 levels and halves images 1 times" in capsys.readouterr().err


def test_the_program_says_what_to_install(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SystemExit):
        main(["fit", "-c", str(CONFIGS / "diffusion" / "digits.yaml"), "--trainer.fast_dev_run", "true"])
    assert 'Diffusion needs diffusers: pip install "dia-lightning[diffusion]"' in capsys.readouterr().err


def test_predict_says_that_there_is_nothing_to_predict(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["predict", "-c", str(CONFIGS / "diffusion" / "digits.yaml"), "--trainer.accelerator", "cpu"])
    assert "error: DiffusionTask makes images from noise" in capsys.readouterr().err


def test_a_task_that_does_not_take_the_shape_of_the_images_does_without() -> None:
    network: dict[str, Any] = {"backbone_args": {"depth": 11}, "detector_args": {"min_size": 64}}
    assert "image_shape" not in DetectionTask("fcos", "cifar_resnet", num_classes=3, **network).hparams
