"""Which file ``--ckpt_path`` means, and which of the checkpoint's hyper-parameters a command takes over."""

import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dia_lightning import _checkpoint_kind
from dia_lightning._checkpoint_file import damage_of, load, newest_older
from dia_lightning._checkpoint_kind import WrongCheckpointError, check_is_of_task
from dia_lightning._hyperparameters import from_file
from dia_lightning.cli._errors import PROGRAM
from dia_lightning.cli.runs.run_of_checkpoint import config_of, head
from dia_lightning.models.libraries import is_elsewhere, without_weights

# num_classes and image_shape come from the data, and the checkpoint's own weights replace those of init_from.
NOT_TAKEN = frozenset({"num_classes", "image_shape", "init_from"})
# What decides which weights a network has: what it is made of, and where attention goes.
BACKBONE = ("backbone", "backbone_args", "detector")
ATTENTION = ("attention", "attention_args", "share", "plug", "branches", "sites", "existing", "identity", "branch_norm")
# Options that hold names with dots, of weights and of layers, and take no objects.
_OF_NAMES = frozenset({"backbone_args", "freeze", "sites"})


def resolve(ckpt_path: str, roots: Iterable[Path], *, announce: bool = True) -> str:
    """Find the file that a ``--ckpt_path`` value means.

    Args:
        ckpt_path: a path; ``"last"`` for the newest ``last*.ckpt``, or the newest checkpoint where there is none;
            ``"best"`` for the best one of the newest run. Where the newest is damaged, the newest older one that is
            whole takes its place.
        roots: folders below which runs are looked for.
        announce: whether to say on stderr that it does.

    Returns:
        A path that exists: of a file, or of the folder that is a sharded checkpoint.

    Raises:
        ValueError: if there is none, for a URL, or for a folder of checkpoints.
    """
    if "://" in ckpt_path:
        raise ValueError(
            f"Checkpoint {ckpt_path}: checkpoints are not loaded from URLs. Download it and give the file."
        )
    roots = list(roots)
    if ckpt_path == "last":
        return str(_whole(_newest(roots, ["last*.ckpt", "*.ckpt"], ckpt_path), roots, announce))
    if ckpt_path == "best":
        return str(_best(_whole(_newest(roots, ["*.ckpt"], ckpt_path), roots, announce)))
    if not Path(ckpt_path).exists():
        raise ValueError(f"Checkpoint {ckpt_path}: there is no such file. Give a path, 'last' or 'best'.")
    inside = sorted(Path(ckpt_path).rglob("*.ckpt"))  # of a folder; one that is itself a sharded checkpoint has none
    if inside:
        raise ValueError(f"Checkpoint {ckpt_path} is a folder of checkpoints. Give one of them, such as {inside[-1]}.")
    if Path(ckpt_path).is_dir() and not Path(ckpt_path, "meta.pt").is_file():
        raise ValueError(f"Checkpoint {ckpt_path} is a folder without a checkpoint. Give a file, 'last' or 'best'.")
    return ckpt_path


def read(path: str) -> dict[str, Any]:
    """Load a checkpoint without running code from it.

    Raises:
        ValueError: if the file is damaged or no task wrote it.
    """
    checkpoint = load(path)
    check_is_of_task(checkpoint, path)
    return checkpoint  # type: ignore[no-any-return]


def check_is_of_run(checkpoint: Mapping[str, Any], path: str, command: str) -> None:
    """Refuse a file that Lightning would fail on with no word about the file.

    Args:
        checkpoint: what :func:`read` gave.
        path: the file, for the message.
        command: which will load it.

    Raises:
        WrongCheckpointError: if it is none that a training run of this package wrote.
    """
    check_is_of_task(checkpoint, path)
    loop = f"{command}_loop"
    expected: dict[str, type] = {"pytorch-lightning_version": str}
    expected |= {"epoch": int, "global_step": int, "loops": dict} if command == "fit" else {}
    expected |= {"optimizer_states": list, "lr_schedulers": list} if command == "fit" else {}
    wrong = [name for name, kind in expected.items() if not isinstance(checkpoint.get(name), kind)]
    loops = checkpoint.get("loops")
    if loops is not None and not (isinstance(loops, dict) and isinstance(loops.get(loop), dict)):
        wrong.append(f"loops.{loop}")
    wrong += [name for name in ("callbacks", "dia_run") if not isinstance(checkpoint.get(name, {}), dict)]
    if wrong:
        raise WrongCheckpointError(
            f"{path} is no checkpoint of a training run that {command} can load: {', '.join(wrong)} is missing or of "
            f"another kind{_without_training(checkpoint)}. Give a .ckpt that fit wrote; of other files "
            "--model.init_from takes the weights."
        )


