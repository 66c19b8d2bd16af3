"""The commands fit, validate, test and predict: LightningCLI, with explicit rules about checkpoints and errors."""

import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from signal import SIGINT
from typing import Any

from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed.constants import default_pg_timeout

from dia_lightning._config_files import is_packaged
from dia_lightning._redact import redact, redact_text
from dia_lightning._whole_files import remove_parts
from dia_lightning.callbacks import SafeCheckpointIO  # the classes beside it can then be given by their short names
from dia_lightning.cli import _ensemble
from dia_lightning.cli._config_of_run import with_config_of_run
from dia_lightning.cli._errors import PROGRAM, UserError, is_for_the_user, is_ours
from dia_lightning.cli._later_test import CheckLaterTest
from dia_lightning.cli._task_maker import TakenArguments, TaskMaker
from dia_lightning.cli.parsing import config_reader
from dia_lightning.cli.parsing.class_messages import imported
from dia_lightning.cli.parsing.help import describe_checkpoints
from dia_lightning.cli.parsing.own_classes import import_attention
from dia_lightning.cli.parsing.parsed_config import as_list, init_args_of, is_rate_monitor, notes_on_lists, run_roots
from dia_lightning.cli.parsing.parser import DIAArgumentParser, try_lists_of_loggers_first, try_whole_numbers_first
from dia_lightning.cli.parsing.refused_values import check_limits, refuse_null
from dia_lightning.cli.runs.checkpoint_misfit import (
    check_attention_is_named,
    check_fits,
    is_while_restoring,
    misfit,
    not_restored,
)
from dia_lightning.cli.runs.find_checkpoint import find_checkpoint
from dia_lightning.cli.runs.read_checkpoint import (
    check_is_of_run,
    class_names,
    hyper_parameters,
    read_checkpoint,
    without_files,
)
from dia_lightning.cli.runs.resume import KeepRunTogether, take_up
from dia_lightning.cli.runs.run_of_checkpoint import head, source_of
from dia_lightning.cli.runs.saved_config import SaveRunConfig, wandb_id
from dia_lightning.cli.runs.slurm import is_of_other_job, job_of, saved_before_requeue, taken_by_lightning
from dia_lightning.cli.runs.version_folders import claim_versions
from dia_lightning.datamodules import DIADataModule
from dia_lightning.loggers.wandb import WandbLogger
from dia_lightning.tasks import DIATask
from dia_lightning.tasks.checkpoints import check_is_related

PEER_TIMEOUT = timedelta(minutes=10)  # longer than for a loader's worker, whose error says more
_PACKING = ("Does not validate against", "Call to compute_fn of link")


