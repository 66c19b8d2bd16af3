"""Networks from checkpoints of the DIANet authors' code."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dia_lightning._checkpoint_file import DamagedFileError, load
from dia_lightning.attention import attach
from dia_lightning.models._registry import get_model


@dataclass(frozen=True)
class _Layout:
    """How one of the authors' files names things, and the arithmetic of its family.

    Args:
        stage: prefix of the names of the stages.
        norm: the network's own norm.
        step: layers that one more block per stage adds to the depth.
        other_layers: layers of the depth outside the blocks.
        width: channels of the first stage at widen_factor 1.
        renamed: other names that differ from this package's, inside and outside the blocks.
    """

    stage: str
    norm: str
    step: int
    other_layers: int
    width: int
    renamed: dict[str, str] = field(default_factory=dict)

    @property
    def markers(self) -> tuple[str, str]:
        """Return keys that only occur together in this family."""
        return f"{self.norm}.weight", f"{self.stage}1.lstm.w_ih.0.seq.0.weight"


_LAYOUTS = {
    "cifar_resnet": _Layout("layer", "bn1", step=9, other_layers=2, width=64),
    "cifar_preresnet": _Layout(
        "layer", "bn", step=9, other_layers=2, width=64, renamed={"bn": "bn1", "bn_additional": "branch_norm"}
    ),
    "cifar_wrn": _Layout(
        "block",
        "bn1",
        step=6,
        other_layers=4,
        width=16,
        renamed={"convShortcut": "downsample.0", "bn_additional": "branch_norm"},
    ),
    "cifar_resnext": _Layout(
        "stage_",
        "bn_1",
        step=9,
        other_layers=2,
        width=32,
        renamed={
            "conv_1_3x3": "conv1",
            "bn_1": "bn1",
            "classifier": "fc",
            "conv_reduce": "conv1",
            "bn_reduce": "bn1",
            "conv_conv": "conv2",
            "bn": "bn2",
            "conv_expand": "conv3",
            "bn_expand": "bn3",
            "shortcut.shortcut_conv": "downsample.0",
            "shortcut.shortcut_bn": "downsample.1",
        },
    ),
}

_FIRST_CELL = {
    "w_ih.0.seq.0": "input_reduce",
    "w_ih.0.seq.2": "input_expand",
    "w_hh.0.seq.0": "hidden_reduce",
    "w_hh.0.seq.2": "hidden_expand",
}


def load_dianet_checkpoint(path_or_state_dict: str | os.PathLike[str] | Mapping[str, Any]) -> nn.Module:
    """Build a network with DIA-LSTM from a checkpoint of the authors' code and load its weights.

    Family, depth, width, cardinality, classes, input channels, reduction and number of stacked cells are inferred from
    names and shapes. Checkpoints do not hold the dropout of wide networks: it is 0 here, which only affects training.

    Args:
        path_or_state_dict: a checkpoint file, the dictionary in one (``epoch``, ``state_dict``, ...), or a bare state
            dict; keys may begin with ``module.``, as ``nn.DataParallel`` writes them.

    Returns:
        The network on the CPU, in training mode, with the same outputs as the authors' code. float64 weights stay
        float64, all others become float32.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file holds no weights, or not those of one of the four families.

    Source:
        gbup-group/DIANet, models/cifar/dia_{resnet,preresnet,wrn,resnext}.py.

    Example:
        >>> network = load_dianet_checkpoint("checkpoint/model_best.pth.tar")  # doctest: +SKIP
    """
    state = _state_dict(path_or_state_dict)
    family = _family(state)
    renamed = {_rename(key, _LAYOUTS[family]): weight for key, weight in state.items()}
    sizes = _sizes(renamed, family)
    model = get_model(family, **sizes)
    attach(model, "dia-lstm", reduction=_reduction(renamed), cells=1 + _count(renamed, r"layer1\.0\.dia\.upper\.(\d+)"))
    model.to(torch.promote_types(renamed["conv1.weight"].dtype, torch.float32))
    try:
        model.load_state_dict(renamed)
    except RuntimeError as error:
        options = ", ".join(f"{name}={value}" for name, value in sizes.items())
        problem = str(error).splitlines()[-1].strip(" \t.")  # torch has a line per problem after a headline
        raise ValueError(f"The checkpoint looks like {family}({options}), but does not match it: {problem}.") from error
    return model


def _state_dict(source: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Tensor]:
    """Read the weights and strip what surrounds them, including ``module.``."""
    content = source if isinstance(source, Mapping) else _read(source)
    weights = content.get("state_dict", content)
    named_tensors = isinstance(weights, Mapping) and all(
        isinstance(key, str) and isinstance(weight, Tensor) for key, weight in weights.items()
    )
    if not named_tensors or not weights:
        found = ", ".join(str(key) for key in list(content)[:5]) or "nothing"
        raise ValueError(f"Expected a state dict of tensors, or a dict with one under 'state_dict'; found {found}.")
    return {key.removeprefix("module."): weight for key, weight in weights.items()}


def _read(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no checkpoint file at {os.fspath(path)!r}.")
    try:
        content = load(path)
    except DamagedFileError as error:
        raise ValueError(
            f"{os.fspath(path)!r} is damaged or holds more than weights and numbers ({error.reason}). If you "
            f"trust it, pass torch.load(path, weights_only=False)['state_dict'] instead of the path."
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{os.fspath(path)!r} holds a {type(content).__name__}, expected a checkpoint or state dict.")
    return content


def _family(state: dict[str, Tensor]) -> str:
    for family, layout in _LAYOUTS.items():
        if all(marker in state for marker in layout.markers):
            return family
    wanted = "; ".join(f"{' and '.join(layout.markers)} ({family})" for family, layout in _LAYOUTS.items())
    raise ValueError(
        f"Not a checkpoint of the DIANet code: looked for {wanted}; found {', '.join(list(state)[:5])}, ..."
    )


def _rename(key: str, layout: _Layout) -> str:
    """Translate an authors' key into the key of the attached network."""
    path, _, tensor = key.rpartition(".")
    in_stage = re.fullmatch(rf"{layout.stage}(\d+)\.(ModuleList\.(\d+)|lstm)\.(.+)", path)
    if in_stage is None:
        return f"{layout.renamed.get(path, path)}.{tensor}"
    stage, _, block, inner = in_stage.groups()
    if block is not None:
        return f"layer{stage}.{block}.{layout.renamed.get(inner, inner)}.{tensor}"
    return f"layer{stage}.0.dia.{_rename_cell(inner)}.{tensor}"


