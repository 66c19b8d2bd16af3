"""Which attention a task attaches to its network, and where."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from dia_lightning._choices import check_choice
from dia_lightning._hyperparameters import check_is_no_mark
from dia_lightning.attention import attach
from dia_lightning.attention.inspection import needs_example, parameters_saved

if TYPE_CHECKING:
    Attention: TypeAlias = str | Callable[[int], nn.Module]
else:
    Attention = str  # what the command line takes


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """Which attention a network gets, and where.

    Args:
        attention: name of an attention module, a callable ``channels -> nn.Module``, or ``None`` for the plain
            network; on the command line and in configs also the path of a custom class, ``package.module.Gate``.
        attention_args: further arguments of the attention module, for example ``{"reduction": 8}``.
        share: one attention module per ``"stage"`` (DIA) or per ``"block"`` (the usual practice).
        plug: which blocks get attention. It, branches, sites, existing, identity and branch_norm are as
            :func:`~dia_lightning.attention.attach` takes them.
        branches: which branches get attention, by default all; in U-Nets only the residual blocks unless
            ``["conv", "attention"]`` asks for both.
        sites: layers that end branches, instead of those found automatically.
        existing: what to do with the backbone's own attention modules.
        identity: start with maps of exactly 1, for pretrained networks.
        branch_norm: whether pre-activation branches get a norm before the attention module; diffusers' do not.

    Example:
        >>> from dia_lightning.models import get_model
        >>> network = get_model("cifar_resnet", depth=20)
        >>> AttentionOptions(attention="dia-lstm", attention_args={"reduction": 8}).attach_to(network)
        >>> network.layer1[0].dia.input_reduce.out_features
        8
    """

    attention: Attention | None = None
    attention_args: dict[str, Any] | None = None
    share: Literal["stage", "block"] = "stage"
    plug: str | list[int] | None = None
    branches: list[Literal["conv", "attention", "mlp"]] | None = None
    sites: str | list[str] | list[list[str]] | None = None
    existing: Literal["keep", "replace", "share"] = "keep"
    identity: bool = False
    branch_norm: bool | None = None

    def __post_init__(self) -> None:
        check_is_no_mark("attention", self.attention)
        check_choice("share", self.share, ("stage", "block"))
        check_choice("existing", self.existing, ("keep", "replace", "share"))
        both = [name for name in self.attention_args or {} if name in AttentionOptions.__dataclass_fields__]
        if both:
            raise ValueError(
                f"attention_args must not have {both[0]!r}: it is an option of the task. Give it beside attention_args."
            )

    def attach_to(self, network: nn.Module, example: Any = None) -> None:
        """Attach the attention to a network, in place, or log that its options are unused.

        Args:
            network: the backbone.
            example: its example input, if :func:`~dia_lightning.attention.attach` does not know the network.

        Raises:
            ValueError: if it cannot be attached.
        """
        if self.changes_network:
            attach(network, example=example if needs_example(network) else None, **self.arguments())
            if self.existing == "share":
                rank_zero_info(f"existing='share' saves {parameters_saved(network):,} parameters of attention modules.")
        elif self.attention_args or self.identity or self.plug is not None or self.share == "block":
            rank_zero_info(
                "attention is None: the network is plain, and attention_args, share, plug and identity are unused."
            )

    @property
    def changes_network(self) -> bool:
        """Whether attention is attached, or the network's own attention replaced or shared."""
        return self.attention is not None or self.existing != "keep"

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of :func:`~dia_lightning.attention.attach` besides the network."""
        own = {field.name: getattr(self, field.name) for field in fields(AttentionOptions)}
        own.pop("attention_args")
        return {**own, **(self.attention_args or {})}
