"""What a specification says, as commands."""

from typing import Any

import pytest

from dia_lightning._strict_yaml import load
from dia_lightning.reproduce.experiment import _as_text


@pytest.mark.parametrize(
    "value", [None, True, 1, -1, 1e-4, 1e30, "se", "null", "1e3", "a: b", "{x", "110|0011", "1100", [1, 2], {"r": [4]}]
)
def test_values_arrive_as_they_are_in_the_specification(value: Any) -> None:
    assert repr(load(_as_text(value))) == repr(value)
