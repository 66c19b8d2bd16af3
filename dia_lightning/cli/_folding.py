"""What ``export`` does and says about maps that hardly depend on the image."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from dia_lightning.cli import _network_argument

if TYPE_CHECKING:  # imports Lightning
    from dia_lightning.analysis import FoldReport
    from dia_lightning.tasks import DIATask


def folded(task: "DIATask", batches: Sequence[Any], tolerance: float) -> str:
    """Fold what can be folded in the network of a task, in place, and return what was done, in words.

    Args:
        task: for classification or detection.
        batches: of evaluation, with labels.
        tolerance: as for :func:`~dia_lightning.analysis.fold_constant_maps`.

    Raises:
        ValueError: as for that function.
    """
    from dia_lightning.analysis import fold_constant_maps
    from dia_lightning.tasks import DetectionTask

    is_detector = isinstance(task, DetectionTask)
    run: Callable[[Any], Any] = partial(_features, task) if is_detector else lambda batch: task(batch[0])
    score = _mean_average_precision if is_detector else _accuracy
    name = "mAP" if is_detector else "accuracy"
    with torch.no_grad():
        before = score(task, batches)
        report = fold_constant_maps(_network_argument.network_of(task), batches, tolerance, run=run)
        after = score(task, batches) if report.folded else before
    images = sum(len(batch[0]) for batch in batches)
    outputs = "feature maps" if is_detector else "outputs"
    return f"{_table(report)}\n{_summary(report, tolerance, images, outputs)}; {name} {before:.4f} -> {after:.4f}\n"


def _table(report: "FoldReport") -> str:
    width = max(len("site"), *(len(site.path) for site in report.sites))
    lines = [f"{'site':{width}}  stage  variation"]
    for site in report.sites:
        variation = "-" if math.isnan(site.variation) else f"{site.variation:.2e}"
        became = "folded" if site.is_folded else f"kept: {site.kept}"
        lines.append(f"{site.path:{width}}  {site.stage:5}  {variation:>9}  {became}")
    return "\n".join(lines)


def _summary(report: "FoldReport", tolerance: float, images: int, outputs: str) -> str:
    of_all = f"{len(report.folded)} of {len(report.sites)} sites folded at tolerance {tolerance:g}"
    if not report.folded:
        return f"{of_all}: the network is exported as it is"
    return (
        f"{of_all}; on {images} images: largest difference of the {outputs} {report.difference:.1e}, mean "
        f"{report.mean_difference:.1e}, beside a mean magnitude of {report.magnitude:.1e}"
    )


def _features(task: Any, batch: Any) -> Any:
    return task.detector.backbone(task.detector.transform(list(batch[0]))[0].tensors)


def _accuracy(task: Any, batches: Sequence[Any]) -> float:
    correct = [task(images).argmax(1) == labels for images, labels, *_ in batches]
    return torch.cat(correct).double().mean().item()


def _mean_average_precision(task: Any, batches: Sequence[Any]) -> float:
    from dia_lightning.tasks._mean_average_precision import MeanAveragePrecision

    metric = MeanAveragePrecision(masks=task.has_masks)
    for images, targets, index in batches:
        metric.add(task(images), targets, index)
    return metric.compute().overall.get("map", math.nan)
