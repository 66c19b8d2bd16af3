"""Tasks in folders and on the Hugging Face Hub."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dia_lightning.attention import SqueezeExcitation
from dia_lightning.datamodules import DigitsDataModule
from dia_lightning.models import get_model
from dia_lightning.models.libraries import without_weights
from dia_lightning.tasks import ClassificationTask, DIATask, DiffusionTask
from tests.models.test_pretrained import moved
from tests.tasks.conftest import small_task, small_trainer
from tests.tasks.tiny_detection import tiny_task

UNET = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}


def assert_equal(loaded: DIATask, task: DIATask) -> None:
    assert type(loaded) is type(task)
    assert loaded.state_dict().keys() == task.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in task.state_dict().items())
    assert not loaded.training


#: For classifiers.
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "options",
    [
        {"attention_args": {"reduction": 8}, "identity": True},
        {"attention": "se", "share": "block", "plug": "1|0|1", "label_smoothing": 0.1, "optimizer": "adamw"},
        {"attention": None},
        {"backbone": "timm/resnet10t", "backbone_args": None, "compile": True},
    ],
)
def test_a_classifier_comes_back_with_all_that_made_it(options: dict[str, Any], tmp_path: Path) -> None:
    task = moved(small_task(**options))
    task._data = {"class_names": [f"é{number}" for number in range(10)], "mean": [0.5], "std": [0.25]}
    assert task.save_pretrained(tmp_path) == tmp_path
    for kind in (DIATask, ClassificationTask):
        loaded: Any = kind.from_pretrained(tmp_path)
        assert_equal(loaded, task)
        assert not loaded._compiled
        assert loaded.class_names == task.class_names
        assert loaded.normalization == ([0.5], [0.25])
        assert {**loaded.hparams, "compile": None} == {**task.hparams, "compile": None}


def test_detectors_and_diffusion_models_come_back(tmp_path: Path) -> None:
    detection = moved(tiny_task("fcos"))
    detection.save_pretrained(tmp_path / "detection")
    assert_equal(DIATask.from_pretrained(tmp_path / "detection"), detection)
    options: dict[str, Any] = {"image_shape": [1, 8, 8], "backbone_args": UNET, "attention": "dia-lstm"}
    diffusion = moved(DiffusionTask("unet", 3, conditional=True, **options))
    diffusion.save_pretrained(tmp_path / "diffusion")
    loaded = DiffusionTask.from_pretrained(tmp_path / "diffusion")
    assert_equal(loaded, diffusion)
    assert torch.equal(loaded.sample(2, steps=2, seed=3), diffusion.sample(2, steps=2, seed=3))


def test_a_trained_task_says_how_good_it_is(tmp_path: Path, digits: DigitsDataModule) -> None:
    task = small_task()
    trainer = small_trainer(tmp_path, max_epochs=1, limit_train_batches=1, limit_val_batches=1)
    trainer.fit(task, digits)
    task.save_pretrained(tmp_path / "shared")
    card = (tmp_path / "shared" / "README.md").read_text()
    assert f"| val/acc | {trainer.callback_metrics['val/acc']:.4g} |" in card
    assert "pipeline_tag: image-classification" in card
    assert "ClassificationTask.from_pretrained" in card
    assert "cifar_resnet with dia-lstm" in card
    loaded = ClassificationTask.from_pretrained(tmp_path / "shared")
    assert_equal(loaded, task.eval())
    assert loaded.class_names == digits.class_names
    assert loaded.trained_steps == 1
    task.save_pretrained(tmp_path / "shared", metrics={"top1": 0.5})
    assert "| top1 | 0.5 |" in (tmp_path / "shared" / "README.md").read_text()


def test_objects_are_given_again_and_those_of_the_training_may_be_left_out(tmp_path: Path) -> None:
    def network() -> nn.Module:
        return get_model("cifar_resnet", depth=11, num_classes=10)

    task = moved(ClassificationTask(network(), 10, attention=SqueezeExcitation, optimizer=torch.optim.RMSprop))
    task.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"object as backbone .*Task\.from_pretrained\(\.\.\., backbone="):
        ClassificationTask.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"object as attention \('object:SqueezeExcitation'\)"):
        ClassificationTask.from_pretrained(tmp_path, backbone=network())
    with pytest.warns(UserWarning, match=r"object as optimizer .*from_pretrained\(\.\.\., optimizer=\.\.\.\)"):
        loaded = ClassificationTask.from_pretrained(tmp_path, backbone=network(), attention=SqueezeExcitation)
    assert_equal(loaded, task)


class Narrow(ClassificationTask):
    """A task of a project, with arguments of its own."""

    def __init__(self, depth: int = 11, lr: float = 0.1) -> None:
        super().__init__("cifar_resnet", 4, backbone_args={"depth": depth}, attention="se", lr=lr)
        self.remember({"depth": depth})


def test_a_task_of_a_project_comes_back(tmp_path: Path) -> None:
    task = moved(Narrow(depth=20, lr=0.5))
    task.save_pretrained(tmp_path)
    assert torch.equal(Narrow.from_pretrained(tmp_path)(IMAGES), task(IMAGES))
    for kind in (DIATask, ClassificationTask, Narrow):
        loaded = kind.from_pretrained(tmp_path)
        assert_equal(loaded, task)
        assert loaded.lr == 0.5


# ---- weights from elsewhere


def test_nothing_but_the_folder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = small_task(backbone="torchvision/resnet18", backbone_args=None)
    task.save_pretrained(tmp_path)
    edit(tmp_path, backbone_args={"weights": "DEFAULT"})
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", None)
    assert_equal(ClassificationTask.from_pretrained(tmp_path), task.eval())


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        (
            "torchvision/vit_b_16",
            {"weights": "IMAGENET1K_SWAG_E2E_V1", "dropout": 0.1},
            {"image_size": 384, "dropout": 0.1},
        ),
        ("torchvision/vit_b_16", {"weights": None}, {}),
        ("torchvision/inception_v3", {"weights": "DEFAULT"}, {"transform_input": True}),
        ("timm/resnet18", {"pretrained": True, "checkpoint_path": "w.bin", "drop_rate": 0.1}, {"drop_rate": 0.1}),
    ],
)
def test_the_same_network_is_built_without_its_weights(name: str, args: Any, expected: Any) -> None:
    assert without_weights(name, args) == expected


# ---- what somebody else wrote


def edit(folder: Path, **hyperparameters: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["hyper_parameters"].update(hyperparameters)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("hyperparameters", "message"),
    [
        ({"optimizer": {"class_path": "os.system", "init_args": {}}}, r"names code to run \(optimizer\)"),
        ({"_instantiator": "os.system"}, r"names code to run \(_instantiator\)"),
        ({"backbone_args": {"depth": [{"class_path": "x"}]}}, r"names code to run \(backbone_args\)"),
        ({"init_from": "/etc/passwd"}, "ClassificationTask takes no 'init_from'"),
        ({"self": 1}, "takes no 'self'"),
        ({"later_option": 1}, "takes no 'later_option'. Update dia-lightning"),
        ({"num_classes": "ten"}, "does not hold a ClassificationTask"),
        ({"num_classes": 7}, "does not hold a ClassificationTask .*size mismatch"),
        ({"backbone_args": {"depth": 20}}, "does not hold a ClassificationTask .*missing key"),
        ({"backbone_args": 11}, "does not hold a ClassificationTask"),
        ({"backbone": "os.system"}, "Unknown model 'os.system'"),
        ({"attention": "os.system"}, "Attention 'os.system' is not registered"),
        ({"attention": "antigravity.Gate"}, "Attention .antigravity.Gate. is not registered"),
        ({"attention": "se"}, "does not hold a ClassificationTask"),
        ({"lr": "fast"}, "does not hold a ClassificationTask"),
    ],
)
def test_hyperparameters_that_are_none_are_refused(hyperparameters: Any, message: str, tmp_path: Path) -> None:
    small_task().save_pretrained(tmp_path)
    edit(tmp_path, **hyperparameters)
    with pytest.raises(ValueError, match=message) as raised:
        DIATask.from_pretrained(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"dia_task": None}, "not a config of a dia-lightning task: dia_task is None"),
        ({"dia_task": "SegmentationTask"}, "written by SegmentationTask, which is not imported"),
        (
            {"dia_task": "DetectionTask"},
            "holds a DetectionTask, not a ClassificationTask: DetectionTask.",
        ),
        ({"hyper_parameters": []}, r"hyper_parameters is \[\]"),
        ({"code": "import os"}, "'code' is unknown"),
        ({"trained_steps": "many"}, "trained_steps is 'many'"),
        ({"data": {"class_names": "ab"}}, "class_names is 'ab'"),
        ({"data": {"mean": ["a"], "std": [1.0]}}, "mean is"),
    ],
)
def test_a_config_that_is_none_is_refused(entries: Any, message: str, tmp_path: Path) -> None:
    small_task().save_pretrained(tmp_path)
    config = {**json.loads((tmp_path / "config.json").read_text()), **entries}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as raised:
        ClassificationTask.from_pretrained(tmp_path)
    assert "\n" not in str(raised.value)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    small_task().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    others = {key: value for key, value in weights.items() if key != "backbone.conv1.weight"}
    for changed in ({**weights, "backbone.more": torch.ones(1)}, others):
        save_file(changed, file)
        with pytest.raises(ValueError, match=r"does not hold a ClassificationTask .* key") as raised:
            DIATask.from_pretrained(tmp_path)
        assert "\n" not in str(raised.value)
    file.write_bytes(b"PK")
    with pytest.raises(ValueError, match="missing or damaged"):
        DIATask.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="dia_task is missing; hyper_parameters is missing"):
        DIATask.from_pretrained(tmp_path)


# ---- the Hub


def test_a_task_goes_to_the_hub_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Api:
        def __init__(self, token: str | None = None) -> None:
            calls.append(token)

        def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any:
            calls.append((repo_id, private, exist_ok))
            return type("RepoUrl", (str,), {"repo_id": f"me/{repo_id}"})()

        def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> str:
            Path(folder_path).rename(tmp_path / "hub")
            Path(folder_path).mkdir()
            calls.append((repo_id, commit_message))
            return "https://huggingface.co/me/digits/commit/1"

    def download(repo_id: str, **options: Any) -> str:
        calls.append((repo_id, options["revision"], options["token"]))
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    task = moved(small_task())
    url = task.push_to_hub("digits", private=True, token="secret", commit_message="First", metrics={"acc": 0.9})
    assert url == "https://huggingface.co/me/digits/commit/1"
    assert_equal(DIATask.from_pretrained("me/digits", revision="v1", token="t"), task)
    assert calls == ["secret", ("digits", True, True), ("me/digits", "First"), ("me/digits", "v1", "t")]
    assert "| acc | 0.9 |" in (tmp_path / "hub" / "README.md").read_text()
    assert "secret" not in "".join(path.read_text(errors="replace") for path in (tmp_path / "hub").iterdir())
