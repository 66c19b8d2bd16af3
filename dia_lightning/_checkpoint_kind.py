"""Describe to the user what an intact file holds if it is not a checkpoint to continue from."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

#: Lists that a task reads from a checkpoint, and the type of their entries.
_FACTS: dict[str, Any] = {
    "image_shape": int,
    "category_ids": int,
    "mean": float | int | Tensor,
    "std": float | int | Tensor,
}


class WrongCheckpointError(ValueError):
    """A file is not a checkpoint that can be used here; the message names the file, what it is, and the fix."""


def kind_of(content: Any) -> str:
    """Describe in a few words what was read from a file."""
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return "only weights (a state dict)"
    if isinstance(content.get("dia_task"), str):
        return f"a checkpoint of {content['dia_task']}"
    if "pytorch-lightning_version" in content:
        return "a checkpoint of another LightningModule"
    if any(isinstance(content.get(name), Mapping) for name in ("state_dict", "model")):
        return "weights written by another program"
    return f"a dictionary of {', '.join(map(str, list(content)[:3]))[:100]}" if content else "an empty dictionary"


def check_is_of_task(content: Any, source: str) -> None:
    """Refuse anything not written by a task of this package.

    Args:
        content: what was read from a file.
        source: the file, for the message.

    Raises:
        WrongCheckpointError: if it is something else, or incomplete.
    """
    if not isinstance(content, Mapping) or not isinstance(content.get("dia_task"), str):
        fix = "init_from takes weights from other files." if isinstance(content, Mapping) else "Give another file."
        raise WrongCheckpointError(
            f"{source} is not a checkpoint of a dia-lightning task: it holds {kind_of(content)}. Give a .ckpt written "
            f"by fit; {fix}"
        )
    expected = {"state_dict": Mapping, "hyper_parameters": Mapping}
    wrong = [name for name, kind in expected.items() if not isinstance(content.get(name), kind)]
    wrong += _wrong_facts(content.get("dia_data", {}))
    if wrong:
        raise WrongCheckpointError(
            f"{source} is an incomplete checkpoint of {content['dia_task']}: {', '.join(wrong)} is missing or of "
            "another kind. Give the .ckpt as fit wrote it; init_from takes the weights of other files."
        )


def misfit(message: str) -> str:
    """Return in a few words what torch's ``load_state_dict`` reports weight by weight."""
    lines = [line.strip() for line in message.splitlines()[1:]]
    names = [name for line in lines for name in re.findall(r'"([^"]+)"|^size mismatch for ([^:]+):', line)]
    first = next((one or other for one, other in names), "")
    if not first:
        return " ".join(message.split())[:200]
    what = lines[0].partition(": ")[0].partition(" in state_dict")[0].partition(" for ")[0].lower()
    return f"{len(names)} {'differs' if len(names) == 1 else 'differ'}, the first: {first}, {what}"


def _wrong_facts(facts: Any) -> list[str]:
    if not isinstance(facts, Mapping):
        return ["dia_data"]
    return [
        f"dia_data.{name}"
        for name, value in facts.items()
        if not isinstance(value, list) or not all(isinstance(item, _FACTS.get(str(name), object)) for item in value)
    ]
