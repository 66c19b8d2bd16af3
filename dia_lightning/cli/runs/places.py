"""Where the files of a run are, from the path of one of its checkpoints."""

from pathlib import Path

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"


def checkpoints_of(checkpoint: Path) -> Path:
    """Return the folder of the run's checkpoints; that of the file where it was copied elsewhere."""
    # a metric's name in that of a file, "epoch=1-val/acc=0.9.ckpt", makes a folder
    above = (place for place in checkpoint.parents if place.name == CHECKPOINTS and (place.parent / CONFIG).is_file())
    return next(above, checkpoint.parent)


def run_folder_of(checkpoint: Path) -> Path:
    """Return the folder of the run that wrote a checkpoint."""
    place = checkpoints_of(checkpoint)
    return place.parent if place.name == CHECKPOINTS else place