class DIACLI(LightningCLI):
    """LightningCLI for the tasks and datamodules of this package (or subclasses of their bases).

    The command line overrides config files, these override the checkpoint of ``--ckpt_path``, and that the defaults.
    Class paths that a checkpoint holds are never imported.

    Args:
        args: arguments as in a shell, the command first.
    """

    def __init__(self, args: Sequence[str]) -> None:
        self._trained_classes: list[str] | None = None
        self._from_checkpoint: TakenArguments | None = None
        self._command = args[0] if args else ""
        job = job_of(args)
        args, config = with_config_of_run(args)
        if config is not None:
            _say(f"config {config}")
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

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        # to collect the options of a command takes time: leave those out that nobody asks for
        if self._command in self.subcommands() and self._command != subcommand:
            return self.init_parser(**kwargs)
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        describe_checkpoints(parser, subcommand)
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what every command takes beside Lightning's own options."""
        parser.add_argument(
            "--test_after_fit", type=bool, default=False, help="After fit, test the best checkpoint (fit only)."
        )
        parser.add_argument(
            "--ensemble",
            type=list[str] | str | None,
            default=None,
            help="Checkpoints of classifiers whose probabilities are averaged, in place of --ckpt_path: a.ckpt,b.ckpt "
            "(validate, test and predict only).",
        )
        parser.link_arguments("data", "model.init_args.num_classes", self._count_classes, apply_on="instantiate")
        # a task that does not take it goes without
        parser.link_arguments("data", "model.init_args.image_shape", _image_shape, apply_on="instantiate")
        try_whole_numbers_first(parser)
        try_lists_of_loggers_first(parser)

    def _count_classes(self, data: DIADataModule) -> int:
        """Return the number of classes; where the data are not at hand, that of the checkpoint."""
        data.trained_classes = self._trained_classes
        return data.num_classes

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and keep apart what the user gave from what is default."""
        self.config = parser.parse_args(args)
        for path in filter(None, self.config[self.config.subcommand].get("config") or ()):
            if is_packaged(path.absolute) and not Path(path.relative).exists():
                _say(f"config {path.absolute}")
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
        # of what was given only: a path that a checkpoint has imports nothing
        import_attention(self._given.get("attention"), "--model.attention")
        for note in notes_on_lists(args, self.config[self.config.subcommand]):
            _say(note)

    def _parse_ckpt_path(self) -> None:
        """Replace Lightning's way, which lets the checkpoint overrule the command line and imports its class paths."""
        config = self.config[self.config.subcommand]
        self._find_requeued(config)
        if (config.get("ensemble") or config.get("ckpt_path")) and config.model.init_args.get("init_from") is not None:
            config.model.init_args.init_from = None  # checkpoints have all weights, and the file may be gone
        if config.get("ensemble") is not None:
            self._find_members(config)
            return
        if config.get("ckpt_path") is None:
            if self.config.subcommand != "fit" and config.model.init_args.get("init_from") is None:
                _say("no --ckpt_path: using the network as it is built; for the trained one add --ckpt_path best")
            return
        config.ckpt_path = find_checkpoint(str(config.ckpt_path), run_roots(config.trainer))
        _say(f"checkpoint {config.ckpt_path}")
        # a sharded checkpoint is a folder and keeps its hyper-parameters elsewhere
        sharded = Path(config.ckpt_path).is_dir()
        checkpoint = head(Path(config.ckpt_path)) if sharded else read_checkpoint(config.ckpt_path)
        if not sharded:
            check_is_of_run(checkpoint, config.ckpt_path, self.config.subcommand)
            check_is_related(checkpoint["dia_task"], imported(config.model.class_path), config.ckpt_path)
        if self.config.subcommand == "fit":
            self._together.source = source_of(config.ckpt_path, checkpoint)
        if not sharded:
            self._trained_classes = class_names(checkpoint)
            self._take_hyper_parameters(config, checkpoint)

    def _find_requeued(self, config: Namespace) -> None:
        """Go on as with ``--ckpt_path`` in a job that was queued again, and where Lightning would without a word."""
        if config.get("ckpt_path") is not None or config.get("ensemble") is not None:
            return
        found = taken_by_lightning(Path(config.trainer.default_root_dir or "."))
        if self.config.subcommand != "fit":
            if found:
                raise UserError(
                    f"Lightning would load {found[0]}, which a training in a job of SLURM has left. Say what you want: "
                    "--ckpt_path best, last or a file; or move it elsewhere to use the network as it is built."
                )
            return
        own = (path for path in found if not is_of_other_job(path, self._together.job))
        requeued = saved_before_requeue(self._together.job, run_roots(config.trainer)) or next(own, None)
        self._begins_anew = bool(found) and requeued is None
        if requeued is not None:
            _say(f"the job was queued again: going on from {requeued}; to begin anew move it elsewhere")
            config.ckpt_path = str(requeued)

    def _find_members(self, config: Namespace) -> None:
        """Find the checkpoints of an ensemble, and build the network of the first in place of what the config says."""
        if self.config.subcommand == "fit":
            raise UserError("--ensemble is for validate, test and predict. Train its members one by one.")
        if config.get("ckpt_path") is not None:
            raise UserError("--ensemble and --ckpt_path exclude each other. Give all members to --ensemble.")
        config.ensemble = _ensemble.member_paths(config.ensemble, run_roots(config.trainer))
        for number, path in enumerate(config.ensemble):
            _say(f"member{number} is {path}")
        first = config.ensemble[0]
        checkpoint = read_checkpoint(first)
        self._trained_classes = class_names(checkpoint)
        found = self._found_in(checkpoint, config.model.class_path, first)
        init_args = config.model.init_args
        self._from_checkpoint = TakenArguments(first, {name: found[name] for name in found if name in init_args})

    def _found_in(self, checkpoint: dict[str, Any], class_path: str, path: str) -> dict[str, Any]:
        found, strange = hyper_parameters(checkpoint, class_path, path)
        if strange:
            _say(
                f"not taken from the checkpoint, because it is no plain data: {', '.join(strange)}. Options that need "
                "classes come from the command or the config"
            )
        return found

    def _take_hyper_parameters(self, config: Namespace, checkpoint: dict[str, Any]) -> None:
        found = self._found_in(checkpoint, config.model.class_path, config.ckpt_path)
        if found:
            check_attention_is_named(self._given, checkpoint, config.ckpt_path)
        shown = redact(self._given)  # as the checkpoint has it
        check_fits(shown, found, config.ckpt_path)
        init_args = config.model.init_args
        taken = {
            name: value
            for name, value in found.items()
            if name in init_args and name not in self._given and init_args[name] != value
        }
        compared = without_files(shown, found)
        changed = {name: value for name, value in found.items() if name in compared and compared[name] != value}
        self._from_checkpoint = TakenArguments(config.ckpt_path, taken)
        if taken:
            _say(f"from the checkpoint: {_listing(taken)}")
        if changed:
            given = {name: shown[name] for name in changed}
            _say(f"given and kept: {_listing(given)}; the checkpoint has {_listing(changed)}")
        if changed and self.config.subcommand == "fit":
            _say(
                "resuming restores the optimizer and the schedule as they were; "
                "to start anew from the weights alone, use --model.init_from instead of --ckpt_path"
            )

    def before_instantiate_classes(self) -> None:
        """Fill in what depends on other options."""
        config = self.config[self.config.subcommand]
        if config.get("weights_only") is False and "weights_only" in config:
            raise UserError("--weights_only false would run code from the checkpoint. Leave it out.")
        if config.get("weights_only", False) is None:
            config.weights_only = True  # else an environment variable could let a checkpoint run code
        if self.config.subcommand == "predict" and config.return_predictions is None:
            config.return_predictions = False  # nobody reads them here, and masks of a folder would fill the memory
        if config.trainer.logger is False:  # Lightning refuses to monitor rates that go nowhere
            callbacks = as_list(config.trainer.callbacks)
            config.trainer.callbacks = [item for item in callbacks if not is_rate_monitor(item)] or None

    def _add_instantiators(self) -> None:
        super()._add_instantiators()
        if self._from_checkpoint is not None:
            maker = TaskMaker(self, self._from_checkpoint)
            self.parser.add_instantiator(maker, DIATask, subclasses=True)

    def instantiate_classes(self) -> None:
        """Build data, model and trainer; what these refuse is the user's to mend."""
        try:
            super().instantiate_classes()
            members = self.config[self.config.subcommand].get("ensemble")
            if members is not None:
                self.model = _ensemble.ensemble_of(members)
        except (ValueError, MisconfigurationException) as error:
            cause: BaseException = error
            # jsonargparse packs what a class of ours raised into messages about types and links
            while str(cause).startswith(_PACKING) and cause.__cause__ is not None:
                cause = cause.__cause__
            wrong_argument = isinstance(cause, TypeError) and is_ours(cause)  # of a network
            if isinstance(cause, ValueError) or wrong_argument or is_for_the_user(cause):
                raise UserError(str(cause)) from cause
            raise cause from None
        except TypeError as error:
            if "`devices`" not in str(error):  # which Lightning compares with the accelerator, each in a way of its own
                raise
            raise UserError(f"{error} Use auto, or how many.") from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer, with safe checkpoints unless the options or its strategy have a way of their own.

        A strategy that is given by its name waits :data:`PEER_TIMEOUT` for a process that hangs, not half an hour.
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
        """See to the test after it, and go on in the run of the checkpoint, unless the options say otherwise."""
        if self.config.fit.test_after_fit:
            callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
            callbacks.insert(0, CheckLaterTest())
        if self._begins_anew:  # Lightning looks for files of any job, unless it believes that the path was set
            self.trainer._checkpoint_connector._user_managed = True
            warnings.filterwarnings("ignore", message="`trainer.ckpt_path = None` was called")
        source = self._together.source
        if source is None or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self.trainer.is_global_zero and source.folder is not None and not self._together.lock.take(source.folder):
            source = self._together.source = replace(source, busy=True)
        run_id = wandb_id(source.folder) if source.folder is not None and source.obstacle is None else None
        for logger in self.trainer.loggers:
            if run_id is not None and isinstance(logger, WandbLogger) and logger.version is None:
                logger.resume(run_id)
                _say(f"resuming the Weights & Biases run {run_id}; to start a new one, give the logger a new id")
        _say(take_up(self.trainer, source))
        # of Lightning; where it is so, it is meant
        warnings.filterwarnings("ignore", message=r"Checkpoint directory .* exists and is not empty")

    def after_fit(self) -> None:
        """Test the best checkpoint if asked to."""
        ckpt_path = self.config.fit.ckpt_path
        if self.trainer.fast_dev_run and ckpt_path is not None:  # type: ignore[attr-defined]
            _say(f"fast_dev_run looks at the first epoch alone: how training goes on from {ckpt_path} was not tried")
        elif ckpt_path is not None and not self._together.has_trained:
            _say(
                f"nothing was left to train: {ckpt_path} is at the end of the training "
                f"(--trainer.max_epochs {self.trainer.max_epochs}, --trainer.max_steps {self.trainer.max_steps}). "
                "To train longer, raise them."
            )
        if not self.config.fit.test_after_fit:
            return
        best = [callback.best_model_path for callback in self._checkpoint_callbacks() if callback.monitor is not None]
        path = next(filter(None, best), None if self._together.has_trained else ckpt_path)
        _say(f"testing {path or 'the last weights (there is no best checkpoint)'}")
        self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=path, weights_only=True)

    def _run_subcommand(self, subcommand: str) -> None:
        if self.trainer.is_global_zero:
            for part in remove_parts(run_roots(self.config[subcommand].trainer)):
                _say(f"removed {part}, which a killed run had left")
        try:
            super()._run_subcommand(subcommand)
        except RuntimeError as error:
            if not str(error).startswith("Error(s) in loading state_dict"):
                raise
            raise UserError(misfit(str(error), self.config[subcommand].ckpt_path)) from error
        except Exception as error:
            if is_for_the_user(error) or not is_while_restoring(error):
                raise
            raise UserError(not_restored(error, self.config[subcommand].ckpt_path)) from error
        except SystemExit as stop:
            if not self.trainer.interrupted:
                raise
            if subcommand == "fit":
                self._say_how_to_resume()
            # Lightning ends with 1 after Ctrl-C
            raise SystemExit(stop.code if isinstance(stop, SIGTERMException) else 128 + SIGINT) from stop
        finally:
            self._together.lock.release()

    def _say_how_to_resume(self) -> None:
        saved = [callback.last_model_path or callback.best_model_path for callback in self._checkpoint_callbacks()]
        files = [path for path in saved if path and Path(path).exists()]
        if files:
            newest = max(files, key=lambda path: Path(path).stat().st_mtime_ns)
            _say(f"stopped; repeat the command with --ckpt_path {newest} to go on from there")
        else:
            _say("stopped before the first checkpoint: there is nothing to resume from")

    def _checkpoint_callbacks(self) -> list[ModelCheckpoint]:
        return [callback for callback in self.trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]


