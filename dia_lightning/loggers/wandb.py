"""Weights & Biases for runs that must not end because of it."""

import os
import re
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger as LightningWandbLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor, nn

from dia_lightning._redact import redact, redact_arguments
from dia_lightning.loggers._core_watch import CoreWatch
from dia_lightning.loggers._histograms import histograms

if TYPE_CHECKING:
    from wandb import Run

STEP = "trainer/global_step"  # Lightning's name of the x-axis of all charts

# Seconds. W&B waits for 90 to start and for ever to end; a lost server may cost a run neither an hour nor its results.
PATIENCE = {"init_timeout": 10.0, "finish_timeout": 300.0}


class WandbLogger(LightningWandbLogger):
    """Lightning's logger for Weights & Biases, which neither ends nor delays a run when something is wrong with W&B.

    Without an API key, or when the server does not answer within about 20 seconds, the run is logged offline, with one
    warning that names its folder. When W&B's process is lost during the run, one warning says so, and training goes on
    with the other loggers. All works the same offline (``WANDB_MODE=offline``); ``wandb sync FOLDER`` uploads later.

    The run's table of results shows the best value of each metric that a ``ModelCheckpoint`` or ``EarlyStopping``
    monitors (``val/acc.max``) beside the last one (``val/acc.last``). In a sweep it shows the last one alone, because a
    sweep cannot optimize a nested value. No option is a key or a token: use ``wandb login`` or ``WANDB_API_KEY``.

    Args:
        project: the project; ``None`` takes ``WANDB_PROJECT``, else ``"dia-lightning"``.
        name: display name of the run; ``None`` lets W&B invent one.
        save_dir: folder in which ``wandb/`` with all the runs' files is made.
        id: of a run to resume, or for a new one; letters, digits, ``-`` and ``_``.
        entity: user or team; ``None`` takes the account's default.
        group: runs with the same group are shown together.
        job_type: what kind of run it is, for filters.
        tags: for filters.
        notes: a text about the run.
        config: more values for the run's config; texts below keys such as ``token`` are replaced by ``***``.
        offline: whether to stay offline in any case.
        log_model: whether to log the best and the last checkpoint as artifacts with these aliases when training ends.
        watch: whose histograms to log: ``"gradients"``, ``"parameters"``, ``"all"``, or ``None`` for none.
        watch_freq: steps between histograms, at least; they come with the metrics that a training step logs.
        prefix: put before the name of each metric, with ``-``.
        settings: any other of W&B's settings by name, for example ``{"init_timeout": 60}``.

    Raises:
        ValueError: if ``id``, ``watch`` or ``watch_freq`` is out of range, or ``settings`` has an unknown or wrong one.
        ModuleNotFoundError: if wandb is not installed.

    Example:
        >>> logger = WandbLogger(project="digits", watch="gradients", tags=["first"])
        >>> logger.name
        'digits'
        >>> WandbLogger(watch_freq=0)
        Traceback (most recent call last):
        ...
        ValueError: watch_freq must be 1 step or more, got 0. Use 200, or watch=None for no histograms.
    """

    def __init__(
        self,
        *,
        project: str | None = None,
        name: str | None = None,
        save_dir: str | Path = ".",
        id: str | None = None,
        entity: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        tags: Sequence[str] | None = None,
        notes: str | None = None,
        config: dict[str, Any] | None = None,
        offline: bool = False,
        log_model: bool = False,
        watch: Literal["gradients", "parameters", "all"] | None = None,
        watch_freq: int = 200,
        prefix: str = "",
        settings: dict[str, Any] | None = None,
    ) -> None:
        if watch not in (None, "gradients", "parameters", "all"):
            raise ValueError(f"watch must be 'gradients', 'parameters', 'all' or None, got {watch!r}. Use 'gradients'.")
        if watch_freq < 1:
            raise ValueError(
                f"watch_freq must be 1 step or more, got {watch_freq}. Use 200, or watch=None for no histograms."
            )
        if id is not None and re.fullmatch(r"[\w-]{1,128}", id, re.ASCII) is None:
            raise ValueError(f"id {id!r} is no id of a run. Use letters, digits, '-' and '_', at most 128.")
        super().__init__(
            name=name,
            save_dir=save_dir,
            id=id,
            project=project or default_project(),
            prefix=prefix,
        )
        shown = {"name": name, "entity": entity, "group": group, "job_type": job_type, "tags": tags, "notes": notes}
        more: dict[str, Any] = {
            **redact({**shown, "config": config}),
            # W&B's own process serves all runs of this one, and stays in the folder in which the first one began
            "dir": os.path.abspath(save_dir),
        }
        if offline:  # Lightning's own option would change WANDB_MODE of the whole process
            more["mode"] = "offline"
        given = {**self._wandb_init, **more}
        # a None, which the command line passes for everything that is not given, would replace W&B's own default
        self._wandb_init = {key: value for key, value in given.items() if value is not None}
        self._settings = _checked(settings or {})
        self._artifacts = log_model
        self._saved: list[ModelCheckpoint] = []
        self._histograms_of = watch
        self._histograms_every = watch_freq
        self._next_histograms = 0
        self._network: nn.Module | None = None
        self._watch: CoreWatch | None = None

    @property
    @rank_zero_experiment
    def experiment(self) -> "Run":
        """The run of wandb, which begins when it is first asked for; a dummy on other ranks than zero."""
        import wandb

        if self._experiment is None and wandb.run is None and getattr(self, "_attach_id", None) is None:
            self._experiment = self._start()
            self._experiment.define_metric(STEP)
            self._experiment.define_metric("*", step_metric=STEP, step_sync=True)
            self._begin_watch()
        return cast("Run", super().experiment)

    def resume(self, run_id: str) -> None:
        """Resume an earlier run; call it before training starts.

        Args:
            run_id: the id of that run, which is the last part of its address.
        """
        self._id = self._wandb_init["id"] = run_id

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log values, and histograms when it is time."""
        with self._unless_lost():
            super().log_metrics({**metrics, **self._histograms(step)}, step)

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Add to the config of the run, without secrets."""
        with self._unless_lost():
            super().log_hyperparams(redact(vars(params) if isinstance(params, Namespace) else params or {}))

    @rank_zero_only
    def log_graph(self, model: nn.Module, input_array: Tensor | None = None) -> None:
        """Get ready for a model; Lightning calls it before anything is logged about it."""
        if self._histograms_of is not None:
            self._network = model
        if isinstance(model, LightningModule):
            with self._unless_lost():
                self._keep_best_values(model)

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Remember whose checkpoints to log."""
        if self._artifacts and checkpoint_callback not in self._saved:
            self._saved.append(checkpoint_callback)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Log the checkpoints of a run that ended well."""
        if status != "success":
            return
        with self._unless_lost():
            for callback in self._saved:
                best = "last" if callback.monitor is None else "best"
                for path, alias in ((callback.best_model_path, best), (callback.last_model_path, "last")):
                    if path and Path(path).exists():
                        self._log_checkpoint(path, alias, callback)
        self._saved = []  # a test after training ends well too

    @rank_zero_only
    def finish(self) -> None:
        """End the run, and wait until everything is written."""
        with self._unless_lost(), self._watch or nullcontext():
            self.experiment.finish()

    def __getstate__(self) -> dict[str, Any]:
        """Exclude the watch, which belongs to this process, from copies."""
        return {**super().__getstate__(), "_watch": None}

    def _begin_watch(self) -> None:
        """See to it that the program ends although W&B's process may hang; other processes have no such process."""
        service = getattr(import_module("wandb.sdk.wandb_setup").singleton()._connection, "_proc", None)
        patience = float(self._settings.finish_timeout)
        if service is not None and patience > 0 and self._watch is None and self._experiment is not None:
            self._watch = CoreWatch(service._process, patience + 10, self._experiment.settings.sync_dir)
            self._watch.start()

    def _start(self) -> "Run":
        """Return a run: online or as the user wants it; offline if that fails; without effect if that fails too."""
        import wandb

        arguments = {**self._wandb_init, "settings": self._settings}
        try:
            with _arguments_without_secrets():
                return wandb.init(**arguments)
        except Exception as error:  # CommError, UsageError, what the disk and the network raise
            reason = _first_line(error)
        try:
            with _arguments_without_secrets():
                run = wandb.init(**{**arguments, "mode": "offline"})
        except Exception as error:
            rank_zero_warn(f"Weights & Biases did not start ({_first_line(error)}), and nothing is logged to it.")
            return wandb.init(mode="disabled", id=self.version)
        folder = run.settings.sync_dir
        rank_zero_warn(
            f"Weights & Biases did not start online ({reason}). This run is logged offline in {folder}; "
            f"upload it later with `wandb sync {folder}`."
        )
        return run

    @contextmanager
    def _unless_lost(self) -> Iterator[None]:
        """Continue without W&B when its process, the network or the disk is gone."""
        try:
            yield
        except Exception as error:  # of many classes, of which some have no base in common
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        import wandb

        run, name = self.experiment, type(error).__name__
        if isinstance(error, ConnectionError):
            with suppress(Exception):
                wandb.teardown()  # else W&B prints a stack trace when the program ends
        self._experiment = wandb.init(mode="disabled", id=run.id)  # the folder of the run may be named after its id
        rank_zero_warn(
            f"Weights & Biases was lost ({name}: {_first_line(error)}); training and the other loggers go on without "
            f"it. What came before is in {run.settings.sync_dir}; upload it with `wandb sync {run.settings.sync_dir}`."
        )

    def _keep_best_values(self, model: LightningModule) -> None:
        try:
            callbacks: list[Any] = model.trainer.callbacks  # type: ignore[attr-defined]
        except RuntimeError:  # what Lightning raises for a module without trainer
            return
        if self.experiment.sweep_id is not None:
            return
        for callback in callbacks:
            if isinstance(callback, ModelCheckpoint | EarlyStopping) and callback.monitor is not None:
                name = f"{self._prefix}-{callback.monitor}" if self._prefix else callback.monitor
                self.experiment.define_metric(name, step_metric=STEP, step_sync=True, summary=f"{callback.mode},last")

    def _histograms(self, step: int | None) -> dict[str, Any]:
        if self._histograms_of is None or self._network is None or not self._network.training:
            return {}
        if step is None or step < self._next_histograms:
            return {}
        found = histograms(self._network, self._histograms_of)
        if found:
            self._next_histograms = step + self._histograms_every
        return found

    def _log_checkpoint(self, path: str, alias: str, callback: ModelCheckpoint) -> None:
        import wandb

        metadata: dict[str, Any] = {"filename": Path(path).name}
        if alias == "best":
            score = callback.best_model_score
            metadata |= {"monitor": callback.monitor, "score": None if score is None else float(score)}
        artifact = wandb.Artifact(f"model-{self.experiment.id}", type="model", metadata=metadata)
        if Path(path).is_dir():  # sharded
            artifact.add_dir(path)
        else:
            artifact.add_file(path, name="model.ckpt")
        self.experiment.log_artifact(artifact, aliases=[alias])


def default_project() -> str:
    """Return the project of a logger to which none is given."""
    return os.environ.get("WANDB_PROJECT", "dia-lightning")


@contextmanager
def _arguments_without_secrets() -> Iterator[None]:
    """Let W&B, which records the program's arguments and has no setting against it, see them without secrets."""
    arguments = sys.argv
    sys.argv = [*arguments[:1], *redact_arguments(arguments[1:])]
    try:
        yield
    finally:
        sys.argv = arguments


def _checked(settings: dict[str, Any]) -> Any:
    """Return W&B's settings.

    Raises:
        ValueError: if one is unknown or wrong.
    """
    import wandb
    from pydantic import ValidationError

    known = {name: value for name, value in PATIENCE.items() if name in wandb.Settings.model_fields}
    try:
        return wandb.Settings(**{**known, **settings})
    except ValidationError as error:
        wrong = "; ".join(f"{item['loc'][0]}: {item['msg']}" for item in error.errors())  # not the values: secrets
        raise ValueError(
            f"settings of Weights & Biases are wrong ({wrong}). Use the names and values of wandb.Settings."
        ) from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
