"""Options that a command takes from a checkpoint go to the task directly, not through the parser, which may import."""

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
    """Builds the task of a command from its config, except for what comes from a checkpoint.

    Args:
        cli: the command; the taken values are added to its config once the task has been built with them.
        taken: passed to the constructor unchanged.
    """

    def __init__(self, cli: LightningCLI, taken: TakenArguments) -> None:
        super().__init__(cli, "model")
        self._taken = taken

    # the name that jsonargparse expects
    def __call__(self, class_type: Any, *args: Any, applied_instantiation_links: dict[str, Any], **kwargs: Any) -> Any:
        """Build the task."""
        values = dict(self._taken.values)
        self.cli._dump_config()  # where a custom task looks for its arguments
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
