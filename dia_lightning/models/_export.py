"""Export networks to files that run elsewhere."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dia_lightning._evaluating import evaluating
from dia_lightning._extras import require
from dia_lightning._whole_files import written_with_others
from dia_lightning.attention import is_attached
from dia_lightning.models._require_images import require_images

_SNIPPETS = {
    ".onnx": (
        "import onnxruntime\n"
        "session = onnxruntime.InferenceSession({path!r})\n"
        "(logits,) = session.run(None, {{session.get_inputs()[0].name: images}})  # numpy, float32 {shape}"
    ),
    ".pt2": (
        "import torch\nnetwork = torch.export.load({path!r}).module()\nlogits = network(images)  # float32 {shape}"
    ),
    ".safetensors": (
        "from safetensors.torch import load_model\n"
        "network = ...  # built as for training: get_model(...), {attached}\n"
        "load_model(network, {path!r})\n"
        "logits = network.eval()(images)  # float32 {shape}"
    ),
}


@dataclass(frozen=True)
class Exported:
    """A file or folder that a network was written to.

    Args:
        path: the file or folder.
        difference: largest difference between the outputs of the network and the file on the example.
        snippet: Python code that loads the file without this package's training code.
    """

    path: Path
    difference: float
    snippet: str

    @property
    def agreement(self) -> str:
        """How well network and file agree, in words."""
        return f"largest difference to the network's own output {self.difference:.1e}"


def export_network(
    network: nn.Module, images: Tensor, path: str | Path, *, metadata: Mapping[str, str] | None = None
) -> Exported:
    """Write a network to a file, load the file, and compare outputs.

    Args:
        network: the network, with or without attention. It is exported in evaluation mode; its own modes are restored.
        images: example input ``[B, C, H, W]``; the batch size of the file is dynamic.
        path: the file to write; its suffix selects the format: ``.onnx``, ``.pt2`` (torch.export) or ``.safetensors``
            (weights only).
        metadata: metadata to store in the file: ``metadata_props`` of ONNX, ``extra_files`` of torch.export (pass
            ``extra_files`` to ``torch.export.load``), ``metadata`` of safetensors.

    Returns:
        What was written, and how well it agrees.

    Raises:
        ValueError: if the suffix is unknown, ``images`` is not a batch of images, or the network does not return one
            tensor.
        ImportError: if a package that the format needs is missing.

    Example:
        >>> import tempfile, torch
        >>> from dia_lightning.models import export_network, get_model
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     network = get_model("cifar_resnet", depth=11)
        ...     exported = export_network(network, torch.randn(2, 3, 32, 32), f"{folder}/network.pt2")
        >>> exported.difference < 1e-5
        True
    """
    path = Path(path)
    writers: dict[str, Callable[[nn.Module, Tensor, Path, dict[str, str]], Tensor]] = {
        ".onnx": _write_onnx,
        ".pt2": _write_program,
        ".safetensors": _write_weights,
    }
    if path.suffix not in writers:
        raise ValueError(
            f"The ending of {str(path)!r} must be one of {', '.join(writers)}, as in 'network.onnx'; folders are for "
            "diffusion tasks."
        )
    require_images(images)
    with evaluating(network), written_with_others(path) as unfinished:
        expected = network(images)
        if not isinstance(expected, Tensor):
            raise ValueError(f"The network must return one tensor, got {type(expected).__name__}. Wrap it.")
        found = writers[path.suffix](network, images, unfinished, dict(metadata or {}))
    difference = (expected - found).abs().max().item()
    attached = "then attach(...)" if is_attached(network) else "without attach(...)"
    snippet = _SNIPPETS[path.suffix].format(path=str(path), shape=["B", *images.shape[1:]], attached=attached)
    return Exported(path, difference, snippet)


def _write_onnx(network: nn.Module, images: Tensor, path: Path, metadata: dict[str, str]) -> Tensor:
    require("onnx", "onnxscript", "onnxruntime", by="ONNX")
    import onnxruntime

    program: Any = torch.onnx.export(network, (_two(images),), dynamo=True, dynamic_shapes=_free_batch(), verbose=False)
    program.model.metadata_props.update(metadata)
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: images.cpu().numpy()})
    return torch.from_numpy(output).to(images.device)


def _write_program(network: nn.Module, images: Tensor, path: Path, metadata: dict[str, str]) -> Tensor:
    program = torch.export.export(network, (_two(images),), dynamic_shapes=_free_batch())
    torch.export.save(program, path, extra_files=metadata)
    output: Tensor = torch.export.load(path).module()(images)
    return output


def _write_weights(network: nn.Module, images: Tensor, path: Path, metadata: dict[str, str]) -> Tensor:
    output: Tensor = written_weights(network, path, metadata)(images)
    return output


def written_weights(network: nn.Module, path: Path, metadata: dict[str, str]) -> nn.Module:
    """Write the weights to a safetensors file, and return a copy of the network with the weights from the file."""
    require("safetensors", by="This format")
    from safetensors.torch import load_model, save_model

    save_model(network, str(path), metadata=metadata)  # shared weights are written once
    loaded = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()  # so that a weight that is not in the file shows
    load_model(loaded, path)
    return loaded


def _two(images: Tensor) -> Tensor:
    """Return a batch of two, because torch specializes on an example batch size of one."""
    return torch.cat([images, images])[:2]


def _free_batch() -> tuple[dict[int, Any]]:
    return ({0: torch.export.Dim("batch", min=1, max=65536)},)
