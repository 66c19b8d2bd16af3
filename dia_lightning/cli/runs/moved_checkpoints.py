"""The best checkpoints of a resumed run, wherever it is now: ranked again, and copied if necessary."""

import os
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from dia_lightning.cli.runs.run_of_checkpoint import is_same


def moved_state(state: dict[str, Any], callback: ModelCheckpoint, here: Path) -> dict[str, Any]:
    """Return the state of a ModelCheckpoint with the current paths of its files, without missing ones.

    Args:
        state: as saved.
        callback: the callback to restore; its ``dirpath`` is set.
        here: the folder that now has the saved files; those of best checkpoints are copied from it.
    """
    target, then = str(callback.dirpath), str(state["dirpath"])
    paths = {path: _brought(path, then, here, target) for path in state["best_k_models"]}
    models = {paths[path]: score for path, score in state["best_k_models"].items() if paths[path]}
    moved = {**state, "dirpath": callback.dirpath, "best_k_models": models}
    for name in ("last_model_path", "best_model_path", "kth_best_model_path"):
        path = str(state.get(name) or "")
        stays = path and is_same(here, target) and (here / _relative(path, then)).exists()
        moved[name] = paths.get(path) or (os.path.join(target, _relative(path, then)) if stays else "")
    if callback.monitor is not None and state["best_model_path"] and not moved["best_model_path"]:
        rank_zero_warn(
            f"The best checkpoint so far, {state['best_model_path']}, is gone: the best one will be that of the epochs "
            "to come. Put it back before you resume, if you have it."
        )
    return moved | (_ranking(models, callback) if models else {"best_model_score": None})


def _ranking(models: dict[str, Any], callback: ModelCheckpoint) -> dict[str, Any]:
    """Rank files as Lightning does; some may be gone, and ``save_top_k`` may have changed."""
    best, worst = (min, max) if callback.mode == "min" else (max, min)
    kept = dict(models)
    while 0 < callback.save_top_k < len(kept):
        del kept[worst(kept, key=lambda path: float(kept[path]))]
    first = best(kept, key=lambda path: float(kept[path]))
    ranking: dict[str, Any] = {"best_k_models": kept, "best_model_path": first, "best_model_score": kept[first]}
    if len(kept) == callback.save_top_k:
        last = worst(kept, key=lambda path: float(kept[path]))
        ranking |= {"kth_best_model_path": last, "kth_value": kept[last]}
    return ranking


def _brought(path: str, then: str, here: Path, target: str) -> str:
    """Return the path of a file in the target folder, copying it there if necessary; "" if it is gone."""
    name = _relative(path, then)
    found = next((place for place in (here / name, Path(path)) if place.exists()), None)
    if found is None or found.suffix != ModelCheckpoint.FILE_EXTENSION:
        return ""
    place = Path(target, name)
    if is_same(found, place):
        return os.path.join(target, name)
    if place.exists():  # of another run
        return str(found.absolute())
    place.parent.mkdir(parents=True, exist_ok=True)
    if found.is_dir():
        shutil.copytree(found, place)
    else:
        shutil.copy2(found, place)  # keeps its time: it is not the newest
    return os.path.join(target, name)


def _relative(path: str, folder: str) -> str:
    """Return a file's name relative to the folder of checkpoints; a metric in it may have made a subfolder."""
    name = os.path.relpath(path, folder)
    return os.path.basename(path) if name.startswith(os.pardir) else name
