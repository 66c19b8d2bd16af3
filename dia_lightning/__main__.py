"""The program ``dia-lightning``, also ``python -m dia_lightning``."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from dia_lightning import __version__
from dia_lightning._choices import nearest
from dia_lightning._extras import needed_by, require
from dia_lightning.cli import COMMANDS, CORE_COMMANDS, LIGHT_COMMANDS
from dia_lightning.cli._errors import fail, is_for_the_user, message_of

SIGPIPE = 13  # missing on Windows

USAGE = """\
usage: dia-lightning COMMAND [options]

commands:
  fit        train: dia-lightning fit -c classification/digits.yaml
  validate   measure on the validation data
  test       measure on the test data
  predict    write predictions to a file: a CSV of classes, a COCO json of boxes
  configs    list the configs that come with the package, by the names that -c and reproduce take
  models     list networks and attention units with their parameters; --cost NAME compares kinds of attention,
             'timm/resnet*' --sites shows which support it
  sites      show where attention goes in a network and what it adds there: dia-lightning sites timm/convnext_tiny
  check      check what holds on a network with attention: dia-lightning check torchvision/resnet50
  export     write a network to ONNX, torch.export or safetensors: dia-lightning export best network.onnx
             or a diffusion task to a folder for diffusers: dia-lightning export best my_model
  sample     generate images with a trained diffusion task: dia-lightning sample best --classes 3 7 --trace
  analyze    see what the attention of a network does, trained or not: dia-lightning analyze best --split test
  reproduce  train the arms of a comparison over seeds, and tabulate them with intervals; resumes where it was stopped:
             dia-lightning reproduce reproduce/digits_sharing.yaml --jobs 2

Every option of a config can be given on the command line: --model.lr 0.05 --trainer.max_epochs 3. The command line
overrides the config, and the config overrides the checkpoint of --ckpt_path (a file, 'last' or 'best').
`dia-lightning COMMAND --help` lists the options. DIA_TRACEBACK=1 shows the full traceback of an error.
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        args: arguments as in a shell, without the program's name; those of the process if not given.

    Raises:
        SystemExit: with code 2 and one line on stderr for user errors, 3 if training diverged.
    """
    _open_streams()
    try:
        try:
            _start(sys.argv[1:] if args is None else list(args))
        except SystemExit:  # from a parser that printed help
            sys.stdout.flush()
            raise
        sys.stdout.flush()  # at exit, an error could not be caught
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's final flush
        raise SystemExit(128 + SIGPIPE) from None


def _start(arguments: list[str]) -> None:
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE, end="")
    elif arguments[:1] == ["--version"]:
        print(f"dia-lightning {__version__}")
    elif not arguments:
        sys.stderr.write(USAGE)
        raise SystemExit(2)
    elif not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        fail(f"Unknown command '{arguments[0]}'{nearest(arguments[0], COMMANDS)}")
    else:
        _run(arguments)


def _run(arguments: list[str]) -> None:
    # Lightning takes seconds to import: only do so for commands that need it
    try:
        import dia_lightning._torchvision_guard  # noqa: F401

        with _working_folder_importable(), needed_by(f"dia-lightning {arguments[0]}"):
            if arguments[0] not in CORE_COMMANDS:
                require("jsonargparse", by=f"dia-lightning {arguments[0]}")  # first: its extra includes all others
            if arguments[0] in LIGHT_COMMANDS:
                import_module(f"dia_lightning.cli.commands.{arguments[0]}").run(arguments[1:])
            else:
                import_module("dia_lightning.cli.command").run(arguments)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        raise
    except Exception as error:
        if not is_for_the_user(error):
            raise
        fail(message_of(error), getattr(error, "exit_code", 2))


def _open_streams() -> None:
    """Give a program without a terminal null streams; otherwise opened files would get their descriptors."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # in the order of the descriptors
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  for the whole program


def _reader_is_gone() -> bool:
    """Return whether the reader of the output has exited, as ``head`` does."""
    try:
        print(flush=True)  # the broken pipe may be another one, and a lost buffer is not rewritten
    except BrokenPipeError:
        return True
    return False


@contextmanager
def _working_folder_importable() -> Iterator[None]:
    """Find the user's classes in the working folder however the program is started, like ``python -m``."""
    folder = os.getcwd()
    is_off_limits = getattr(sys.flags, "safe_path", False)  # python -P, from 3.11 on
    added = [] if is_off_limits or folder in sys.path or "" in sys.path else [folder]
    sys.path[:0] = added
    try:
        yield
    finally:
        if added and folder in sys.path:
            sys.path.remove(folder)


if __name__ == "__main__":
    main()
