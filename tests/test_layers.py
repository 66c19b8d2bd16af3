"""Imports only point downwards, and the lower layers do not need the packages of the upper ones."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dia_lightning._extras import _EXTRA_OF

PACKAGE = Path(__file__).parents[1] / "dia_lightning"

# What each layer may import from this package ...
BELOW = {
    "attention": {"_choices", "_extras", "_hyperparameters"},
    "drawing": {"_extras"},
    "models": {
        *("attention", "_checkpoint_file", "_choices", "_evaluating", "_extras", "_float32", "_hub"),
        *("_torchvision_guard", "_whole_files"),
    },
    "analysis": {"attention", "models", "drawing", "_choices", "_evaluating", "_extras", "_whole_files"},
    "datamodules": {
        *("_apportion", "_checkpoint_file", "_choices", "_coco_tools", "_extras", "_hyperparameters"),
        *("_text", "_torchvision_guard", "_whole_files"),
    },
    "loggers": {"_extras", "_free_path", "_redact", "_text", "_whole_files"},
    "callbacks": {
        *("analysis", "tasks", "datamodules", "models", "attention", "drawing"),
        *("_apportion", "_checkpoint_file", "_coco_tools", "_extras", "_free_path", "_whole_files"),
    },
    "tasks": {
        *("models", "attention", "_checkpoint_file", "_checkpoint_kind", "_choices", "_coco_tools"),
        *("_evaluating", "_extras", "_float32", "_hub", "_hyperparameters", "_redact", "_whole_files"),
    },
    "reproduce": {"tasks", "_config_files", "_extras", "_redact", "_strict_yaml", "_text", "_whole_files"},
    "cli": {
        *("analysis", "tasks", "callbacks", "loggers", "datamodules", "models", "attention", "drawing", "reproduce"),
        *("_checkpoint_file", "_checkpoint_kind", "_choices", "_config_files", "_free_path", "_hyperparameters"),
        *("_redact", "_strict_yaml", "_text", "_torchvision_guard", "_whole_files"),
    },
}
# ... and what the parts of the command line may import from it.
OF_CLI = {"parsing": {"COMMANDS", "_errors"}, "runs": {"parsing", "_errors"}}
# ... and which other packages it must not need.
UPPER = {"lightning", "pytorch_lightning", "torchmetrics", "wandb", "matplotlib", "jsonargparse", "timm", "diffusers"}
WITHOUT = {
    "attention": UPPER | {"torchvision", "numpy", "sklearn"},
    "models": UPPER - {"timm", "diffusers"},
    "drawing": UPPER - {"matplotlib"},
    "analysis": UPPER - {"matplotlib"},
}

FILES = [pytest.param(path, id=str(path.relative_to(PACKAGE))) for path in sorted(PACKAGE.rglob("*.py"))]


def imported_names(path: Path) -> Iterator[str]:
    """Yield the full names of what a file imports, also inside functions: modules, and names from modules."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {path}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0]


@pytest.mark.parametrize("path", FILES)
def test_imports_point_downwards(path: Path) -> None:
    layer = layer_of(path)
    own = {name.split(".")[1] for name in imported_names(path) if name.startswith("dia_lightning.")}
    if layer in BELOW:
        assert own - {layer, "__version__"} <= BELOW[layer]
    elif layer == "__main__.py":
        assert own <= {"cli", "__version__", "_choices", "_extras", "_version", "_torchvision_guard"}
    elif layer == "__init__.py":  # attention is imported on demand
        assert own <= {"_version", "__version__", "attention"}
    elif layer == "_checkpoint_file.py":
        assert own <= {"_checkpoint_kind", "_whole_files"}
    elif layer == "_redact.py":
        assert own <= {"_hyperparameters"}
    elif layer == "_hub.py":
        assert own <= {"_extras", "_version", "_whole_files"}
    elif layer == "_coco_tools.py":
        assert own <= {"_extras"}
    else:  # what is imported with the package itself must stay light
        assert own <= {"_version", "__version__"}


@pytest.mark.parametrize("part", OF_CLI)
def test_imports_within_the_command_line_point_downwards(part: str) -> None:
    for path in (PACKAGE / "cli" / part).glob("*.py"):
        of_cli = {name.split(".")[2] for name in imported_names(path) if name.startswith("dia_lightning.cli.")}
        assert of_cli - {part} <= OF_CLI[part], path.name


@pytest.mark.parametrize("path", FILES)
def test_no_package_imports_what_is_private_in_another(path: Path) -> None:
    """Modules beside the packages are common ground."""
    own = {"__main__.py": "cli"}.get(layer_of(path), layer_of(path))  # the command line, as a module that is run
    others = [name for name in imported_names(path) if re.match(rf"dia_lightning\.(?!{own}\.)[a-z]", name)]
    assert [name for name in others if "._" in name] == []


@pytest.mark.parametrize("path", FILES)
def test_lower_layers_do_without_the_packages_of_upper_ones(path: Path) -> None:
    packages = {name.split(".")[0] for name in imported_names(path)}
    assert not packages & WITHOUT.get(layer_of(path), set())


def test_every_layer_is_known() -> None:
    layers = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert layers == set(BELOW)


def test_the_wheel_has_every_package() -> None:
    """`packages` in pyproject.toml is a list, because one is a folder from elsewhere."""
    listed = re.findall(r'^  "(dia_lightning[\w.]*)",$', (PACKAGE.parent / "pyproject.toml").read_text(), re.MULTILINE)
    found = {".".join(path.parent.relative_to(PACKAGE.parent).parts) for path in PACKAGE.rglob("*.py")}
    assert sorted(listed) == sorted({*found, "dia_lightning.configs"})


def test_every_extra_named_in_a_message_exists() -> None:
    extras = (PACKAGE.parent / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    assert all(re.search(rf"^{name} = \[", extras, re.MULTILINE) for name in {*_EXTRA_OF.values(), "detection"})
