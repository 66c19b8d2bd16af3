"""GenerationScores: against distances computed by hand and by torch-fidelity, and what it leaves alone."""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch_fidelity
from lightning.pytorch import LightningModule, Trainer
from scipy.linalg import sqrtm
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.utils.data import Dataset

from dia_lightning.callbacks import EMA, GenerationScores
from dia_lightning.datamodules import DigitsDataModule
from dia_lightning.tasks import ClassificationTask, DiffusionTask, load_task
from dia_lightning.tasks.generation_metrics import DescribedImages, class_agreement, inception_score, kernel_distance
from dia_lightning.tasks.image_features import ClassifierFeatures, InceptionFeatures
from tests.callbacks.random_inception import write_inception_weights
from tests.callbacks.tiny_classifier import TinyData
from tests.tasks.conftest import small_trainer

NETWORK = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}


def digits(**options: Any) -> DigitsDataModule:
    settings: dict[str, Any] = {"image_size": 8, "channels": 1, "pixel_range": "symmetric", "batch_size": 50}
    return DigitsDataModule(**{**settings, **options})


def diffusion(*, conditional: bool = True, **options: Any) -> DiffusionTask:
    torch.manual_seed(0)
    return DiffusionTask(
        "unet", 10, image_shape=[1, 8, 8], backbone_args=NETWORK, conditional=conditional, lr=0.1, **options
    )


class Copier(DiffusionTask):
    """Generates the first images of a set, in place of what it learnt."""

    def __init__(self, images: Tensor) -> None:
        super().__init__("unet", 10, image_shape=[1, 8, 8], backbone_args=NETWORK, conditional=True)
        self.images = images

    def sample(self, count: int, *, first: int = 0, **options: Any) -> Tensor:
        return self.images[first : first + count]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small classifier of digits in RGB and at another size, trained for two epochs."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("classifier")
    task = ClassificationTask("cifar_resnet", 10, backbone_args={"depth": 11}, attention="se", lr=0.05)
    trainer = small_trainer(folder, max_epochs=2)
    trainer.fit(task, DigitsDataModule(image_size=10, batch_size=32, limit=640))
    trainer.save_checkpoint(folder / "classifier.ckpt")
    return str(folder / "classifier.ckpt")


def images_of(split: Any, count: int | None = None) -> tuple[Tensor, Tensor]:
    data = digits()
    batches = list(data.evaluation_dataloader(split, count=count))
    return data.denormalize(torch.cat([batch[0] for batch in batches])), torch.cat([batch[1] for batch in batches])


def scores_of(task: LightningModule, folder: Path, data: DigitsDataModule | None = None, **options: Any) -> Any:
    trainer = small_trainer(folder, callbacks=[GenerationScores(**{"steps": 2, "num_samples": 40, **options})])
    return trainer.test(task, data or digits(), verbose=False)[0]


def by_hand(generated: np.ndarray[Any, Any], reference: np.ndarray[Any, Any]) -> float:
    (mean, covariance), (other_mean, other_covariance) = (
        (part.mean(0), np.cov(part, rowvar=False)) for part in (generated, reference)
    )
    root = sqrtm(covariance @ other_covariance)
    return float(((mean - other_mean) ** 2).sum() + np.trace(covariance + other_covariance - 2 * root.real))


# ---- what the scores are


def test_the_frechet_distance_is_that_of_the_features_before_the_last_layer(classifier: str, tmp_path: Path) -> None:
    task = diffusion()
    found = scores_of(task, tmp_path, classifier=classifier, num_samples=60, batch_size=25)
    judge = load_task(classifier)
    assert isinstance(judge, ClassificationTask)
    judge.backbone.fc = nn.Identity()

    def features(images: Tensor) -> np.ndarray[Any, Any]:
        stored = (images * 255).round() / 255
        enlarged = nn.functional.interpolate(stored, size=(10, 10), mode="bilinear").repeat(1, 3, 1, 1)
        with torch.no_grad():
            found: Tensor = judge.backbone((enlarged - 0.3055) / 0.3235)
        return found.double().numpy()

    reference = features(images_of("train")[0])
    generated = features(task.sample(60, steps=2))
    assert found["test/frechet_distance"] == pytest.approx(by_hand(generated, reference), rel=1e-3)
    real = features(images_of("test", 60)[0])
    assert found["test/frechet_distance_real"] == pytest.approx(by_hand(real, reference), rel=1e-3)
    assert found["test/generated_images"] == found["test/real_images"] == 60


