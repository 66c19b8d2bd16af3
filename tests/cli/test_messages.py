"""A mistake on the command line or in a config is one line that names it and what was meant."""

from collections.abc import Callable
from pathlib import Path

import pytest

Fails = Callable[..., str]
OWN = """\
from lightning.pytorch import LightningDataModule, LightningModule
from dia_lightning.datamodules import ClassificationDataModule

class Data(LightningDataModule): ...
class Half(ClassificationDataModule): ...
class Task(LightningModule): ...
"""


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--model.lrr", "1"], "--model.lrr: ClassificationTask has no such option. Did you mean 'lr'?"),
        (["--data.batchsize", "1"], "--data.batchsize: DigitsDataModule has no such option. Did you mean 'batch_size'"),
        (["--trainer.max_epoch", "1"], "Unknown option --trainer.max_epoch. Did you mean '--trainer.max_epochs'"),
        (["--trianer.max_epochs", "1"], "Unknown option --trianer.max_epochs. Did you mean '--trainer.max_epochs'"),
        (["--test_after"], "Unknown option --test_after"),
        (["extra"], "Unexpected argument 'extra'"),
        (["--model", "ClassificatonTask"], "--model: there is no class 'ClassificatonTask'. Did you mean 'Classific"),
        (["--data", "DigitDataModule"], "--data: there is no class 'DigitDataModule'. Did you mean 'DigitsDataModule'"),
        (["--data", "nowhere.Data"], "--data: cannot import the class: No module named 'nowhere'"),
        (["--trainer.callbacks+=EarlyStoping"], "there is no class 'EarlyStoping'. Did you mean 'EarlyStopping'?"),
        (
            ["--trainer.logger", "WandbLogger"],
            "--trainer.logger: there are several classes named WandbLogger. Give one by",
        ),
        (
            ["--trainer.logger+=dia_lightning.loggers.WandbLogger", "--trainer.logger.anonymous", "true"],
            "--trainer.logger.anonymous: WandbLogger has no such option. Known: config",
        ),
        (
            ["--trainer.logger+=dia_lightning.loggers.WandbLogger", "--trainer.logger.watch_freq", "0"],
            "watch_freq must be 1 step or more, got 0. Use 200",
        ),
        (["--model.lr", "None"], "--model.lr: null does not fit. Give a value, or leave it out for the default, 0.1."),
        (["--model.optimizer", "null"], "--model.optimizer: null does not fit"),
        (["--model.lr", "fast"], "--model.lr: 'fast' does not fit. Expected float"),
        (["--model.lr", "nan"], "--model.lr: 'nan' does not fit. Expected float"),
        (["--model.lr", ".nan"], "must be a finite number, got .nan"),
        (["--model.lr", "-0.1"], "lr must be a positive number, got -0.1"),
        (["--model.compile", "bloks"], "--model.compile: 'bloks' does not fit. Expected bool or 'blocks'."),
        (["--model.share", "blok"], "--model.share: 'blok' does not fit. Did you mean 'block'?"),
        (["--trainer.max_epochs", "two"], "--trainer.max_epochs: 'two' does not fit. Expected int or null"),
        (
            ["--model.num_classes", "7"],
            "--model.num_classes 7: the number of classes comes from the data. Leave it out",
        ),
        (["--model.backbone", "cifar_resnat"], "Unknown model 'cifar_resnat'. Did you mean 'cifar_resnet'"),
        (["--model.backbone_args.depth", "12"], "depth"),
        (["--model.backbone_args.deph", "11"], "cifar_resnet does not take 'deph'. It takes: depth"),
        (["--model.optimizer", "adma"], "'adma' is none of 'sgd', 'adamw', and no path of a class"),
        (["--model.optimizer", "adamw", "--model.optimizer.lr", "1"], "--model.optimizer.lr: what is given by a short"),
        (
            ["--model.optimizer", "AdamW", "--model.optimizer.lr", "fast"],
            "--model.optimizer.lr: 'fast' does not fit. Expected float.",
        ),
        (["--model.optimizer", "AdamW", "--model.optimizer.wd", "1"], "--model.optimizer.wd: AdamW has no such option"),
        (["--model.schedule", "StepLR"], "--model.schedule.step_size missing: StepLR cannot be built without."),
        (["--model.optimizer", "own.Data"], "--model.optimizer: own.Data is a LightningDataModule, but no Optimizer."),
        (
            ["--model", "own.Task"],
            "--model: own.Task is a LightningModule, but no DIATask. Derive it from dia_light",
        ),
        (["--data", "own.Data"], "--data: own.Data is a LightningDataModule, but no DIADataModule, from which a task"),
        (["--data", "own.Half"], "--data: own.Half cannot be built, because it does not define basic_augmentation, c"),
        (["--data", "own.Dat"], "--data: own has no class 'Dat'. Did you mean 'Data'"),
        (["--data", "broken.Data"], "--data: cannot import broken.Data: name 'undefined' is not defined."),
        (["--trainer.callbacks.patience", "3"], "ModelCheckpoint has no such option. Known"),
        (["--model.attention", "dia-lstn"], "Unknown attention 'dia-lstn'. Did you mean 'dia-lstm'"),
        (["--model.init_from", "nowhere.pt"], "There is no file 'nowhere.pt'"),
        (
            ["--data.val_split", "-1"],
            "val_split must be a number of samples (0, 1, 2, ...) or a fraction below 1 (such as 0.1), got -1.",
        ),
        (["--data.batch_size", "64"], "20 training samples"),
        (["--trainer.accelerator", "gpuu"], "invalid accelerator name"),
    ],
)
def test_option(fails: Fails, workplace: Path, options: list[str], expected: str) -> None:
    Path("own.py").write_text(OWN)
    Path("broken.py").write_text("undefined")
    assert expected in fails("fit", "-c", "tiny.yaml", *options)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("lr: 0.05", "lrr: 0.05", "--model.lrr: ClassificationTask has no such option. Did you mean 'lr'?"),
        ("max_epochs", "max_epoch", "Unknown option --trainer.max_epoch. Did you mean '--trainer.max_epochs'"),
        ("trainer:", "trainr:", "Unknown option --trainr."),
        (
            "ClassificationTask",
            "Classification",
            "there is no class 'Classification'. Did you mean 'ClassificationTask",
        ),
        ("ModelCheckpoint", "ModelChekpoint", "there is no class 'ModelChekpoint'. Did you mean 'ModelCheckpoint'"),
        ("{monitor:", "{monitr:", "--trainer.callbacks.monitr: ModelCheckpoint has no such option. Did you mean 'moni"),
        ("lr: 0.05", "lr: .nan", "lr must be a finite number, got .nan"),
        ("lr: 0.05", "lr: 0.05\n    lr: 0.5", "lr is given twice, in lines 22 and 23. Keep one."),
        ("lr: 0.05", "lr: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("lr: 0.05", "lr: [0.05", "while parsing"),
        ("lr: 0.05", "num_classes: 10", "--model.num_classes 10: the number of classes comes from the data"),
    ],
)
def test_config(fails: Fails, workplace: Path, before: str, after: str, expected: str) -> None:
    text = (workplace / "tiny.yaml").read_text()
    assert before in text
    Path("wrong.yaml").write_text(text.replace(before, after, 1))
    assert expected in fails("fit", "-c", "wrong.yaml")


