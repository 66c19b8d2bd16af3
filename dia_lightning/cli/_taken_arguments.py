"""Options that a command takes from a checkpoint, on their way into the task: past the parser, which could import."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.cli import LightningCLI, _InstantiatorFn

from dia_lightning.cli._errors import UserError


@dataclass(frozen=True)
class TakenArguments:
    """Plain values from a checkpoint.

    Args:
        path: of the checkpoint.
        values: arguments of the task by name.
    """

    path: str
    values: Mapping[str, Any]


class TaskMaker(_InstantiatorFn):
    """Builds the task of a command as its config says, but for what comes from a checkpoint.

    Args:
        cli: the command; what was taken is added to its config, once the task has been built with it.
        taken: goes into the constructor as it is.
    """

    def __init__(self, cli: LightningCLI, taken: TakenArguments) -> None:
        super().__init__(cli, "model")
        self._taken = taken

    # with the name that jsonargparse looks for
    def __call__(self, class_type: Any, *args: Any, applied_instantiation_links: dict[str, Any], **kwargs: Any) -> Any:
        """Build the task."""
        values = dict(self._taken.values)
        self.cli._dump_config()  # where a task of the user's own looks for its arguments
        self.cli.config_dump["model"]["init_args"] |= values
        try:
            task = super().__call__(
                class_type, *args, applied_instantiation_links=applied_instantiation_links, **{**kwargs, **values}
            )
        except TypeError as error:  # values of other types fail in many ways
            raise UserError(
                f"The hyper-parameters of {self._taken.path} do not fit {class_type.__name__}: {error}."
            ) from error
        config = self.cli.config[self.cli.config.subcommand]
        for name, value in values.items():  # for the config of the run
            config.model.init_args[name] = value
        return task
