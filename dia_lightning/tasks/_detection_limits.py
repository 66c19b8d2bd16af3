"""How many objects per image can be detected, and how many are scored."""

from torch import nn
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork

from dia_lightning.tasks.mean_average_precision import Crowd


def detector_limits(detector: nn.Module) -> dict[str, int]:
    """Return how many detections per image a torchvision detector keeps, by the names of its arguments."""
    heads, proposals = getattr(detector, "roi_heads", None), getattr(detector, "rpn", None)
    if isinstance(heads, RoIHeads) and isinstance(proposals, RegionProposalNetwork):
        proposed = proposals._post_nms_top_n["testing"]
        return {"box_detections_per_img": heads.detections_per_img, "rpn_post_nms_top_n_test": proposed}
    names = ("detections_per_img", "topk_candidates")
    return {name: getattr(detector, name) for name in names if isinstance(getattr(detector, name, None), int)}


def crowding(crowd: Crowd, max_detections: int, limits: dict[str, int]) -> str | None:
    """Return what keeps a perfect detector from a perfect score, and the fix; ``None`` if nothing does.

    Args:
        crowd: of the fullest image.
        max_detections: how many detections per class and image are scored.
        limits: what :func:`detector_limits` returns.
    """
    told = []
    if crowd.of_a_class > max_detections:
        told.append(
            f"An image has {crowd.of_a_class} objects of a class, but the scores count only the best {max_detections} "
            f"detections of a class: set max_detections={crowd.of_a_class} (--model.max_detections); the scores are "
            "then no longer COCO's."
        )
    small = {name: limit for name, limit in limits.items() if limit < crowd.in_all}
    if small:
        raised = ", ".join(f'"{name}": {crowd.in_all}' for name in small)
        told.append(
            f"An image has {crowd.in_all} objects, but the detector is limited to "
            f"{', '.join(f'{name}={limit}' for name, limit in small.items())}: set detector_args={{{raised}}} or more."
        )
    return " ".join(told) or None
