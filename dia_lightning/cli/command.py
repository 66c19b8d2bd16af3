"""The commands fit, validate, test and predict: LightningCLI, with explicit rules about checkpoints and errors."""

import logging
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from signal import SIGINT
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed.constants import default_pg_timeout

from dia_lightning._config_files import is_packaged
from dia_lightning._whole_files import remove_parts
from dia_lightning.callbacks import SafeCheckpointIO  # makes short names work for the other classes there
from dia_lightning.cli._around_fit import (
    CheckLaterTest,
    begin_anew,
    checkpoint_to_test,
    go_on_in_run,
    say_how_to_resume,
    say_if_nothing_was_trained,
)
from dia_lightning.cli._ensemble import ensemble_of
from dia_lightning.cli._errors import PROGRAM, UserError
from dia_lightning.cli._foreign_errors import while_building, while_running
from dia_lightning.cli._notes import say
from dia_lightning.cli._starting_point import StartingPoint, find_requeued, starting_point, with_config_of_run
from dia_lightning.cli._taken_arguments import TaskMaker
from dia_lightning.cli.parsing import config_reader
from dia_lightning.cli.parsing.own_classes import import_attention
from dia_lightning.cli.parsing.parsed_config import as_list, init_args_of, is_rate_monitor, notes_on_lists, run_roots
from dia_lightning.cli.parsing.parser import DIAArgumentParser, try_lists_of_loggers_first, try_whole_numbers_first
from dia_lightning.cli.parsing.refused_values import check_limits, refuse_null
from dia_lightning.cli.runs._resume import KeepRunTogether
from dia_lightning.cli.runs._saved_config import SaveRunConfig
from dia_lightning.cli.runs.slurm import job_of
from dia_lightning.cli.runs.version_folders import claim_versions
from dia_lightning.datamodules import DIADataModule
from dia_lightning.tasks import DIATask

PEER_TIMEOUT = timedelta(minutes=10)  # longer than for a loader's worker, whose error is more helpful


