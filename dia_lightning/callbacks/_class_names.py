"""Names of the classes of a task or its data."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from dia_lightning.drawing import ObjectClasses


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
    """Return whether an image of a task may have any number of labels."""
    return getattr(pl_module, "task", None) == "multilabel"


def check_has_one_class(pl_module: LightningModule, callback: str, instead: str) -> None:
    """Refuse a task whose images have several labels.

    Raises:
        ValueError: if it is one.
    """
    if has_several_labels(pl_module):
        raise ValueError(f"{callback} is for images of one class each, not for task='multilabel'. {instead}")
