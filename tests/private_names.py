"""Which names that are private in other packages this one uses, found in its source."""

import ast
import functools
import importlib
import inspect
import pkgutil
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import dia_lightning

PACKAGE = Path(dia_lightning.__file__).parent
SOURCES = [*sorted(PACKAGE.rglob("*.py")), PACKAGE.parent / "conftest.py"]
#: Names of ours that others have, too, but in classes that are no bases of ours.
SHARED = {"_process", "_relative"}
#: What looks like a name, and is none: keys and ends of keys in files, an operation, and what Python documents.
NO_NAMES = {
    *("__MACOSX", "_auto_class", "_class_name", "_class_path", "_instantiator", "_milestones", "_loop", "_per_class"),
    *("_native_multi_head_attention", "_fields", "_getframe"),
}


def is_private(name: str) -> bool:
    is_plain = name.isidentifier() and name.startswith("_") and not name.endswith("__")
    return is_plain and name.strip("_") != "" and name not in NO_NAMES and not name.startswith("_dia_")


@functools.cache
def found() -> dict[str, set[str]]:
    """The files in which each name is used; what is changed in a class of others is found as ``Class.attribute``."""
    trees = {path: list(ast.walk(ast.parse(path.read_text()))) for path in SOURCES}
    own = {name for tree in trees.values() for name in _defined(tree)}
    inherited = {name for cls in _own_classes() for name in _foreign(cls)} | SHARED
    overridden: dict[str, set[str]] = defaultdict(set)
    for cls in _own_classes():
        overridden[cls.__module__] |= _names_of(cls) & _foreign(cls)
    files = defaultdict(set)
    for path, tree in trees.items():
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for name in (*_used(tree, own, inherited), *_changed(tree), *overridden[module]):
            files[name].add(path.relative_to(PACKAGE.parent).as_posix().removeprefix("dia_lightning/"))
    return files


def _used(tree: list[ast.AST], own: set[str], inherited: set[str]) -> Iterator[str]:
    for node in tree:
        yield from filter(is_private, _imports(node))
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            is_of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if node.attr not in own or (node.attr in inherited and not is_of_self):
                yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value.removeprefix(".")
            if is_private(name) and name not in own:
                yield name


def _imports(node: ast.AST) -> Iterator[str]:
    """The parts of the names that a statement imports from other packages."""
    module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
    if isinstance(node, ast.Import | ast.ImportFrom):
        paths = [module, *(item.name for item in node.names)]
        if not any(path.startswith("dia_lightning") for path in paths):
            yield from (part for path in paths for part in path.split("."))


def _changed(tree: list[ast.AST]) -> Iterator[str]:
    """What is written into imported classes and modules."""
    imports = [node for node in tree if isinstance(node, ast.Import | ast.ImportFrom) and any(_imports(node))]
    names = {item.asname or item.name for node in imports for item in node.names} - {"sys", "logging"}
    for node in tree:
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
            yield from [f"{node.value.id}.{node.attr}"] if node.value.id in names else []


def _defined(tree: Iterable[ast.AST]) -> Iterator[str]:
    """Names of functions, classes and variables, and what methods set on ``self``."""
    for node in tree:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        if isinstance(node, ast.ClassDef):
            parts = [part for part in ast.walk(node) if isinstance(part, ast.Attribute)]
            yield from (part.attr for part in parts if _is_set_on_self(part))


def _is_set_on_self(node: ast.Attribute) -> bool:
    return isinstance(node.ctx, ast.Store) and ast.unparse(node.value) in ("self", "cls")


@functools.cache
def _own_classes() -> list[type]:
    for module in pkgutil.walk_packages(dia_lightning.__path__, "dia_lightning."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    modules = [module for name, module in sys.modules.items() if name.startswith("dia_lightning")]
    classes = [(cls, module.__name__) for module in modules for cls in vars(module).values() if inspect.isclass(cls)]
    return [cls for cls, module in classes if cls.__module__ == module]


@functools.cache
def _names_of(cls: type) -> frozenset[str]:
    """Private names of a class, without those that Python makes."""
    source = _classes_in(sys.modules[cls.__module__]).get(cls.__name__)
    defined = () if source is None else _defined(ast.walk(source))
    made = {"_abc_impl", "_is_protocol", "_is_runtime_protocol", "_backward_cls"}
    return frozenset(name for name in {*vars(cls), *defined} - made if is_private(name))


@functools.cache
def _classes_in(module: ModuleType) -> dict[str, ast.ClassDef]:
    try:
        tree = ast.parse(inspect.getsource(module))
    except (OSError, TypeError):  # of C
        return {}
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _foreign(cls: type) -> set[str]:
    bases = (base for base in cls.__mro__[1:-1] if not base.__module__.startswith("dia_lightning"))
    return {name for base in bases for name in _names_of(base)}
