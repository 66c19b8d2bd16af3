"""check() reports what does not hold."""

import time
from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from dia_lightning.attention import SqueezeExcitation, StyleRecalibration, attach, check
from dia_lightning.models import get_model

Map: TypeAlias = "tuple[Tensor, None]"


def test_check_refuses_a_network_whose_output_is_not_finite() -> None:
    network: Any = attach(get_model("cifar_resnet", depth=11), "se")
    nn.init.constant_(network.fc.bias, float("nan"))
    with pytest.raises(ValueError, match="returns NaN or infinity"):
        check(network, torch.randn(2, 3, 16, 16))


# One unit per row that breaks what the row checks, as a user might write it.


class Unit(SqueezeExcitation):
    """Without a bottleneck, which would let little through."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, reduction=1)


class Unused(Unit):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.extra = nn.Parameter(torch.zeros(1))


class Recording(Unit):
    def forward(self, features: Tensor, state: None = None, mean: Tensor | None = None) -> Map:
        result = super().forward(features, state, mean)
        self.maps = [*getattr(self, "maps", []), result[0]]
        return result


class Undivided(Unit):
    def __deepcopy__(self, memo: Any) -> "Undivided":
        return self


class Lambda(Unit):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.activation = lambda value: value


class Averageless(Unit):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.copies = 0

    def __deepcopy__(self, memo: Any) -> nn.Module:
        twin = Averageless(self.reduce.in_features)
        twin.load_state_dict(self.state_dict())
        twin.copies = self.copies + 1
        return twin

    def forward(self, features: Tensor, state: None = None, mean: Tensor | None = None) -> Map:
        attention_map, _ = super().forward(features, state, mean)
        return attention_map * (1 + 0.1 * self.copies), None


class Doubled(nn.Linear):
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = 2 * destination[f"{prefix}weight"]


class Unsaved(Unit):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.expand = Doubled(self.expand.in_features, channels)


class Tied(Unit):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.expand.weight = self.reduce.weight


class Sticky(Unit):
    def forward(self, features: Tensor, state: None = None, mean: Tensor | None = None) -> Map:
        attention_map, _ = super().forward(features, state, mean)
        last, self.last = getattr(self, "last", attention_map.detach()), attention_map.detach()
        return (attention_map * last if last.shape == attention_map.shape else attention_map), None


class Mixing(Unit):
    def forward(self, features: Tensor, state: None = None, mean: Tensor | None = None) -> Map:
        attention_map, _ = super().forward(features, state, mean)
        return attention_map * features.mean(), None


class Shared(Unit):
    def forward(self, features: Tensor, state: None = None, mean: Tensor | None = None) -> Map:
        self.features = features
        time.sleep(0.01)
        return super().forward(self.features, state, mean)


class Coarse(Unit):
    def forward(self, features: Tensor, state: None = None, mean: Tensor | None = None) -> Map:
        attention_map, _ = super().forward(features, state, mean)
        return attention_map + 1e3 * (self.expand.weight @ self.reduce.weight - self._exact()).abs().sum(), None

    def _exact(self) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.expand.weight @ self.reduce.weight


class Viewing(Unit):
    def forward(self, features: Tensor, state: None = None, mean: Tensor | None = None) -> Map:
        return super().forward(features.view(features.shape[0], -1).view(features.shape), state, mean)


class Picky(StyleRecalibration):
    def forward(self, features: Tensor, state: None = None, norm: nn.Module | None = None) -> Map:
        if not isinstance(self.norm if norm is None else norm, nn.BatchNorm1d):
            raise TypeError("a BatchNorm1d is needed")
        return super().forward(features, state, norm)


class Counting(Unit):
    def forward(self, features: Tensor, state: None = None, mean: Tensor | None = None) -> Map:
        attention_map, _ = super().forward(features, state, mean)
        if torch._C._current_graph_task_id() != -1:  # recomputed
            attention_map = attention_map * 2
        return attention_map, None


class Branching(Unit):
    def forward(self, features: Tensor, state: None = None, mean: Tensor | None = None) -> Map:
        attention_map, _ = super().forward(features, state, mean)
        return (attention_map * 2 if features.sum() > 0 else attention_map), None


ROWS: dict[str, tuple[Callable[[int], nn.Module], str]] = {
    "every parameter of the attention gets a gradient": (Unused, "stage"),
    "no state is left after a forward": (Recording, "stage"),
    "deepcopy": (Undivided, "stage"),
    "pickle": (Lambda, "stage"),
    "EMA copy": (Averageless, "stage"),
    "state_dict round trip": (Unsaved, "stage"),
    "safetensors": (Tied, "stage"),
    "earlier forwards do not matter": (Sticky, "stage"),
    "batch mates do not matter": (Mixing, "stage"),
    "threads do not mix": (Shared, "stage"),
    "bfloat16 autocast": (Coarse, "stage"),
    "channels_last": (Viewing, "stage"),
    "SyncBatchNorm conversion": (Picky, "stage"),
    "checkpointing of blocks, non-reentrant": (Counting, "stage"),
    "checkpointing of blocks, reentrant": (Counting, "block"),
    "torch.export": (Branching, "stage"),
}


def blocks(block: Callable[[int, int], nn.Module] = BasicBlock) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(block(4, 4), block(4, 4))


def failed_rows(network: nn.Module, **options: Any) -> dict[str, str]:
    report = check(network, torch.randn(2, 4, 6, 5), **options)
    assert report.ok is all(row.holds for row in report.rows)
    assert ("NO" in str(report)) is not report.ok
    return {row.name: row.note for row in report.rows if not row.holds}


@pytest.mark.parametrize("row", ROWS)
def test_a_row_fails_where_a_unit_breaks_what_it_looks_at(row: str) -> None:
    if row == "safetensors":
        pytest.importorskip("safetensors")
    unit, share = ROWS[row]
    assert row in failed_rows(attach(blocks(), unit, share=share))  # type: ignore[arg-type]


def test_every_row_holds_for_units_of_the_package() -> None:
    for name in ("dia-lstm", "se", "srm"):
        assert failed_rows(attach(blocks(), name)) == {}


class Idle(nn.Sequential):
    def forward(self, features: Tensor) -> Tensor:
        output: Tensor = self[0](features)
        return output


def test_a_site_that_does_not_run_is_named() -> None:
    failed = failed_rows(attach(Idle(*blocks().children()), "se"))
    assert "1 of 2 did not run, for example 1.bn2" in failed["every site runs"]


def test_a_block_that_was_replaced_is_missed() -> None:
    network: Any = attach(blocks(), "se")
    network[1] = BasicBlock(4, 4).eval()
    assert "1 sites are gone" in failed_rows(network)["every site runs"]


def test_what_cannot_be_checked_is_neither_right_nor_wrong() -> None:
    pytest.importorskip("safetensors")  # else that is a third row

    class Local(BasicBlock):  # type: ignore[misc]
        """A block that cannot be pickled, with or without attention."""

    report = check(attach(blocks(Local), "se"), torch.randn(1, 4, 6, 5))
    unchecked = {row.name: row.note for row in report.rows if row.note.startswith("not checked")}
    assert report.ok
    assert unchecked.keys() == {"pickle", "batch mates do not matter"}
    assert str(report).count("  --  not checked") == 2


class Numbered(BasicBlock):  # type: ignore[misc]
    """A block whose keys depend on how many children it has."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}children.{len(self._modules)}"] = torch.zeros(1)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}children.{len(self._modules)}", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


def test_names_that_change_are_named() -> None:
    failed = failed_rows(attach(blocks(Numbered), "se"))
    assert "names differ: ['0.children" in failed["weights of the plain network fit"]


class Compiling(Unit):
    def forward(self, features: Tensor, state: None = None, mean: Tensor | None = None) -> Map:
        attention_map, _ = super().forward(features, state, mean)
        return (attention_map * 2 if torch.compiler.is_compiling() else attention_map), None


@pytest.mark.slow
def test_what_only_a_compiler_changes_is_found_on_request() -> None:
    assert "torch.compile after a plain copy was compiled" in failed_rows(attach(blocks(), Compiling), slow=True)


def test_every_row_has_a_test() -> None:
    rows = {row.name for row in check(attach(blocks(), "se"), torch.randn(2, 4, 6, 5)).rows}
    assert rows - ROWS.keys() == {"every site runs", "weights of the plain network fit"}


def test_a_detector_is_checked_by_its_backbone() -> None:
    detector = torchvision.models.detection.fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=2)
    attach(detector, "se")
    with pytest.raises(ValueError, match=r"check\(detector.backbone"):
        check(detector, torch.rand(2, 3, 64, 64))