class _Rehearsal(DIACLI):
    """Parses and builds what a command needs, and does not run it."""

    def __init__(self, args: Sequence[str], *, trainer: bool) -> None:
        self._with_trainer = trainer
        super().__init__(args)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Leave the trainer out if its devices may be elsewhere."""
        return super().instantiate_trainer(**kwargs) if self._with_trainer else None

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def rehearse(args: Sequence[str], *, trainer: bool = True) -> DIACLI:
    """Build what a command needs without running it, which finds the mistakes that show by then.

    Args:
        args: arguments as in a shell, the command first.
        trainer: whether the trainer, whose devices must be there, is built too.

    Returns:
        The task as ``model`` and its data as ``datamodule``.

    Raises:
        UserError: if something cannot be built.
        SystemExit: if the arguments are wrong, with a line on stderr.
    """
    logging.disable(logging.INFO)  # which devices there are, and so on
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
    # a log that a full disk or the locale does not take is no reason for a stack trace per line, to the very end
    logging.raiseExceptions = False
    try:
        with warnings.catch_warnings():
            # of Lightning 2.6 about its own code, with every torch from 2.13 on
            warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
            DIACLI(args)
    finally:
        adverts.removeFilter(_is_no_advert)


def _image_shape(data: DIADataModule) -> list[int] | None:
    """Return the shape (C, H, W) of the images, if they all have one."""
    shape = getattr(data, "image_shape", None)
    return None if shape is None else list(shape)


@rank_zero_only
def _say(message: str) -> None:
    print(f"{PROGRAM}: {redact_text(message)}", file=sys.stderr)


def _is_no_advert(record: logging.LogRecord) -> bool:
    return "Tip: For seamless cloud" not in record.getMessage()


def _listing(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in sorted(values.items()))
