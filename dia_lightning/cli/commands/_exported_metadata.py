"""Metadata in an exported file, so that it can be used without anything else."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dia_lightning import __version__

if TYPE_CHECKING:  # imports Lightning
    from dia_lightning.tasks import DIATask


#: What the outputs of a classifier are, for each kind of labels.
_OUTPUTS = {
    "multiclass": "logits [B, K] of class_names; softmax gives the probabilities",
    "multilabel": "logits [B, K] of class_names; sigmoid gives the probability of each label",
    "binary": "logit [B, 1] of the second of class_names; sigmoid gives its probability",
}


def metadata_of(task: "DIATask | None", shape: Sequence[int]) -> dict[str, str]:
    """Return texts by name; lists are JSON.

    Args:
        task: the trained task; ``None`` for a network by name, of which only the input is known.
        shape: of an image ``[C, H, W]``.
    """
    if task is None:
        return _texts({"input": f"float32 [B, {', '.join(map(str, shape))}]"})
    from dia_lightning.tasks import ClassificationTask, DetectionTask

    known: dict[str, Any] = {"task": type(task).__name__, "class_names": task.class_names}
    if isinstance(task, DetectionTask):
        known["category_ids"] = task.category_ids
        known["input"] = f"float32 [{shape[0]}, height, width] in [0, 1]; the network resizes and normalises it"
        known["labels"] = "1 stands for the first of class_names and of category_ids"
        return _texts(known)
    known["input"] = f"float32 [B, {', '.join(map(str, shape))}]"
    if isinstance(task, ClassificationTask):
        known["output"] = _OUTPUTS[task.task]
    if task.normalization is not None:
        known["mean"], known["std"] = map(list, task.normalization)
        known["input"] += "; pixels in [0, 1], less mean, divided by std, per channel"
    return _texts(known)


def _texts(known: dict[str, Any]) -> dict[str, str]:
    found = {"dia_lightning": __version__, **{name: value for name, value in known.items() if value is not None}}
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in found.items()}