class DIACLI(LightningCLI):
    """LightningCLI for the tasks and datamodules of this package (or subclasses of their bases).

    The command line overrides config files, which override the checkpoint of ``--ckpt_path``, which overrides the
    defaults. Class paths in a checkpoint are never imported.

    Args:
        args: arguments as in a shell, the command first.
    """

    def __init__(self, args: Sequence[str]) -> None:
        self._start = StartingPoint()
        self._command = args[0] if args else ""
        job = job_of(args)
        args, config = with_config_of_run(args)
        if config is not None:
            say(f"config {config}")
        self._together = KeepRunTogether()
        self._together.job = job
        self._begins_anew = False
        super().__init__(
            DIATask,
            DIADataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_class=DIAArgumentParser,
            save_config_callback=SaveRunConfig,
            trainer_defaults={"callbacks": self._together},
            args=list(args),
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make the parser of the program or of one command."""
        mode = config_reader.install()
        return super().init_parser(prog=PROGRAM, parser_mode=mode, allow_abbrev=False, **kwargs)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # Lightning's is static
        """Return only the requested command, because collecting options is slow."""
        known = super().subcommands()
        return {self._command: known[self._command]} if self._command in known else known

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of every command besides Lightning's own."""
        parser.add_argument(
            "--test_after_fit", type=bool, default=False, help="After fit, test the best checkpoint (fit only)."
        )
        parser.add_argument(
            "--ensemble",
            type=list[str] | str | None,
            default=None,
            help="Checkpoints of classifiers whose probabilities are averaged, instead of --ckpt_path: a.ckpt,b.ckpt "
            "(validate, test and predict only).",
        )
        parser.link_arguments("data", "model.init_args.num_classes", self._count_classes, apply_on="instantiate")
        # skipped for tasks that do not take it
        parser.link_arguments("data", "model.init_args.image_shape", _image_shape, apply_on="instantiate")
        try_whole_numbers_first(parser)
        try_lists_of_loggers_first(parser)

    def _count_classes(self, data: DIADataModule) -> int:
        """Return the number of classes, from the checkpoint if the data are not available."""
        data.trained_classes = self._start.class_names
        return data.num_classes

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, keeping what the user gave separate from defaults."""
        self.config = parser.parse_args(args)
        for path in filter(None, self.config[self.config.subcommand].get("config") or ()):
            if is_packaged(path.absolute) and not Path(path.relative).exists():
                say(f"config {path.absolute}")
        check_limits(self.config[self.config.subcommand])
        given = parser.parse_args(args, defaults=False)
        self._given = init_args_of(given[given.subcommand].get("model"))
        for name, meaning in (("num_classes", "number of classes"), ("image_shape", "shape of the images")):
            if self._given.get(name) is not None:
                raise UserError(
                    f"--model.{name} {self._given[name]}: the {meaning} comes from the data. "
                    "Leave it out of the command and the config."
                )
        refuse_null("--model", self.config[self.config.subcommand].model.class_path, self._given)
        # only for what was given: a path in a checkpoint imports nothing
        import_attention(self._given.get("attention"), "--model.attention")
        for note in notes_on_lists(args, self.config[self.config.subcommand]):
            say(note)
        command = self.config.subcommand
        config = self.config[command]
        self._begins_anew = find_requeued(command, config, self._together.job)
        self._start = starting_point(command, config, self._given)
        self._together.source = self._start.source
        # hidden from Lightning, which lets the checkpoint override the command line and imports its class paths
        self._ckpt_path, config.ckpt_path = config.ckpt_path, None

    def before_instantiate_classes(self) -> None:
        """Fill in what depends on other options."""
        config = self.config[self.config.subcommand]
        config.ckpt_path = self._ckpt_path
        if config.get("weights_only") is False and "weights_only" in config:
            raise UserError("--weights_only false would run code from the checkpoint. Leave it out.")
        if config.get("weights_only", False) is None:
            config.weights_only = True  # otherwise an environment variable could let a checkpoint run code
        if self.config.subcommand == "predict" and config.return_predictions is None:
            config.return_predictions = False  # unused here, and the masks of a folder would fill the memory
        if config.trainer.logger is False:  # Lightning refuses to monitor learning rates without a logger
            callbacks = as_list(config.trainer.callbacks)
            config.trainer.callbacks = [item for item in callbacks if not is_rate_monitor(item)] or None
        if self._start.taken is not None:
            maker = TaskMaker(self, self._start.taken)
            self.parser.add_instantiator(maker, DIATask, subclasses=True)

    def instantiate_classes(self) -> None:
        """Build data, model and trainer; what they refuse is the user's to fix."""
        with while_building():
            super().instantiate_classes()
            members = self.config[self.config.subcommand].get("ensemble")
            if members is not None:
                self.model = ensemble_of(members)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer, with safe checkpoints unless the options or its strategy have their own checkpoint IO.

        A strategy given by name waits :data:`PEER_TIMEOUT` for a hanging process, not half an hour.
        """
        trainer = super().instantiate_trainer(**kwargs)
        claim_versions(trainer.loggers)
        strategy = trainer.strategy
        named = isinstance(self.config[self.config.subcommand].trainer.strategy, str)
        if named and getattr(strategy, "_timeout", None) == default_pg_timeout:
            strategy._timeout = PEER_TIMEOUT  # type: ignore[attr-defined]
        if strategy._checkpoint_io is None and type(strategy).checkpoint_io is Strategy.checkpoint_io:
            strategy.checkpoint_io = SafeCheckpointIO()
        return trainer

    def before_fit(self) -> None:
        """Prepare the test after it, and continue in the run of the checkpoint unless the options specify another."""
        if self.config.fit.test_after_fit:
            callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
            callbacks.insert(0, CheckLaterTest())
        if self._begins_anew:
            begin_anew(self.trainer)
        go_on_in_run(self.trainer, self._together)

    def after_fit(self) -> None:
        """Test the best checkpoint if requested."""
        ckpt_path = self.config.fit.ckpt_path
        say_if_nothing_was_trained(self.trainer, self._together, ckpt_path)
        if self.config.fit.test_after_fit:
            best = checkpoint_to_test(self.trainer, self._together, ckpt_path)
            self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=best, weights_only=True)

    def _run_subcommand(self, subcommand: str) -> None:
        if self.trainer.is_global_zero:
            for part in remove_parts(run_roots(self.config[subcommand].trainer)):
                say(f"removed {part}, which a killed run had left")
        try:
            with while_running(self.config[subcommand].get("ckpt_path")):
                super()._run_subcommand(subcommand)
        except SystemExit as stop:
            if not self.trainer.interrupted:
                raise
            if subcommand == "fit":
                say_how_to_resume(self.trainer)
            # Lightning exits with 1 after Ctrl-C
            raise SystemExit(stop.code if isinstance(stop, SIGTERMException) else 128 + SIGINT) from stop
        finally:
            self._together.lock.release()


class _Rehearsal(DIACLI):
    """Parses and builds what a command needs, without running it."""

    def __init__(self, args: Sequence[str], *, trainer: bool) -> None:
        self._with_trainer = trainer
        super().__init__(args)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Skip the trainer if its devices may be elsewhere."""
        return super().instantiate_trainer(**kwargs) if self._with_trainer else None

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def rehearse(args: Sequence[str], *, trainer: bool = True) -> DIACLI:
    """Build what a command needs without running it, to find mistakes early.

    Args:
        args: arguments as in a shell, the command first.
        trainer: whether to build the trainer too, whose devices must exist.

    Returns:
        The task as ``model`` and its data as ``datamodule``.

    Raises:
        UserError: if something cannot be built.
        SystemExit: if the arguments are wrong, with a line on stderr.
    """
    logging.disable(logging.INFO)  # available devices and so on
    try:
        return _Rehearsal(args, trainer=trainer)
    finally:
        logging.disable(logging.NOTSET)


def run(args: Sequence[str]) -> None:
    """Run one command without Lightning's advertisements.

    Args:
        args: arguments as in a shell, the command first.
    """
    adverts = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    adverts.addFilter(_is_no_advert)
    # a full disk or the locale must not cause a stack trace per log line, up to the very end
    logging.raiseExceptions = False
    try:
        with warnings.catch_warnings():
            # from Lightning 2.6 about its own code, with torch 2.13 and later
            warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
            DIACLI(args)
    finally:
        adverts.removeFilter(_is_no_advert)


def _image_shape(data: DIADataModule) -> list[int] | None:
    """Return the shape (C, H, W) of the images, if they all have one."""
    shape = getattr(data, "image_shape", None)
    return None if shape is None else list(shape)


def _is_no_advert(record: logging.LogRecord) -> bool:
    return "Tip: For seamless cloud" not in record.getMessage()
