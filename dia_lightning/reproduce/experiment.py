"""A specification for ``reproduce``: arms and seeds, their commands, and what is compared."""

import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dia_lightning import _strict_yaml
from dia_lightning._config_files import find_config, no_config
from dia_lightning._redact import redact_arguments
from dia_lightning._text import read_text

KEYS = ("name", "base", "options", "seeds", "control", "metrics", "arms")
#: Options that the runner sets, and what to write instead.
OWN_OPTIONS = {
    "seed_everything": "name the seeds below seeds",
    "trainer.logger": "every run has a folder of its own; add a logger with trainer.logger+",
    "ckpt_path": "every run starts anew; to start from weights use model.init_from",
}


@dataclass(frozen=True)
class Metric:
    """A logged metric, and how to show it.

    Args:
        name: as it is logged, for example ``"test/acc"``.
        scale: factor for the values.
        unit: of the multiplied values.
        digits: after the decimal point, in 0..10.
    """

    name: str
    scale: float = 1.0
    unit: str = ""
    digits: int = 4

    @property
    def title(self) -> str:
        """The name with the unit."""
        return f"{self.name} ({self.unit})" if self.unit else self.name


@dataclass(frozen=True)
class Run:
    """One training run of an experiment."""

    arm: str
    seed: int
    configs: tuple[str, ...]
    options: tuple[str, ...]

    @property
    def place(self) -> Path:
        """The folder of the run, from that of the experiment."""
        return Path(self.arm) / f"seed={self.seed}"

    @property
    def command(self) -> tuple[str, ...]:
        """The arguments of ``dia-lightning`` that determine the result."""
        return ("fit", *_with_flag(self.configs), *self.options, f"--seed_everything={self.seed}")

    def command_in(self, experiment_folder: Path) -> tuple[str, ...]:
        """Return the same arguments plus one that puts the run's files into its own folder."""
        init_args = {"save_dir": str(experiment_folder), "name": self.arm, "version": self.place.name}
        logger = json.dumps([{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": init_args}])
        # before the options and a list, so that they may add further loggers
        return (
            "fit",
            *_with_flag(self.configs),
            f"--trainer.logger={logger}",
            *self.options,
            f"--seed_everything={self.seed}",
        )


@dataclass(frozen=True)
class Experiment:
    """Arms that are compared over the same seeds."""

    name: str
    configs: tuple[str, ...]
    digests: Mapping[str, str]  # of the configs' contents
    arms: Mapping[str, tuple[str, ...]]
    seeds: tuple[int, ...]
    controls: Mapping[str, str] = field(default_factory=dict)  # of arms that are compared with another one
    metrics: tuple[Metric, ...] = ()

    @property
    def runs(self) -> list[Run]:
        """Every seed of every arm; all arms run a first seed before any runs a second."""
        return [Run(arm, seed, self.configs, options) for seed in self.seeds for arm, options in self.arms.items()]


def in_shell(command: Sequence[str]) -> str:
    """Return a command of ``dia-lightning`` as it is typed in a shell, without secrets."""
    return shlex.join(["dia-lightning", *redact_arguments(command)])


def read_experiment(path: str) -> Experiment:
    """Read a specification.

    Args:
        path: a YAML file, or the name of the package's, with ``name``, ``base`` (configs, likewise), ``arms`` (name ->
            options), ``seeds`` and ``metrics`` (logged name -> ``scale``, ``unit``, ``digits``); optionally ``options``
            of all arms and ``control``, the arm to compare with, or for each arm its own (arm -> control).

    Raises:
        FileNotFoundError: if the file or a base config is missing.
        ValueError: if something in it is unknown, missing or of the wrong type; the message names the place.
    """
    try:
        content = _load(path, "Give the path of a specification, such as reproduce/digits_sharing.yaml.")
        if not isinstance(content, dict):
            raise ValueError(f"a specification has the keys {', '.join(KEYS)}, but here is {content!r}.")
        _check_keys("", content, KEYS)
        for key in ("name", "base", "arms", "seeds", "metrics"):
            if not content.get(key):
                raise ValueError(f"{key} is missing or empty. Needed are name, base, arms, seeds and metrics.")
        configs = tuple(map(str, _list(content["base"], "base")))
        hint = "Base configs are looked for from the working folder, then among those of the package."
        common = _mapping(content.get("options"), "options")
        arms = {
            _name(arm, "an arm"): _as_arguments({**common, **_mapping(options, f"arms: {arm}")})
            for arm, options in _mapping(content["arms"], "arms").items()
        }
        return Experiment(
            name=_name(content["name"], "name"),
            configs=configs,
            digests={config: _digest(_load(config, hint)) for config in configs},
            arms=arms,
            seeds=_seeds(content["seeds"]),
            controls=_controls(content.get("control"), arms),
            metrics=tuple(_metric(*item) for item in _mapping(content["metrics"], "metrics").items()),
        )
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from error


def _load(name: str, hint: str) -> Any:
    path = find_config(name)
    if not path.is_file():
        raise FileNotFoundError(no_config(name, hint))
    return _strict_yaml.load(read_text(path))


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _with_flag(configs: Sequence[str]) -> list[str]:
    return [part for config in configs for part in ("-c", config)]


def _as_arguments(options: Mapping[str, Any]) -> tuple[str, ...]:
    for name in options:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][\w.]*\+?", name):
            raise ValueError(f"options are written as in a config, model.lr: 0.1, without hyphens; got {name!r}.")
        if name in OWN_OPTIONS:
            raise ValueError(f"{name} is set by the runner. Leave it out: {OWN_OPTIONS[name]}.")
    return tuple(f"--{name}={_as_text(value)}" for name, value in options.items())


def _as_text(value: Any) -> str:
    """Write a value so that the command line reads the same one."""
    if isinstance(value, str):
        try:
            if _strict_yaml.load(value) == value:
                return value
        except yaml.YAMLError:
            pass
    return json.dumps(value)


def _name(value: Any, what: str) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"\w([\w .,=+()-]*[\w)+])?", value):
        raise ValueError(
            f"{what} is the name of a folder too, a text of letters, digits and spaces, but here is {value!r}. "
            "Write numbers, null, true and false in quotes."
        )
    return value


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{what} must be a list, [a, b], but here is {value!r}.")
    return value


def _mapping(value: Any, what: str) -> dict[Any, Any]:
    if not isinstance(value, dict | None):
        raise ValueError(f"{what} must have names and values, {{model.lr: 0.1}}, but here is {value!r}.")
    return value or {}


def _check_keys(place: str, given: Mapping[Any, Any], known: Sequence[str]) -> None:
    for key in given:
        if key not in known:
            raise ValueError(f"{place}there is no key {key!r}. Known: {', '.join(known)}.")


def _seeds(value: Any) -> tuple[int, ...]:
    seeds = tuple(_list(value, "seeds"))
    for seed in seeds:
        if type(seed) is not int or seed < 0 or seeds.count(seed) > 1:
            raise ValueError(f"seeds must be different whole numbers from 0 on, [0, 1, 2], but here is {value!r}.")
    return seeds


def _controls(value: Any, arms: Mapping[str, Any]) -> dict[str, str]:
    one_for_all = not isinstance(value, dict | None)
    controls = {arm: value for arm in arms if arm != value} if one_for_all else _mapping(value, "control")
    for arm in (*controls, *controls.values(), *([value] if one_for_all else [])):
        if arm not in arms:
            raise ValueError(f"control: there is no arm {arm!r}. Arms: {', '.join(arms)}.")
    return controls


def _metric(name: Any, options: Any) -> Metric:
    values = _mapping(options, f"metrics: {name}")
    _check_keys(f"metrics: {name}: ", values, ("scale", "unit", "digits"))
    metric = Metric(str(name), **values)
    if isinstance(metric.scale, bool) or not isinstance(metric.scale, int | float) or metric.scale == 0:
        raise ValueError(f"metrics: {name}: scale must be a number other than 0, got {metric.scale!r}.")
    if not isinstance(metric.unit, str):
        raise ValueError(f"metrics: {name}: unit must be a text, got {metric.unit!r}. Write it in quotes.")
    if type(metric.digits) is not int or not 0 <= metric.digits <= 10:
        raise ValueError(f"metrics: {name}: digits must be a whole number in 0..10, got {metric.digits!r}.")
    return metric