def test_a_generator_of_the_training_images_has_distance_zero(classifier: str, tmp_path: Path) -> None:
    images, _ = images_of("train")
    found = scores_of(Copier(images), tmp_path, classifier=classifier, num_samples=len(images))
    assert found["test/frechet_distance"] == pytest.approx(0, abs=1e-4)
    assert found["test/frechet_distance_real"] > 0.01
    assert found["test/real_images"] == 250 < found["test/generated_images"]


def test_real_images_of_the_asked_classes_agree_as_often_as_the_classifier_is_right(
    classifier: str, tmp_path: Path
) -> None:
    data = DigitsDataModule(image_size=10)
    accuracy = small_trainer(tmp_path).test(load_task(classifier), data, verbose=False)[0]["test/acc"]
    images, labels = images_of("test")
    turns = torch.cat([torch.nonzero(labels == label)[:20] for label in range(10)], 1).flatten()  # 0..9, 0..9, ...
    found = scores_of(Copier(images[turns]), tmp_path, classifier=classifier, num_samples=200)
    assert found["test/class_agreement"] == pytest.approx(found["test/class_agreement_real"], abs=0.06)
    whole = scores_of(Copier(images), tmp_path, classifier=classifier, num_samples=250)
    assert whole["test/class_agreement_real"] == pytest.approx(accuracy, abs=0.009)  # there 10x10 pixels are rounded
    shuffled = scores_of(Copier(images[turns.roll(1)]), tmp_path, classifier=classifier, num_samples=200)
    assert shuffled["test/class_agreement"] < 0.2


def test_without_classes_there_is_no_agreement(classifier: str, tmp_path: Path) -> None:
    found = scores_of(diffusion(conditional=False), tmp_path, digits(limit=100), classifier=classifier)
    assert "test/frechet_distance" in found
    assert "test/class_agreement" not in found


def test_images_and_scores_do_not_depend_on_the_batch_size(classifier: str, tmp_path: Path) -> None:
    few = digits(limit=100)
    large, small = (scores_of(diffusion(), tmp_path, few, classifier=classifier, batch_size=size) for size in (40, 7))
    assert large == pytest.approx(small, rel=1e-4)


