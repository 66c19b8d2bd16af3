"""GenerationScores: against distances computed by hand and by torch-fidelity, and what it leaves alone."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch_fidelity
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from scipy.linalg import sqrtm
from torch import Tensor, nn
from torch.utils.data import Dataset

from dia_lightning.callbacks import EMA, GenerationScores
from dia_lightning.datamodules import DigitsDataModule
from dia_lightning.datamodules.sources import ArraySource
from dia_lightning.tasks import ClassificationTask, DiffusionTask, load_task
from dia_lightning.tasks.generation_metrics import DescribedImages, class_agreement, inception_score, kernel_distance
from dia_lightning.tasks.image_features import ClassifierFeatures, InceptionFeatures
from tests.callbacks.random_inception import write_inception_weights
from tests.callbacks.tiny_classifier import TinyData
from tests.tasks.conftest import small_trainer
from tests.two_processes import on_two_processes

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
    generated = features(task.sample(60, steps=2, classes=[label for label in range(10) for _ in range(6)]))
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
    turns = torch.cat([torch.nonzero(labels == label)[:20] for label in range(10)]).flatten()  # 0, 0, ..., 9, 9
    found = scores_of(Copier(images[turns]), tmp_path, classifier=classifier, num_samples=200)
    assert found["test/class_agreement"] == pytest.approx(found["test/class_agreement_real"], abs=0.06)
    whole = scores_of(Copier(images), tmp_path, classifier=classifier, num_samples=250)
    assert whole["test/class_agreement_real"] == pytest.approx(accuracy, abs=0.009)  # there 10x10 pixels are rounded
    shuffled = scores_of(Copier(images[turns.roll(20)]), tmp_path, classifier=classifier, num_samples=200)
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
    assert "(40 generated and 40 real images, each compared with 100 training images); 2 steps of ddim" in caplog.text


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
def test_scores_by_inception_are_those_of_torch_fidelity(tmp_path: Path) -> None:
    inception_weights = str(write_inception_weights(tmp_path / "inception.pth"))
    data, task = digits(limit=12), diffusion()
    found = scores_of(task, tmp_path, data, inception=inception_weights, num_samples=12)
    reference = data.denormalize(torch.cat([batch[0] for batch in data.evaluation_dataloader("train")]))
    expected = torch_fidelity.calculate_metrics(
        input1=Pictures(task.sample(12, steps=2, classes=data_labels(data))),
        input2=Pictures(reference),
        feature_extractor_weights_path=inception_weights,
        cuda=False,
        fid=True,
        kid=True,
        kid_subset_size=12,
        kid_subsets=2,
        isc=True,
        isc_splits=1,
        cache=False,
        verbose=False,
        save_cpu_ram=True,
    )
    assert expected["frechet_inception_distance"] > 1
    assert found["test/fid"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-3)
    assert found["test/kid"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-3)
    assert found["test/inception_score"] == pytest.approx(expected["inception_score_mean"], rel=1e-3)
    assert {"test/fid_real", "test/kid_real", "test/inception_score_real"} <= set(found)


def data_labels(data: DigitsDataModule) -> list[int]:
    """Return the labels of the training images in the order of the classes, since both sets have equally many."""
    labels = torch.cat([batch[1] for batch in data.evaluation_dataloader("train")])
    return [int(label) for label in labels.sort().values]


def test_subsets_and_parts_give_deviations_only_where_there_are_enough_images() -> None:
    torch.manual_seed(0)
    few, many = (described(torch.randn(count, 5)) for count in (19, 1100))
    assert kernel_distance(few, few)[1] is None
    assert inception_score(few)[1] is None
    _, kernel_deviation = kernel_distance(many, described(torch.randn(1100, 5)))
    _, score_deviation = inception_score(many)
    assert kernel_deviation is not None
    assert score_deviation is not None
    assert min(kernel_deviation, score_deviation) > 1e-4


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


def test_classes_are_asked_for_in_the_shares_that_they_have_in_training(classifier: str, tmp_path: Path) -> None:
    asked: list[int] = []

    class Watched(Copier):
        def sample(self, count: int, *, classes: list[int], **options: Any) -> Tensor:  # type: ignore[override]
            asked.extend(classes)
            return super().sample(count, **options)

    class Uneven(DigitsDataModule):
        def load_split(self, split: Any) -> Any:
            source = super().load_split(split)
            if not isinstance(source, ArraySource):
                return source
            kept = np.flatnonzero((source.labels == 7) | (np.arange(len(source.labels)) % 9 == 0))
            return ArraySource(source.images[kept], source.labels[kept], split=split, channels=1)

    data = Uneven(image_size=8, channels=1, pixel_range="symmetric", batch_size=50, val_split=20)
    images, _ = images_of("train")
    found = scores_of(Watched(images), tmp_path, data, classifier=classifier, num_samples=30)
    labels = torch.cat([batch[1] for batch in data.evaluation_dataloader("train")])
    shares = labels.bincount(minlength=10) / len(labels)
    assert torch.allclose(torch.tensor(asked).bincount(minlength=10) / 30, shares, atol=1 / 30)
    assert found["test/generated_images"] == 30


def test_other_data_are_not_compared_with_those_of_the_test_before(classifier: str, tmp_path: Path) -> None:
    scores, task = GenerationScores(classifier=classifier, steps=2, num_samples=20), diffusion()
    found = []
    for limit in (40, 80):
        trainer = small_trainer(tmp_path, callbacks=[scores])
        found.append(trainer.test(task, digits(limit=limit), verbose=False)[0]["test/frechet_distance_real"])
    assert (
        found[1]
        == scores_of(task, tmp_path, digits(limit=80), classifier=classifier, num_samples=20)[
            "test/frechet_distance_real"
        ]
    )
    assert found[0] != found[1]


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


def test_epochs_that_validation_skips_are_warned_about(classifier: str, tmp_path: Path) -> None:
    scores = GenerationScores(classifier=classifier, every_n_epochs=2)
    trainer = small_trainer(tmp_path, callbacks=[scores], max_epochs=1, check_val_every_n_epoch=5)
    with pytest.warns(UserWarning, match="validation after every 5 epochs only, so scores come after every 10 epochs"):
        trainer.fit(diffusion(), digits(limit=50))


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


def test_two_processes_score_what_one_scores(classifier: str, tmp_path: Path) -> None:
    alone = scores_of(diffusion(), tmp_path, digits(limit=61), classifier=classifier, num_samples=41)
    scores = GenerationScores(classifier=classifier, steps=2, num_samples=41, batch_size=9)
    trainer = small_trainer(tmp_path, callbacks=[scores], **on_two_processes())
    together = trainer.test(diffusion(), digits(limit=61), verbose=False)[0]
    assert dict(together) == pytest.approx(dict(alone), rel=1e-4)


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
    with pytest.raises(ValueError, match=r"GenerationScores: guidance=2\.0 needs a conditional task"):
        scores_of(diffusion(conditional=False), tmp_path, classifier=classifier, guidance=2.0)
    with pytest.raises(ValueError, match="steps must divide the 1000 timesteps"):
        scores_of(diffusion(), tmp_path, classifier=classifier, steps=3)
    with pytest.raises(ValueError, match="GenerationScores needs a task with a method sample"):
        scores_of(load_task(classifier), tmp_path, classifier=classifier)


@pytest.mark.parametrize(("dropout", "guidance"), [(0.0, 2.0), (0.1, float("nan"))])
def test_guidance_that_cannot_work_ends_a_fit_before_its_first_step(
    dropout: float, guidance: float, classifier: str, tmp_path: Path
) -> None:
    scores = GenerationScores(classifier=classifier, guidance=guidance)
    trainer = small_trainer(tmp_path, callbacks=[scores])
    with pytest.raises(ValueError, match=r"GenerationScores: guidance.*(label_dropout above 0|finite number, got nan)"):
        trainer.fit(diffusion(label_dropout=dropout), digits(limit=50, batch_size=25))
    assert trainer.global_step == 0


def test_weights_that_are_split_over_processes_are_refused(classifier: str, tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path)
    trainer.strategy.__class__ = FSDPStrategy  # which itself needs a GPU
    with pytest.raises(ValueError, match="GenerationScores cannot make images with FSDPStrategy"):
        GenerationScores(classifier=classifier).setup(trainer, diffusion(), "test")


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
    with pytest.raises(ValueError, match=r"the classes \[0, 1, .* but the data have \[a, b, .* Take a classifier"):
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
    with pytest.raises(ValueError, match=r"text\.pth is not a weights file"):
        InceptionFeatures(tmp_path / "text.pth")
    with pytest.MonkeyPatch.context() as patch:  # the same for a file that lies where the download would be
        patch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth").write_text("hello")
        with pytest.raises(ValueError, match=r"6726825d\.pth is not a weights file"):
            InceptionFeatures()
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth does not hold the weights of torch-fidelity's Inception"):
        InceptionFeatures(tmp_path / "other.pth")


def test_a_download_that_fails_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionResetError("connection reset")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(ValueError, match=r"cannot be downloaded \(connection reset\). Fetch https://.* give the file"):
        InceptionFeatures()


def test_images_that_are_not_finite_are_refused(classifier: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="makes images that are not finite, with 2 steps of ddim"):
        scores_of(Copier(torch.full((40, 1, 8, 8), torch.nan)), tmp_path, classifier=classifier)


def test_a_task_without_the_callback_needs_no_torch_fidelity(classifier: str, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
        assert "test/frechet_distance" in scores_of(diffusion(), tmp_path, classifier=classifier)
        with pytest.raises(ImportError, match=r'FID needs torch_fidelity: pip install "dia-lightning\[diffusion\]"'):
            InceptionFeatures()