def _without_training(checkpoint: Mapping[str, Any]) -> str:
    is_without = "optimizer_states" not in checkpoint and "pytorch-lightning_version" in checkpoint
    return ", as after save_weights_only" if is_without else ""


def hyper_parameters(checkpoint: Mapping[str, Any], class_path: str, path: str) -> tuple[dict[str, Any], list[str]]:
    """Return the hyper-parameters that may be taken from a checkpoint: plain values of the class that is being built.

    Class paths in a checkpoint are never imported: whoever wrote the file would choose which code runs here.

    Args:
        checkpoint: what :func:`read` gave.
        class_path: the class that the command or its config names.
        path: the checkpoint, for messages.

    Returns:
        Values by name, and the names of options that hold something else; nothing for the checkpoint of another class.

    Raises:
        ValueError: if the hyper-parameters are no dictionary.
    """
    found = checkpoint.get("hyper_parameters", {})
    plain, strange = from_file(found, path)
    written_by = str(found.get("_class_path", class_path))
    if written_by.rpartition(".")[2] != class_path.rpartition(".")[2]:
        return {}, []
    taken = {
        name: value
        for name, value in plain.items()
        if name not in NOT_TAKEN and (name in _OF_NAMES or not _has_class_path(value))
    }
    if is_elsewhere(taken.get("backbone")):
        strange["backbone"] = taken.pop("backbone")
    return without_files(taken, plain), sorted(strange)


def without_files(options: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Return options that make the same network and read no weights; a checkpoint brings its own.

    Args:
        options: by name.
        others: where the backbone is if the options have none.
    """
    args, backbone = options.get("backbone_args"), options.get("backbone", others.get("backbone"))
    own = {"backbone_args": without_weights(str(backbone), args)} if isinstance(args, dict) else {}
    return {**options, **own}


def check_fits(given: Mapping[str, Any], found: Mapping[str, Any], path: str) -> None:
    """Compare what decides about the weights before hundreds of names of weights do.

    Args:
        given: hyper-parameters that the user gave, by name.
        found: those of the checkpoint.
        path: the checkpoint, for the message.

    Raises:
        ValueError: if the network would be another one than that of the checkpoint.
    """
    given = without_files(given, found)
    plain = given.get("attention", found.get("attention")) is None and found.get("attention") is None
    names = BACKBONE if plain else (*BACKBONE, *ATTENTION)
    # an object that was given in Python is kept as "object:Name"; here it has another name
    known = [name for name in names if name in given and name in found and "object:" not in repr(found[name])]
    for name in known:
        # no arguments may be written as null or as {}
        if given[name] != found[name] and not (given[name] in ({}, None) and found[name] in ({}, None)):
            raise ValueError(
                f"--model.{name} {given[name]!r} makes another network than that of the checkpoint, which has "
                f"{found[name]!r}. To go on with the checkpoint {_own_config(path, 'leave it out')}; or take weights "
                f"only, with --model.init_from {path} instead of --ckpt_path."
            )


def check_attention_is_named(given: Mapping[str, Any], checkpoint: Mapping[str, Any], path: str) -> None:
    """Ask for the attention of a checkpoint where it is a class of the user's own, which is not imported for that.

    Args:
        given: hyper-parameters that the user gave, by name.
        checkpoint: what :func:`read` gave.
        path: the checkpoint, for the message.

    Raises:
        ValueError: if it was not given.
    """
    attention = checkpoint.get("hyper_parameters", {}).get("attention")
    if isinstance(attention, str) and "." in attention and given.get("attention") != attention:
        raise ValueError(
            f"The attention of the checkpoint is {attention}, and a class is not imported because a checkpoint says "
            f"so. If it is yours, {_own_config(path, f'give it: --model.attention {attention}')}."
        )


def misfit(message: str, path: str | None) -> str:
    """Return one sentence for torch's list of all weights that do not fit a network.

    Args:
        message: torch's.
        path: the checkpoint.
    """
    return (
        f"The weights of {path} do not fit the network of this command ({_checkpoint_kind.misfit(message)}). To use "
        f"them {_own_config(str(path), 'give the options that the network was trained with')}."
    )


def is_while_restoring(error: BaseException) -> bool:
    """Tell whether something failed while Lightning gave what a checkpoint holds to its parts."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__") == "lightning.pytorch.trainer.connectors.checkpoint_connector":
            return True
        trace = trace.tb_next
    return False