def test_the_logged_sentence_tells_how_many_images_were_compared(
    classifier: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        scores_of(diffusion(), tmp_path, digits(limit=100), classifier=classifier)
    assert "(40 generated and 40 real images, each compared with 100 training images)" in caplog.text


# ---- the scores by Inception


class Pictures(Dataset[Tensor]):
    """Images as torch-fidelity takes them."""

    def __init__(self, images: Tensor) -> None:
        self.images = (images * 255).round().to(torch.uint8).repeat(1, 3, 1, 1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


@pytest.mark.slow
def test_fid_and_kid_are_those_of_torch_fidelity(tmp_path: Path) -> None:
    inception_weights = str(write_inception_weights(tmp_path / "inception.pth"))
    data, task = digits(limit=12), diffusion()
    found = scores_of(task, tmp_path, data, inception=inception_weights, num_samples=12)
    reference = data.denormalize(torch.cat([batch[0] for batch in data.evaluation_dataloader("train")]))
    expected = torch_fidelity.calculate_metrics(
        input1=Pictures(task.sample(12, steps=2)),
        input2=Pictures(reference),
        feature_extractor_weights_path=inception_weights,
        cuda=False,
        fid=True,
        kid=True,
        kid_subset_size=12,
        kid_subsets=2,
        cache=False,
        verbose=False,
        save_cpu_ram=True,
    )
    assert expected["frechet_inception_distance"] > 0
    assert found["test/fid"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-3, abs=1e-6)
    assert found["test/kid"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-3, abs=1e-6)
    assert {
        "test/fid_real",
        "test/kid_std",
        "test/kid_real",
        "test/inception_score",
        "test/inception_score_std",
    } <= set(found)


def described(logits: Tensor) -> DescribedImages:
    return DescribedImages(logits, logits, logits.argmax(1))


def test_the_inception_score_is_the_number_of_classes_that_are_told_apart() -> None:
    certain = 100 * torch.eye(4).repeat(500, 1)
    assert inception_score(described(certain))[0] == pytest.approx(4, rel=0.02)
    assert inception_score(described(certain[:1].repeat(50, 1))) == pytest.approx((1, 0))
    assert class_agreement(described(certain)) == 1


def test_scores_that_draw_at_random_are_repeatable_and_leave_random_numbers_alone() -> None:
    torch.manual_seed(3)
    images, reference = (described(torch.randn(2000, 5)) for _ in range(2))
    state = torch.get_rng_state()
    assert kernel_distance(images, reference) == kernel_distance(images, reference)
    assert inception_score(images) == inception_score(images)
    assert torch.equal(torch.get_rng_state(), state)


# ---- what is left alone


def run_training(folder: Path, *callbacks: Any) -> Trainer:
    trainer = small_trainer(folder, max_epochs=2, callbacks=list(callbacks))
    torch.manual_seed(1)
    trainer.fit(diffusion(), digits(limit=50, batch_size=25))
    return trainer


def test_training_and_checkpoints_are_as_without(classifier: str, tmp_path: Path) -> None:
    scores = GenerationScores(classifier=classifier, every_n_epochs=1, steps=2, num_samples=20)
    with_scores, without = run_training(tmp_path / "a", scores), run_training(tmp_path / "b")
    states = []
    for trainer in (with_scores, without):
        trainer.save_checkpoint(tmp_path / "run.ckpt")
        states.append(torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"])
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert "val/frechet_distance" in with_scores.callback_metrics
    assert len(with_scores.optimizers[0].param_groups[0]["params"]) == len(
        without.optimizers[0].param_groups[0]["params"]
    )


def test_epochs_in_between_are_not_scored(classifier: str, tmp_path: Path) -> None:
    asked: list[int] = []

    class Counter(Copier):
        def sample(self, count: int, **options: Any) -> Tensor:
            asked.append(self.current_epoch)
            return super().sample(count, **options)

    images, _ = images_of("val")
    scores = GenerationScores(classifier=classifier, every_n_epochs=2, num_samples=20)
    small_trainer(tmp_path, max_epochs=4, callbacks=[scores]).fit(Counter(images), digits(limit=50))
    assert asked == [1, 3]


@pytest.mark.parametrize("first", [True, False], ids=["before EMA", "after EMA"])
def test_averaged_weights_are_scored(classifier: str, tmp_path: Path, first: bool) -> None:
    seen: list[Tensor] = []

    class Watched(DiffusionTask):
        def sample(self, count: int, **options: Any) -> Tensor:
            seen.append(next(self.backbone.parameters()).detach().clone())
            return super().sample(count, **options)

    torch.manual_seed(0)
    task = Watched("unet", 10, image_shape=[1, 8, 8], backbone_args=NETWORK, conditional=True, lr=0.1)
    ema = EMA(decay=0.9, warmup=False)
    scores = GenerationScores(classifier=classifier, every_n_epochs=1, steps=2, num_samples=10)
    trainer = small_trainer(tmp_path, callbacks=[scores, ema] if first else [ema, scores])
    trainer.fit(task, digits(limit=50, batch_size=25))
    averaged = next(task.backbone.parameters())  # EMA leaves the average in the model
    assert len(seen) == 1
    assert torch.equal(seen[0], averaged)


@pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning")
def test_a_quick_development_run_makes_few_images(classifier: str, tmp_path: Path) -> None:
    scores = GenerationScores(classifier=classifier, num_samples=10_000, batch_size=12, steps=2)
    trainer = small_trainer(tmp_path, callbacks=[scores], fast_dev_run=1)
    found = trainer.test(diffusion(), digits(batch_size=16), verbose=False)[0]
    assert found["test/generated_images"] == 12
    assert found["test/real_images"] == 12


# ---- two processes


def _score_in_two(rank: int, folder: Path, classifier: str) -> None:
    os.environ.update({"MASTER_ADDR": "localhost", "MASTER_PORT": "29511", "NODE_RANK": "0"})
    os.environ.update({"LOCAL_RANK": str(rank), "WORLD_SIZE": "2"})
    torch.set_num_threads(1)
    scores = GenerationScores(classifier=classifier, steps=2, num_samples=41, batch_size=9)
    trainer = small_trainer(folder, callbacks=[scores], strategy="ddp", devices=2, num_nodes=1)
    found = trainer.test(diffusion(), digits(limit=61), verbose=False)[0]
    torch.save(dict(found), folder / f"{rank}.pt")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_two_processes_score_what_one_scores(classifier: str, tmp_path: Path) -> None:
    alone = scores_of(diffusion(), tmp_path, digits(limit=61), classifier=classifier, num_samples=41)
    spawn(_score_in_two, (tmp_path, classifier), nprocs=2)  # type: ignore[no-untyped-call]
    for rank in (0, 1):
        assert torch.load(tmp_path / f"{rank}.pt") == pytest.approx(alone, rel=1e-4)


# ---- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs something to judge by: classifier=CHECKPOINT"),
        ({"classifier": "a.ckpt", "num_samples": 9}, "num_samples must be 10 or more, got 9"),
        ({"classifier": "a.ckpt", "batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"classifier": "a.ckpt", "every_n_epochs": 0}, "every_n_epochs must be 1 or more, or None"),
        ({"classifier": "a.ckpt", "seed": -1}, "seed must be 0 or more, got -1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationScores(**options)


def test_options_that_do_not_fit_the_task_are_refused_before_training(classifier: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"guidance=2\.0 of GenerationScores needs a task with conditional=True"):
        scores_of(diffusion(conditional=False), tmp_path, classifier=classifier, guidance=2.0)
    with pytest.raises(ValueError, match="steps must divide the 1000 timesteps"):
        scores_of(diffusion(), tmp_path, classifier=classifier, steps=3)
    with pytest.raises(ValueError, match="GenerationScores needs a task with a method sample"):
        scores_of(load_task(classifier), tmp_path, classifier=classifier)


def test_a_data_module_that_cannot_tell_its_images_is_refused(classifier: str, tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, callbacks=[GenerationScores(classifier=classifier)])
    with pytest.raises(ValueError, match="a data module with evaluation_dataloader and denormalize, got TinyData"):
        trainer.test(diffusion(), TinyData())


def test_what_cannot_judge_is_refused(classifier: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no classifier 'none\.ckpt'. Train one"):
        scores_of(diffusion(), tmp_path, classifier="none.ckpt")
    trainer = small_trainer(tmp_path, max_epochs=0)
    trainer.fit(diffusion(), digits())
    trainer.save_checkpoint(tmp_path / "diffusion.ckpt")
    with pytest.raises(ValueError, match="must hold a ClassificationTask, but holds a DiffusionTask"):
        ClassifierFeatures(tmp_path / "diffusion.ckpt")


def test_a_classifier_of_other_classes_is_refused(classifier: str, tmp_path: Path) -> None:
    class Letters(DigitsDataModule):
        @property
        def class_names(self) -> list[str]:
            return list("abcdefghij")

    data = Letters(image_size=8, channels=1, pixel_range="symmetric", batch_size=50)
    with pytest.raises(ValueError, match=r"knows the classes 0, 1, .* but the data have a, b, .* Take a classifier"):
        scores_of(diffusion(), tmp_path, data, classifier=classifier)


def test_a_classifier_without_a_last_linear_layer_is_refused(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    trainer = small_trainer(tmp_path, max_epochs=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dia_lightning.tasks.classification.get_model", lambda *_, **__: network)
        trainer.fit(ClassificationTask("cifar_resnet", 10), DigitsDataModule(image_size=8))
        trainer.save_checkpoint(tmp_path / "odd.ckpt")
        with pytest.raises(ValueError, match=r"odd\.ckpt does not end in a linear layer"):
            ClassifierFeatures(tmp_path / "odd.ckpt")


def test_a_file_that_is_not_inception_is_refused(classifier: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no file 'none\.pth'"):
        InceptionFeatures("none.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.pth is no file of weights"):
        InceptionFeatures(tmp_path / "text.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth does not hold the weights of torch-fidelity's Inception"):
        InceptionFeatures(tmp_path / "other.pth")


def test_images_that_are_not_finite_are_refused(classifier: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="makes images that are not finite, with 2 steps of ddim"):
        scores_of(Copier(torch.full((40, 1, 8, 8), torch.nan)), tmp_path, classifier=classifier)


def test_a_task_without_the_callback_needs_no_torch_fidelity(classifier: str, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
        assert "test/frechet_distance" in scores_of(diffusion(), tmp_path, classifier=classifier)
        with pytest.raises(ImportError, match=r"FID needs torch-fidelity: pip install 'dia-lightning\[diffusion\]'"):
            InceptionFeatures()
