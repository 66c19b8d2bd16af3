"""What the callbacks read from the outputs of a step."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class StepOutputs(NamedTuple):
    """Predictions of one batch without its padding samples.

    Attributes:
        rows: positions in the batch that are no padding, ``[N]``.
        indices: positions in the dataset, ``[N]``.
        probabilities: class probabilities in float32, ``[N, K]``.
    """

    rows: Tensor
    indices: Tensor
    probabilities: Tensor


def read_step_outputs(outputs: Any) -> StepOutputs:
    """Return the predictions of one batch on the CPU, padding samples (index -1) left out.

    Raises:
        ValueError: if the step did not return ``index [B]`` and ``probabilities [B, K]``.

    Example:
        >>> outputs = {"index": torch.tensor([4, -1]), "probabilities": torch.tensor([[0.25, 0.75], [0.5, 0.5]])}
        >>> read_step_outputs(outputs).indices.tolist()
        [4]
    """
    if not isinstance(outputs, Mapping) or not {"index", "probabilities"} <= set(outputs):
        found = sorted(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
        raise ValueError(
            "The step must return {'index': LongTensor[B], 'probabilities': Tensor[B, K]} for this callback, "
            f"but returned {found}. Return both from validation_step, test_step and predict_step."
        )
    index = outputs["index"].detach().cpu()
    probabilities = outputs["probabilities"].detach().float().cpu()
    if index.ndim != 1 or probabilities.ndim != 2 or len(index) != len(probabilities):
        raise ValueError(
            f"index must be [B] and probabilities [B, K], but they are {list(index.shape)} and "
            f"{list(probabilities.shape)}. Return one index and one row of probabilities per sample."
        )
    rows = torch.nonzero(index >= 0).flatten()
    return StepOutputs(rows, index[rows], probabilities[rows])
