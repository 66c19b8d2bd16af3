"""Names of classes, and how they fit into a picture."""

from typing import Any, NamedTuple

from lightning.pytorch import LightningModule, Trainer


class ObjectClasses(NamedTuple):
    """Classes of a detector, whose labels start at 1; ``None`` where nobody knows."""

    names: list[str] | None
    category_ids: list[int] | None

    def name(self, label: int) -> str:
        """Return the name of a label, else its number."""
        return str(label) if self.names is None else self.names[self._position(label, len(self.names))]

    def category_id(self, label: int) -> int:
        """Return the id of a label in the user's files, else the label."""
        if self.category_ids is None:
            return label
        return self.category_ids[self._position(label, len(self.category_ids))]

    @property
    def category_names(self) -> dict[int, str]:
        """Return the names of all known categories by id."""
        count = len(self.names or self.category_ids or [])
        return {self.category_id(label): self.name(label) for label in range(1, count + 1)}

    def _position(self, label: int, count: int) -> int:
        if not 1 <= label <= count:
            raise ValueError(
                f"Label {label} is none of the {count} classes, whose labels are 1 to {count}. "
                "Set num_classes of the model to the number of classes of the data."
            )
        return label - 1


def object_classes(trainer: Trainer, pl_module: LightningModule) -> ObjectClasses:
    """Return the classes of a detector: the task's, else the datamodule's.

    Raises:
        ValueError: if there are names and category ids, but not equally many.
    """
    names = _first_known(trainer, pl_module, "class_names")
    category_ids = _first_known(trainer, pl_module, "category_ids")
    if names is not None and category_ids is not None and len(names) != len(category_ids):
        raise ValueError(
            f"There are {len(names)} class_names and {len(category_ids)} category_ids, but each class needs both. "
            "Use a checkpoint of the same classes as the data."
        )
    return ObjectClasses(
        None if names is None else [str(name) for name in names],
        None if category_ids is None else [int(category_id) for category_id in category_ids],
    )


def _first_known(trainer: Trainer, pl_module: LightningModule, attribute: str) -> Any:
    values = (getattr(owner, attribute, None) for owner in (pl_module, getattr(trainer, "datamodule", None)))
    return next((value for value in values if value is not None), None)


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


def has_several_labels(pl_module: LightningModule) -> bool:
    """Tell whether an image of a task may have any number of labels."""
    return getattr(pl_module, "task", None) == "multilabel"


def check_has_one_class(pl_module: LightningModule, callback: str, instead: str) -> None:
    """Refuse a task whose images have several labels.

    Raises:
        ValueError: if it is one.
    """
    if has_several_labels(pl_module):
        raise ValueError(f"{callback} is for images of one class each, not for task='multilabel'. {instead}")


def short_label(text: str, length: int) -> str:
    """Return ``text`` as one line of at most ``length`` characters that matplotlib draws as it stands.

    Example:
        >>> short_label("american staffordshire terrier", 15)
        'american …rrier'
        >>> print(short_label("$5 bill", 15))
        \\$5 bill
    """
    return shorten(text, length).replace("$", r"\$")  # two dollar signs would start a formula


def shorten(text: str, length: int) -> str:
    """Return ``text`` as one line of at most ``length`` characters.

    The middle is left out, because long class names often share their beginning.
    """
    text = " ".join(text.split())
    if len(text) <= length:
        return text
    tail = (length - 1) * 2 // 5
    return text[: length - 1 - tail] + "…" + text[len(text) - tail :]
