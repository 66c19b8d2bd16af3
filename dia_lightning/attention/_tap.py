"""What stands in the place of a layer that ends a residual branch."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dia_lightning.attention._chain import Chain

#: Under this name a tap holds its site. It is the one name that FSDP and distributed checkpoints of torch leave out
#: of the names of parameters (``torch.distributed.algorithms._checkpoint.checkpoint_wrapper``), as the tap's own
#: state dict does.
TAPPED = "_checkpoint_wrapped_module"


class Tap(nn.Module):
    """Stands in the place of a site: runs it and multiplies its output by the attention map of the running block.

    The state dict keeps the keys of the plain network: what the tap holds appears under the site's own name.

    Args:
        site: the submodule that ends a residual branch.
        chain: the chain that the tap belongs to.
        before: whether the site's input is multiplied, and not its output.
        channels_last: whether channels are the last dimension of the features.
        branch_norm: a norm between the site and the unit, for branches that do not end in one.
        stage: number of the stage that the site belongs to, from 0 on, whatever units are shared.
        layer: number of the tap in the network, in the order in which those of a stage run.
    """

    unit_norm: nn.Module | None
    #: Is given the map and the state after it, in every call; it must not change them.
    watcher: Callable[[Tensor, Any], None] | None

    def __init__(
        self,
        site: nn.Module,
        chain: Chain,
        *,
        before: bool = False,
        channels_last: bool = False,
        branch_norm: nn.Module | None = None,
        stage: int = 0,
        layer: int = 0,
    ) -> None:
        super().__init__()
        self.chain = chain
        self.before = before
        self.channels_last = channels_last
        self.add_module(TAPPED, site)
        self.branch_norm = branch_norm
        self.unit_norm = None
        self.stage = stage
        self.layer = layer
        self.watcher = None
        self.register_load_state_dict_post_hook(_name_as_in_plain_network)  # type: ignore[no-untyped-call]

    @property
    def tapped(self) -> nn.Module:
        """The site."""
        return self._modules[TAPPED]  # type: ignore[return-value]  # never None

    def __getattr__(self, name: str) -> Any:
        """Find attributes of the site, such as its weight, where they were."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if TAPPED not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.tapped, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Put tensors of the site where they are used: ``functional_call`` writes them under their plain names."""
        tapped = self.__dict__.get("_modules", {}).get(TAPPED)
        for own in () if tapped is None else (tapped._parameters, tapped._buffers):
            if name in own:
                own[name] = value
                return
        super().__setattr__(name, value)

    def forward(self, features: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.before:
            return self.tapped(self._recalibrate(features), *args, **kwargs)
        return self._recalibrate(self.tapped(features, *args, **kwargs))

    def _recalibrate(self, features: Tensor) -> Tensor:
        if self.branch_norm is not None:
            features = self.branch_norm(features)
        if features.ndim < 3:
            raise RuntimeError(
                f"Features of shape {tuple(features.shape)} have no positions to attend to: "
                f"{type(self.tapped).__name__} is no end of a residual branch. Leave it out of `sites`."
            )
        if not self.channels_last:
            return features * self._attention_map(features)
        planes = features.movedim(-1, 1)  # [B, ..., C] -> [B, C, ...]
        if planes.ndim == 4:
            return features * self._attention_map(planes).movedim(1, -1)
        attention_map = self._attention_map(planes.unsqueeze(-1))  # tokens are a plane of width one: [B, C, N, 1]
        return features * attention_map.squeeze(-1).movedim(1, -1)

    def _attention_map(self, features: Tensor) -> Tensor:
        """Return the map of features [B, C, H, W] from the unit of the running block, and step its state."""
        if not self.chain.frames:
            raise RuntimeError(
                "A site with attention was called outside of its block, so there is no attention state for it. "
                "Call the block, or detach() the network first."
            )
        frame = self.chain.frames[-1]
        frame.taps += 1
        attention_map: Tensor
        if self.unit_norm is None:
            attention_map, frame.state = frame.unit(features, frame.state)
        else:
            attention_map, frame.state = frame.unit(features, frame.state, norm=self.unit_norm)
        if self.watcher is not None:
            self.watcher(attention_map, frame.state)
        return attention_map

    def state_dict(  # type: ignore[override]  # torch types the three overloads of its own signature only
        self, *, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        if destination is None:
            destination = OrderedDict()
            destination._metadata = OrderedDict()  # type: ignore[attr-defined]  # as nn.Module.state_dict does
        for name, child in self.named_children():
            inner = prefix if name == TAPPED else f"{prefix}{name}."
            child.state_dict(destination=destination, prefix=inner, keep_vars=keep_vars)
        metadata = destination._metadata  # type: ignore[attr-defined]  # versions, read under the names of the modules
        metadata[f"{prefix}{TAPPED}"] = metadata[prefix.removesuffix(".")]
        return destination

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.__dict__["_load_errors"] = args[-1]  # filled by the site later, under its inner name
        own = tuple(f"{prefix}{name}." for name, _ in self.named_children() if name != TAPPED)
        for key in [key for key in state_dict if key.startswith(prefix) and not key.startswith(own)]:
            state_dict[f"{prefix}{TAPPED}.{key.removeprefix(prefix)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _name_as_in_plain_network(module: nn.Module, incompatible: Any) -> None:
    errors = module.__dict__.pop("_load_errors")
    for keys in (incompatible.missing_keys, incompatible.unexpected_keys, errors):
        keys[:] = [key.replace(f".{TAPPED}.", ".") for key in keys]
