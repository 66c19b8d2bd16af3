"""Custom classes, imported because the command line or the config of a run names them.

A checkpoint never causes an import: its author would choose which code runs here.
"""

import inspect
import re
from importlib import import_module
from typing import Any

from dia_lightning._choices import nearest
from dia_lightning.attention import list_attention, register_attention
from dia_lightning.cli._errors import UserError

CLASS_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def own_class(path: str, where: str) -> Any:
    """Import the object at a path.

    Args:
        path: such as ``"package.module.Class"``.
        where: the option or the file that names it, for messages.

    Raises:
        UserError: if it cannot be imported, with the reason.
    """
    module_name, _, name = path.rpartition(".")
    try:
        module = import_module(module_name)
    except Exception as error:  # custom code may raise anything
        raise UserError(f"{where}: cannot import {path}: {str(error) or type(error).__name__}.") from error
    if not hasattr(module, name):
        classes = [key for key, item in vars(module).items() if inspect.isclass(item)]
        raise UserError(f"{where}: {module_name} has no class '{name}'{nearest(name, classes)}")
    return getattr(module, name)


def import_attention(attention: Any, where: str) -> None:
    """Import an attention module given by its path, so that ``attach`` knows it; return others unchanged.

    Raises:
        UserError: if it cannot be imported, or is not callable.
    """
    if not isinstance(attention, str) or CLASS_PATH.fullmatch(attention) is None or attention in list_attention():
        return
    builder = own_class(attention, where)
    if not callable(builder):
        raise UserError(f"{where}: {attention} is no class of attention modules, but {builder!r}.")
    register_attention(attention)(builder)
