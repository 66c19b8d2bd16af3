"""Help without docstring markup, and corrected where Lightning's text does not apply to this program."""

import argparse
import re

_ROLE = re.compile(r":[a-z]+(?::[a-z]+)*:`(~?)([^`<]+?)(?:\s*<[^>`]*>)?`")
_LINK = re.compile(r"`([^`<]+?)\s*<[^>`]*>`_+")
_RESUME = (
    "Checkpoint to resume from: a file, or 'last' or 'best' of the newest run. Optimizer, schedule and epoch are "
    "restored; to take the weights alone, use --model.init_from."
)
_USE = (
    "Checkpoint to use: a file, or 'last' or 'best' of the newest run. Without -c, the config of its run is used; "
    "other options override it."
)
_WEIGHTS_ONLY = "Refuse checkpoints with more than tensors and plain values, which could run code; null means true."


def plain(text: str) -> str:
    """Return a text without roles, links and double backquotes of reStructuredText."""
    text = _ROLE.sub(lambda match: match[2].rpartition(".")[2] if match[1] else match[2], text)
    return _LINK.sub(r"\1", text).replace("``", "")


def clean(parser: argparse.ArgumentParser) -> None:
    """Remove the markup from everything that a parser shows."""
    for action in parser._actions:
        if isinstance(action.help, str) and action.help is not argparse.SUPPRESS:
            action.help = plain(action.help)
    for part in (parser, *parser._action_groups):
        for name in ("description", "title"):
            if isinstance(getattr(part, name, None), str):
                setattr(part, name, plain(getattr(part, name)))


def describe_checkpoints(parser: argparse.ArgumentParser, command: str) -> None:
    """Describe what the checkpoint options do here."""
    texts = {"ckpt_path": _RESUME if command == "fit" else _USE, "weights_only": _WEIGHTS_ONLY}
    for action in parser._actions:
        action.help = texts.get(action.dest, action.help)