def _rename_cell(name: str) -> str:
    upper = re.fullmatch(r"w_([ih])h\.([1-9]\d*)", name)  # only the first of stacked cells is reduced
    if upper is None:
        return _FIRST_CELL.get(name, name)
    return f"upper.{int(upper[2]) - 1}.{'input' if upper[1] == 'i' else 'hidden'}"


def _sizes(renamed: dict[str, Tensor], family: str) -> dict[str, int]:
    """Return the arguments of the builder, from names and shapes."""
    layout = _LAYOUTS[family]
    stages = [_count(renamed, rf"layer{stage}\.(\d+)\.conv1\.weight") for stage in (1, 2, 3)]
    if len(set(stages)) > 1:
        raise ValueError(f"The stages of a {family} have equal depth, but the checkpoint has {stages} blocks.")
    sizes = {
        "depth": layout.step * stages[0] + layout.other_layers,
        "widen_factor": _shape(renamed, "layer1.0.dia.input_reduce.weight")[1] // layout.width,
        "num_classes": _shape(renamed, "fc.weight")[0],
        "in_channels": _shape(renamed, "conv1.weight")[1],
    }
    if family == "cifar_resnext":
        inner, per_group, *_ = _shape(renamed, "layer1.0.conv2.weight")
        sizes |= {"cardinality": inner // per_group, "base_width": per_group}
    return sizes


def _shape(renamed: dict[str, Tensor], key: str) -> torch.Size:
    if key not in renamed:
        raise ValueError(f"The checkpoint is incomplete: it has no weight for {key}.")
    return renamed[key].shape


def _count(renamed: dict[str, Tensor], pattern: str) -> int:
    """Return the number of distinct indices matched by the pattern's group."""
    matches = (re.match(pattern, key) for key in renamed)
    return len({match[1] for match in matches if match is not None})


def _reduction(renamed: dict[str, Tensor]) -> int:
    """Find the ratio that gives the hidden width of every stage, which one floor division does not determine."""
    shapes = [_shape(renamed, f"layer{stage}.0.dia.input_reduce.weight") for stage in (1, 2, 3)]
    for reduction in range(1, max(channels for _, channels in shapes) + 1):
        if all(hidden == max(1, channels // reduction) for hidden, channels in shapes):
            return reduction
    pairs = ", ".join(f"{channels} to {hidden}" for hidden, channels in shapes)
    raise ValueError(f"No single reduction gives the LSTM widths of the three stages: {pairs}.")
