"""Options of tasks: declared once for the command line, and once for editors."""

import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer
from typing_extensions import Unpack

from dia_lightning.models import get_model
from dia_lightning.tasks import (
    AttentionOptions,
    ClassificationTask,
    DetectionTask,
    DIATask,
    DiffusionTask,
    OptimizationOptions,
    TaskOptions,
    load_task,
)

FIELDS = {field.name: field for kind in (AttentionOptions, OptimizationOptions) for field in fields(kind)}


class Fixed(ClassificationTask):
    """A task of the user's own, with one network."""

    def __init__(self, width: int = 2, num_classes: int = 10, **options: Unpack[TaskOptions]) -> None:
        super().__init__("cifar_resnet", num_classes, backbone_args={"depth": 11}, **options)
        self.save_hyperparameters()


class Untyped(ClassificationTask):
    """One that hands on whatever it gets."""

    def __init__(self, backbone: str = "cifar_resnet", **kwargs: Any) -> None:
        super().__init__(backbone, **kwargs)


class Bare(DIATask):
    """One that forgets to attach the attention."""

    def __init__(self, width: int = 2, **options: Unpack[TaskOptions]) -> None:
        super().__init__(**options)
        self.backbone = get_model("cifar_resnet", depth=11, num_classes=10)


def test_what_editors_know_is_what_the_options_are() -> None:
    assert get_type_hints(TaskOptions) == {name: field.type for name, field in FIELDS.items()}


@pytest.mark.parametrize("kind", [DIATask, ClassificationTask, DetectionTask, DiffusionTask, Fixed, Bare])
def test_a_signature_shows_every_option(kind: type[DIATask]) -> None:
    shown = inspect.signature(kind).parameters
    defaults = {name: field.default for name, field in FIELDS.items()}
    if kind is DetectionTask:
        defaults["lr"] = 0.005
    assert {name: shown[name].default for name in FIELDS} == defaults
    assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in shown.values())
    assert all(f"\n    {name}: " in (kind.__init__.__doc__ or "") for name in FIELDS)


def test_an_instance_is_called_as_any_module() -> None:
    assert inspect.signature(Fixed()) == inspect.signature(torch.nn.Identity())


@pytest.mark.parametrize("kind", [ClassificationTask, DetectionTask, DiffusionTask, Fixed, Untyped, Bare])
def test_the_command_line_has_every_option_with_its_default_and_text(kind: type[DIATask]) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(kind, "model")
    options = {action.dest: action for action in parser._actions}
    for name, field in FIELDS.items():
        is_other = kind is DetectionTask and name == "lr"
        assert options[f"model.{name}"].default == (0.005 if is_other else field.default)
        assert options[f"model.{name}"].help
    values = parser.parse_args(["--model.share=block", "--model.lr=0.05", *_needed(kind)]).model
    assert (values.share, values.lr, values.identity) == ("block", 0.05, False)


def _needed(kind: type[DIATask]) -> list[str]:
    names = {ClassificationTask: "backbone", DiffusionTask: "backbone", DetectionTask: "detector"}
    return [f"--model.{names[kind]}=fcos"] if kind in names else []


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    # type checkers refuse it too: else the comments would be errors
    with pytest.raises(ValueError, match=r"^ClassificationTask has no option 'atention'\. Did you mean 'attention'"):
        ClassificationTask("cifar_resnet", 10, atention="se")  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"^Fixed has no option 'widht'\. Did you mean 'width'\?$"):
        Fixed(widht=3)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"^DetectionTask has no option 'zzz'\. help\(DetectionTask\) lists them\.$"):
        DetectionTask("fcos", "cifar_resnet", 3, zzz=1)  # type: ignore[call-arg]


def test_a_task_of_the_users_own_comes_back_with_its_options(tmp_path: Path) -> None:
    task = Fixed(3, lr=0.5, attention="se", share="block")
    assert (task.hparams["width"], task.hparams["lr"], task.hparams["share"]) == (3, 0.5, "block")
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(task)
    path = tmp_path / "fixed.ckpt"
    trainer.save_checkpoint(path)
    loaded = load_task(path)
    assert isinstance(loaded, Fixed)
    assert loaded.hparams == task.hparams
    assert Fixed.load_from_checkpoint(path, lr=0.1).lr == 0.1
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["hyper_parameters"]["wdith"] = 4
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"fixed\.ckpt do not fit: Fixed has no option 'wdith'\. Did you mean 'width'"):
        load_task(path)


def test_attention_that_is_never_attached_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attention='se' and existing='keep' have no effect, because Bare never"):
        Bare(attention="se").setup("validate")
    task = Bare(attention="se")
    task.attach_attention(task.backbone)
    task.trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    task.setup("validate")


def test_a_class_whose_source_cannot_be_read_keeps_its_options() -> None:
    made: dict[str, Any] = {"Base": ClassificationTask}
    code = "class Made(Base):\n def __init__(self, backbone='x', **kwargs): super().__init__(backbone, **kwargs)"
    exec(code, made)
    parser = ArgumentParser()
    parser.add_class_arguments(made["Made"], "model")
    assert {f"model.{name}" for name in FIELDS} <= {action.dest for action in parser._actions}


class Mixed:
    """A mixin that brings the constructor."""

    def __init__(self, *arguments: Any, mix: int = 1, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.remember({"mix": mix})  # type: ignore[attr-defined]


class WithMixin(Mixed, ClassificationTask):
    """A task whose own body has no constructor."""


def test_a_constructor_of_a_mixin_is_the_one_that_is_shown_and_loaded(tmp_path: Path) -> None:
    assert list(inspect.signature(WithMixin).parameters) == ["arguments", "mix", "options"]
    task = WithMixin("cifar_resnet", 10, backbone_args={"depth": 11}, mix=3)
    task.save_pretrained(tmp_path)
    assert WithMixin.from_pretrained(tmp_path).hparams["mix"] == 3


class Described(ClassificationTask):
    """A task whose constructor has a text of its own."""

    def __init__(self, width: int = 2, **options: Unpack[TaskOptions]) -> None:
        """Build it.

        Args:
            width: of the first layer.
        """
        super().__init__("cifar_resnet", 10, backbone_args={"depth": 11}, **options)


def test_options_are_described_beside_what_a_constructor_says_itself() -> None:
    text = Described.__init__.__doc__ or ""
    assert text.startswith("Build it.")
    assert all(f"\n    {name}: " in text for name in ("width", *FIELDS))


class Twice(DIATask):
    """A task that attaches attention to two networks."""

    def __init__(self, **options: Unpack[TaskOptions]) -> None:
        super().__init__(**options)
        self.backbone = get_model("cifar_resnet", depth=11, num_classes=10)
        self.attach_attention(self.backbone)
        self.attach_attention(self.backbone)


def test_attention_that_would_be_attached_to_one_network_only_is_refused() -> None:
    with pytest.raises(ValueError, match="attach_attention was called before"):
        Twice(attention="se")


def test_an_argument_called_options_is_remembered() -> None:
    class Kept(Bare):
        def __init__(self, options: dict[str, int] | None = None) -> None:
            super().__init__()
            self.remember({"options": options})

    assert Kept({"heads": 4}).hparams["options"] == {"heads": 4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "se", "attention_args": {"plug": "1"}}, "attention_args must not have 'plug'"),
        ({"share": "blok"}, "share must be one of stage, block, got 'blok'. Did you mean 'block'?"),
        ({"existing": "drop"}, "existing must be one of keep, replace, share, got 'drop'."),
    ],
)
def test_options_of_attention_are_checked_with_and_without_attention(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        AttentionOptions(**options)
