"""Where the results of a run are."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from dia_lightning.callbacks._result_writer import ResultWriter
from dia_lightning.callbacks._run_folder import run_folder


class RunSummary(Callback):
    """Print where the run folder, the checkpoints, the pictures and the predictions or detections are.

    They are printed once, on rank zero, when ``fit``, ``test`` or ``predict`` has ended; only what exists is named. The
    place among the callbacks does not matter.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[RunSummary()], logger=False, accelerator="cpu", enable_progress_bar=False)
    """

    def __init__(self) -> None:
        self._folder = Path()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the run folder while all ranks can still talk to each other."""
        self._folder = run_folder(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print the places after all other callbacks have ended."""
        is_trial = getattr(trainer, "fast_dev_run", False)  # which leaves nothing
        if stage != "validate" and trainer.is_global_zero and not is_trial:
            places = _places(trainer, self._folder, stage)
            width = max((len(name) for name, _ in places), default=0) + 1
            for name, place in places:
                print(f"{name + ':':<{width}} {place}")


def _places(trainer: Trainer, folder: Path, stage: str) -> list[tuple[str, str]]:
    places = []
    if folder.is_dir():
        places.append(("run folder", str(folder)))
    if stage == "fit":
        places += _checkpoints(trainer)
    if (folder / "pictures").is_dir():
        places.append(("pictures", str(folder / "pictures")))
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, ResultWriter) and callback.path is not None and stage != "fit":
            places.append((callback.kind, str(callback.path)))
    return places


def _checkpoints(trainer: Trainer) -> list[tuple[str, str]]:
    found = []
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.best_model_path:
            if callback.monitor is None:
                found.append(("last checkpoint", callback.best_model_path))
            else:
                score = callback.best_model_score  # not known again after resuming in another folder
                note = "" if score is None else f" ({callback.monitor} = {score:.4f})"
                found.append(("best checkpoint", f"{callback.best_model_path}{note}"))
    return found
