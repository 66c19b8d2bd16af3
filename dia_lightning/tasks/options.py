"""Options common to all tasks, as keywords of their constructors."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, TypedDict

from typing_extensions import Unpack

from dia_lightning._choices import did_you_mean, near
from dia_lightning.tasks._freezing import Freeze
from dia_lightning.tasks.attention_options import Attention, AttentionOptions
from dia_lightning.tasks.optimization_options import OptimizationOptions, OptimizerOption, ScheduleOption


class OtherTaskOptions(TypedDict, total=False):
    """:class:`TaskOptions` without ``lr``, for tasks with a default of their own."""

    attention: Attention | None
    attention_args: dict[str, Any] | None
    share: Literal["stage", "block"]
    plug: str | list[int] | None
    branches: list[Literal["conv", "attention", "mlp"]] | None
    sites: str | list[str] | list[list[str]] | None
    existing: Literal["keep", "replace", "share"]
    identity: bool
    branch_norm: bool | None
    optimizer: OptimizerOption
    momentum: float
    nesterov: bool
    weight_decay: float
    norm_weight_decay: bool
    attention_lr: float
    layer_decay: float
    freeze: Freeze
    schedule: ScheduleOption
    schedule_interval: Literal["epoch", "step"]
    schedule_frequency: int
    schedule_monitor: str | None
    milestones: Sequence[int]
    gamma: float
    warmup_epochs: int
    warmup_steps: int


class TaskOptions(OtherTaskOptions, total=False):
    """The fields of :class:`AttentionOptions` and :class:`OptimizationOptions` as keywords of a constructor.

    Editors and type checkers know them from ``**options: Unpack[TaskOptions]``. In a task, ``inspect.signature``,
    ``help`` and ``--help`` do too.
    """

    lr: float


@dataclass(frozen=True, kw_only=True)
class Options(OptimizationOptions, AttentionOptions):
    """Both, as a constructor takes them."""

    def __post_init__(self) -> None:
        AttentionOptions.__post_init__(self)
        OptimizationOptions.__post_init__(self)

    def values_of(self, kind: type[AttentionOptions | OptimizationOptions]) -> dict[str, Any]:
        """Return the options of one kind by name."""
        return {field.name: getattr(self, field.name) for field in fields(kind)}


class TakesOptions:
    """Base of classes with constructors that take ``**options: Unpack[TaskOptions]``, and show each of them."""

    __signature__: ClassVar[Any] = None

    def __init__(self, **options: Unpack[TaskOptions]) -> None:
        self.refuse_unknown(options)
        super().__init__()
        self._options = Options(**options)

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if "__init__" in vars(cls):
            cls.__signature__ = _OfClass(_written_out(vars(cls)["__init__"]), vars(cls)["__init__"])

    @classmethod
    def option_names(cls) -> set[str]:
        """Return the keywords that the constructors of the class and its bases take."""
        kinds = [base for base in cls.__mro__ if issubclass(base, TakesOptions)]
        return {name for base in kinds for name in inspect.signature(base).parameters}

    @classmethod
    def refuse_unknown(cls, names: Iterable[str], known: Iterable[str] = TaskOptions.__annotations__) -> None:
        """Raise a ValueError with the closest names if a name is unknown."""
        for name in (name for name in names if name not in known):
            hint = did_you_mean(near(name, cls.option_names())) or f" help({cls.__name__}) lists them."
            raise ValueError(f"{cls.__name__} has no option {name!r}.{hint}")


class _OfClass:
    """An attribute of classes that their instances lack, since calling an instance differs."""

    def __init__(self, value: Any, constructor: Any) -> None:
        self.value, self.constructor = value, constructor

    def __get__(self, instance: object, kind: type) -> Any:
        if instance is not None:
            raise AttributeError
        brought = getattr(kind, "__init__", None)  # by a mixin or a decorator, it may be another
        return self.value if brought is self.constructor else None


def _written_out(constructor: Callable[..., None]) -> inspect.Signature | None:
    """Return the signature with each option in place of ``**options``, and describe them in the docstring."""
    own = list(inspect.signature(constructor).parameters.values())[1:]  # without self
    if not own or own[-1].kind is not inspect.Parameter.VAR_KEYWORD or "TaskOptions" not in str(own[-1].annotation):
        return None
    last = own.pop()
    # jsonargparse finds no defaults in a TypedDict, only those of the base that options of any type are passed on to
    constructor.__annotations__[last.name] = Any
    docs = [inspect.getdoc(kind) or "" for kind in (AttentionOptions, OptimizationOptions)]
    texts = [doc.partition("Args:\n")[2].partition("\n\n")[0] for doc in docs]
    before, args, after = (inspect.getdoc(constructor) or "Take options, beside the arguments of the class.").partition(
        "Args:\n"
    )
    constructor.__doc__ = "\n".join([before if args else f"{before}\n", "Args:", *texts, after]).rstrip()
    options = [
        inspect.Parameter(field.name, last.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in fields(Options)
        if field.name not in {parameter.name for parameter in own}
    ]
    return inspect.Signature([*own, *options])


# Only this constructor's function shows them, for classes whose source jsonargparse cannot read. Lightning looks the
# names up in the frames of constructors that save hyperparameters.
_OWN = inspect.signature(TakesOptions.__init__)
_SHOWN = [_OWN.parameters["self"], *inspect.signature(Options).parameters.values()]
_written_out(TakesOptions.__init__)
TakesOptions.__init__.__signature__ = _OWN.replace(parameters=_SHOWN)  # type: ignore[attr-defined]
