"""Names of classes, and how they fit into a picture."""

from lightning.pytorch import LightningModule, Trainer


def class_names(trainer: Trainer, pl_module: LightningModule, count: int) -> list[str]:
    """Return the names of ``count`` classes: the task's, else the datamodule's, else the numbers 0, 1, ...

    Raises:
        ValueError: if there are names, but not ``count`` of them.
    """
    for owner in (pl_module, getattr(trainer, "datamodule", None)):
        names = getattr(owner, "class_names", None)
        if names is None:
            continue
        if len(names) != count:
            raise ValueError(
                f"{type(owner).__name__}.class_names has {len(names)} names, but the model has {count} classes. "
                "Set num_classes of the model to the number of classes of the data."
            )
        return [str(name) for name in names]
    return [str(number) for number in range(count)]


def short_label(text: str, length: int) -> str:
    """Return ``text`` as one line of at most ``length`` characters that matplotlib draws as it stands.

    The middle is left out, because long class names often share their beginning.

    Example:
        >>> short_label("american staffordshire terrier", 15)
        'american …rrier'
        >>> print(short_label("$5 bill", 15))
        \\$5 bill
    """
    text = " ".join(text.split())
    if len(text) > length:
        tail = (length - 1) * 2 // 5
        text = text[: length - 1 - tail] + "…" + text[len(text) - tail :]
    return text.replace("$", r"\$")  # two dollar signs would start a formula