def test_duplicate_key_names_the_file(fails: Fails) -> None:
    Path("twice.yaml").write_text("trainer: {max_epochs: 1, max_epochs: 2}\n")
    assert fails("fit", "-c", "tiny.yaml", "-c", "twice.yaml").startswith("twice.yaml: max_epochs is given twice")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["fitt"], "Unknown command 'fitt'. Did you mean 'fit'?"),
        (["analize", "best"], "Unknown command 'analize'. Did you mean 'analyze'?"),
        (
            ["run"],
            "Unknown command 'run'. Known: analyze, check, configs, export, fit, models, predict, reproduce, sa",
        ),
        (["fit", "--data.batch_size", "3"], "--data missing: give a config"),
        (["fit", "--data", "DigitsDataModule", "--model.backbone", "x"], "--model missing: give a config"),
        (["model"], "Unknown command 'model'. Did you mean 'models'?"),
        (["fit"], "--data, --model missing: give a config"),
        (["fit", "-c", "tinny.yaml"], "There is no file tinny.yaml. Did you mean tiny.yaml?"),
        (["models", "--cost", "resnt164"], "Unknown model 'resnt164'"),
        (["models", "nothing*"], "No network matches 'nothing*'"),
    ],
)
def test_command(fails: Fails, args: list[str], expected: str) -> None:
    assert expected in fails(*args)
