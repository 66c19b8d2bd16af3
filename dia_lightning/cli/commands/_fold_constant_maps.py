"""How ``export`` folds and reports maps that hardly depend on the image."""

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dia_lightning.attention import is_attached

if TYPE_CHECKING:  # imports Lightning
    from dia_lightning.analysis import FoldReport
    from dia_lightning.tasks import DIATask


def folded(task: "DIATask", batches: Sequence[Any], options: argparse.Namespace) -> None:
    """Fold what can be folded in the network of a task, in place, and print a report.

    Args:
        task: for classification or detection.
        batches: of evaluation, with labels.
        options: the arguments of the command.

    Raises:
        ValueError: as for :func:`~dia_lightning.analysis.fold_constant_maps`, or if the file holds only weights and the
            network is neither unchanged nor the plain one.
    """
    from dia_lightning.analysis import fold_constant_maps
    from dia_lightning.tasks import DetectionTask

    is_detector = isinstance(task, DetectionTask)
    tolerance: float = options.fold_constant_maps
    network = task.network_body()
    keys = set(network.state_dict())
    run: Callable[[Any], Any] = partial(_features, task) if is_detector else lambda batch: task(batch[0])
    score = _mean_average_precision if is_detector else _accuracy
    name = "mAP" if is_detector else "accuracy"
    with torch.no_grad():
        before = score(task, batches)
        report = fold_constant_maps(network, batches, tolerance, run=run)
        after = score(task, batches) if report.folded else before
    images = sum(len(batch[0]) for batch in batches)
    outputs = "feature maps" if is_detector else "outputs"
    print(f"{_table(report)}\n{_summary(report, tolerance, images, outputs)}; {name} {before:.4f} -> {after:.4f}\n")
    is_plain = not is_attached(network) and keys >= set(network.state_dict())
    if report.folded and not is_plain and Path(options.path).suffix == ".safetensors":
        raise ValueError(
            f"{options.path}: weights alone fit no network that attach() makes after {len(report.folded)} of "
            f"{len(report.sites)} sites were folded, or a layer has got a bias. Write .onnx, or leave "
            "--fold-constant-maps out."
        )


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
    kind = task._kind
    metric = kind.accuracy()
    for images, labels, *_ in batches:
        metric.update(kind.scores(kind.logits(task(images))), kind.hard(labels))
    return float(metric.compute())


def _mean_average_precision(task: Any, batches: Sequence[Any]) -> float:
    from dia_lightning.tasks.mean_average_precision import MeanAveragePrecision

    metric = MeanAveragePrecision(masks=task.has_masks, max_detections=task.max_detections)
    for images, targets, index in batches:
        metric.add(task(images), targets, index)
    return metric.compute().overall.get("map", math.nan)