def not_restored(error: BaseException, path: str) -> str:
    """Return one sentence for what Lightning, or a callback, says of a checkpoint that it cannot take.

    Args:
        error: what was raised.
        path: the checkpoint.
    """
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return (
        f"{path} is no checkpoint that this command can go on from ({said}): it was changed, or another program wrote "
        f"it. Give the .ckpt as fit wrote it; DIA_TRACEBACK=1 shows the whole trace."
    )


def _own_config(path: str, otherwise: str) -> str:
    config = config_of(Path(path))
    return f"use the config of its run, -c {config}" if config.is_file() else otherwise


def class_names(checkpoint: Mapping[str, Any]) -> list[str] | None:
    """Return the names of the classes that a checkpoint was trained on, if it knows them."""
    names = checkpoint.get("dia_data", {}).get("class_names")
    return None if names is None else [str(name) for name in names]


def _has_class_path(value: Any) -> bool:
    """Tell whether a text in a value could be a path such as "package.Class".

    The config of a run keeps what the run took from a checkpoint. Where an option also takes an object, the next
    command that reads that config would import such a text.
    """
    if isinstance(value, str):
        return re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", value) is not None
    if isinstance(value, (list, tuple)):
        return any(map(_has_class_path, value))
    return isinstance(value, dict) and any(map(_has_class_path, value.values()))


def _newest(roots: Iterable[Path], patterns: Iterable[str], wanted: str) -> Path:
    """Return the newest file of the first pattern that any file has."""
    folders = list(dict.fromkeys(roots))
    for pattern in patterns:
        found = [path for root in folders for path in root.rglob(pattern) if path.is_file()]
        if found:
            return max(found, key=lambda path: (path.stat().st_mtime_ns, path))
    places = " or ".join(str(root) for root in folders)
    raise ValueError(f"Checkpoint {wanted}: there is no checkpoint below {places}. Train first or give a path.")


def _whole(newest: Path, roots: Iterable[Path], announce: bool) -> Path:
    """Return the newest checkpoint, or the newest older one that is whole if it is damaged and there is another."""
    damage = damage_of(newest)
    older = damage and newest_older(newest, (path for root in roots for path in root.rglob("*.ckpt")))
    if not older:
        return newest
    if announce:
        line = f"{newest} is damaged, {damage}: using {older}, the newest older one that is whole"
        sys.stderr.write(f"{PROGRAM}: {line}\n")
    return older


def _best(newest: Path) -> Path:
    """Return the best checkpoint of the run that wrote ``newest``, from the record that every checkpoint carries."""
    callbacks = head(newest).get("callbacks", {})
    records = [state for state in callbacks.values() if isinstance(state, dict) and state.get("monitor") is not None]
    for record in records:
        recorded = str(record.get("best_model_path") or "")
        if not recorded:  # it was never validated
            continue
        # the run may have been moved: the file beside this one comes before the recorded path
        for candidate in (newest.with_name(os.path.basename(recorded)), Path(recorded)):
            if candidate.is_file():
                return candidate
    raise ValueError(
        f"Checkpoint best: the newest run ({newest.parent}) has no best checkpoint, perhaps because it was never "
        "validated. Use last, or give a path."
    )
