"""Export detectors to files that run elsewhere."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.onnx.operators import shape_as_tensor

from dia_lightning._evaluating import evaluating
from dia_lightning._extras import require
from dia_lightning._whole_files import written_with_others
from dia_lightning.attention import is_attached
from dia_lightning.models._export import written_weights
from dia_lightning.models._exported_detector import Detection, ExportedDetector, compared

_OPSET = 17  # 16 is the first opset in which exported RoiAlign matches torchvision's

_SNIPPETS = {
    ".onnx": (
        "import onnxruntime\n"
        "session = onnxruntime.InferenceSession({path!r})\n"
        "{names} = session.run(None, {{'image': image}})  # numpy, float32 [3, height, width] in [0, 1]"
    ),
    ".safetensors": (
        "from safetensors.torch import load_model\n"
        "detector = ...  # built as for training: get_detector(...), {attached}\n"
        "load_model(detector, {path!r})\n"
        "(found,) = detector.eval()([image])  # float32 [3, height, width] in [0, 1]"
    ),
}


def export_detector(
    detector: nn.Module,
    images: Sequence[Tensor],
    path: str | Path,
    *,
    metadata: Mapping[str, str] | None = None,
) -> ExportedDetector:
    """Write a detector to a file, load the file, and compare the objects that both find.

    The ONNX file takes one image ``image [3, height, width]`` in [0, 1] of any size, and resizes and normalises it as
    the detector does. It returns ``boxes [N, 4]`` in pixels of that image, ``labels [N]`` in 1..K, ``scores [N]`` and
    for Mask R-CNN ``masks [N, 1, height, width]``. torch.export cannot handle the varying number of boxes, so the
    tracing exporter is used, and ``.pt2`` is refused.

    Args:
        detector: with torchvision's interface, with or without attention. It is exported in evaluation mode; its own
            modes are restored.
        images: images to trace with (the first) and to compare on (all); preferably real ones that contain objects.
        path: the file to write; its suffix selects the format: ``.onnx`` or ``.safetensors`` (weights only).
        metadata: metadata to store in the file, as for :func:`export_network`.

    Returns:
        What was written, and how well it agrees.

    Raises:
        ValueError: if the suffix is unknown, there are no images ``[3, H, W]``, or the detector cannot be traced.
        ImportError: if a package that the format needs is missing.

    Example:
        >>> import tempfile, torch
        >>> from dia_lightning.models.detectors import get_detector
        >>> small = {"backbone_args": {"depth": 11, "stem_stride": 4}, "min_size": 128, "fpn_channels": 64}
        >>> detector = get_detector("fcos", "cifar_resnet", num_classes=3, **small)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     exported = export_detector(detector, [torch.rand(3, 64, 96)], f"{folder}/detector.safetensors")
        >>> exported.matched == exported.objects
        True
    """
    path = Path(path)
    writers = {".onnx": _write_onnx, ".safetensors": _write_weights}
    if path.suffix not in writers:
        raise ValueError(
            f"The ending of {str(path)!r} must be one of {', '.join(writers)} for a detector, as in 'detector.onnx': "
            "torch.export cannot follow the number of its boxes."
        )
    if not images or any(image.ndim != 3 or image.numel() == 0 for image in images):
        shapes = [list(image.shape) for image in images]
        raise ValueError(f"images must be a list of tensors [3, H, W], at least one, got shapes {shapes}.")
    with evaluating(detector), written_with_others(path) as unfinished:
        found: Detection = detector([images[0]])[0]
        names = sorted(found, key=["boxes", "labels", "scores", *found].index)
        one = _OneImage(detector, names).eval()
        run = writers[path.suffix](one, images[0], unfinished, dict(metadata or {}))
        pairs = [(one(image), run(image)) for image in images]
    attached = "then attach(detector.backbone.body, ...)" if is_attached(detector) else "without attach(...)"
    snippet = _SNIPPETS[path.suffix].format(path=str(path), names=", ".join(names), attached=attached)
    return compared(path, names, pairs, snippet)


class _OneImage(nn.Module):
    """A detector for one image that returns tensors in a fixed order."""

    def __init__(self, detector: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.detector = detector
        self.names = names

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        found = self.detector([image])[0]
        is_object = found["labels"] > 0  # RetinaNet and FCOS have scores for the background too
        return tuple(found[name][is_object] for name in self.names)


_Run: TypeAlias = Callable[[Tensor], tuple[Tensor, ...]]


def _write_onnx(one: _OneImage, image: Tensor, path: Path, metadata: dict[str, str]) -> _Run:
    require("onnx", "onnxruntime", by="ONNX")
    import onnx
    import onnxruntime

    sizes = {"image": {1: "height", 2: "width"}, **{name: {0: "objects"} for name in one.names}}
    if "masks" in one.names:
        sizes["masks"].update({2: "height", 3: "width"})
    try:
        with warnings.catch_warnings(), _exact_sizes(one.detector):
            warnings.simplefilter("ignore")  # these address authors of networks; what counts is the comparison
            torch.onnx.export(
                one,
                (image,),
                str(path),
                dynamo=False,
                opset_version=_OPSET,
                input_names=["image"],
                output_names=list(one.names),
                dynamic_axes=sizes,
            )
    except Exception as error:  # exporters fail in many ways
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{type(one.detector).__name__} cannot be written to ONNX ({reason}). Write its weights, "
            f"'{path.with_suffix('.safetensors').name}', and run it with torch."
        ) from error
    model: Any = onnx.load(path)
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image: tuple(map(torch.from_numpy, session.run(None, {"image": image.cpu().numpy()})))


@contextmanager
def _exact_sizes(detector: nn.Module) -> Iterator[None]:
    """Make a detector resize images the same way when it is traced.

    There torchvision computes the new size in float32, which is a pixel off for one size in six.
    """
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    transform: Any = getattr(detector, "transform", None)
    if not isinstance(transform, GeneralizedRCNNTransform) or transform.fixed_size is not None:
        yield
        return

    def resize(image: Tensor, target: None = None) -> tuple[Tensor, None]:
        sides = shape_as_tensor(image)[-2:].double()
        # vectors, because the exporter drops the double precision of scalars
        limits = torch.tensor([transform.min_size[-1], transform.max_size], dtype=torch.float64)
        scale = (limits / torch.cat([sides.amin(0, True), sides.amax(0, True)])).amin(0, True)
        size: Any = (sides * scale).floor().long()
        return interpolate(image[None], size=(size[0], size[1]), mode="bilinear", align_corners=False)[0], target

    transform.resize = resize
    try:
        yield
    finally:
        del transform.resize


def _write_weights(one: _OneImage, image: Tensor, path: Path, metadata: dict[str, str]) -> _Run:
    return _OneImage(written_weights(one.detector, path, metadata), one.names).eval()
