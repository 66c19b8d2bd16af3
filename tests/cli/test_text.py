"""Text as other programs write it: sweeps, shells and editors of any system."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dia_lightning import _strict_yaml
from dia_lightning.cli.command import rehearse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("None", None),
        ("'None'", "None"),
        ("[None, 1, True]", [None, 1, True]),
        ("{'a': None, 'b': {'c': [None, False]}, None: 1e-05}", {"a": None, "b": {"c": [None, False]}, "None": 1e-05}),
        ("a: None  # nothing\r\nb: 'None'\r\nc: Nones\r\n", {"a": None, "b": "None", "c": "Nones"}),
    ],
)
def test_none_of_python_is_null(text: str, value: object) -> None:
    assert _strict_yaml.load(text) == value


def test_options_are_read_as_the_agent_of_a_sweep_writes_them(workplace: Path) -> None:
    values = {
        "attention": None,
        "attention_args": None,
        "nesterov": True,
        "identity": False,
        "milestones": [1, 2],
        "schedule": "step",
        "backbone_args": {"depth": 11},
    }
    options = [f"--model.{name}={value}" for name, value in values.items()]
    built = rehearse(["fit", "-c", "tiny.yaml", *options, "--trainer.callbacks=None"])
    assert {name: built.model.hparams[name] for name in values} == values


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-8"])
def test_configs_are_read_in_the_encodings_that_shells_and_editors_write(workplace: Path, encoding: str) -> None:
    text = Path("tiny.yaml").read_text().replace("name: tiny", "name: größer").replace("\n", "\r\n")
    model, rest = text.partition("data:\r\n")[::2]
    Path("model.yaml").write_bytes(model.encode(encoding))
    Path("data.yaml").write_bytes(rest.replace("\r\n  ", "\r\n").removeprefix("  ").encode(encoding))
    built = rehearse(["fit", "-c", "model.yaml", "--data", "data.yaml"])
    assert built.model.lr == 0.05
    assert built.datamodule.batch_size == 10
    [logger] = built.trainer.loggers
    assert logger.name == "größer"


def test_other_encodings_are_refused_in_a_line(fails: Callable[..., str]) -> None:
    Path("latin.yaml").write_bytes("trainer: {default_root_dir: größer}".encode("latin-1"))
    assert "latin.yaml is not UTF-8 text" in fails("fit", "-c", "tiny.yaml", "-c", "latin.yaml")
