"""A call of a block: its inputs, what has run in it, and its handover."""

from typing import Any

import torch
from torch import Tensor, nn

from dia_lightning.attention._links import Link, Slot, tensors_in
from dia_lightning.attention._running import RUNNING, Handover, scope_of
from dia_lightning.attention._search import note, received


class Frame:
    """A block call in progress."""

    def __init__(
        self,
        block: nn.Module,
        link: Link,
        sites: list[nn.Module],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        begun: bool,
    ) -> None:
        self.block = block
        self.link = link
        self.sites = sites  # in the slots of the link
        self.arguments = args, kwargs
        self.begun = begun  # whether the block's own forward was entered
        self.received = None if link.before is None else received(link, args, kwargs)
        self.unit: nn.Module = getattr(block, link.unit) if self.received is None else self.received.unit
        self.state = None if self.received is None else self.received.state
        # of the features before: device and dtype, and how many, where a state depends on it
        self.placement = None if self.received is None else self.received.placement
        self.samples = None if self.received is None or self.state is None else self.received.samples
        self.grad = torch.is_grad_enabled()
        self.ran: list[Slot] = []
        self.wants_map = False  # whether the unit is being called for a site
        self.outer = RUNNING.frame

    def __enter__(self) -> "Frame":
        RUNNING.frame = self
        return self

    def __exit__(self, *error: object) -> None:
        RUNNING.frame = self.outer

    def note_run(self, slot: Slot) -> None:
        """Record that the site in a slot has run, and whether autograd records it."""
        self.ran.append(slot)
        self.grad = self.grad and torch.is_grad_enabled()

    def hand_on(self, output: Any) -> None:
        """Check that every site has run, and leave the state for the next block."""
        link, returned = self.link, tensors_in(output)
        all_ran = len(self.ran) == len(link.slots) and all(slot in self.ran for slot in link.slots)
        is_skipped = not all_ran and self._returned_its_stream(returned)
        handover = None
        if (all_ran or is_skipped) and not link.last:
            handover = Handover(self.unit, self.state, link, self.grad, self.placement, self.samples)
        self._leave_in_scope(handover)
        if not (all_ran or is_skipped):
            raise RuntimeError(_sites_did_not_run(self))
        if handover is None:
            return
        given = [] if len(returned) == 1 and not (is_skipped and link.before is None) else tensors_in(self.arguments)
        for tensor in returned:
            if any(tensor is other for other in given):
                continue  # it is not the stream, or may outlive the forward
            note(tensor, handover)

    def _returned_its_stream(self, returned: list[Tensor]) -> bool:
        """Return whether the block skipped its branch, as stochastic depth may; it then passes its input on."""
        stream, _ = self.link.stream_in(*self.arguments)
        return not self.ran and len(stream) == 1 and len(returned) > 0 and returned[0] is stream[0]

    def _leave_in_scope(self, handover: Handover | None) -> None:
        scope = scope_of(self.link.chain)
        if scope is not None:
            left = [other for other in scope.handovers if other is not self.received]
            scope.handovers = left if handover is None else [*left, handover]


def _sites_did_not_run(frame: Frame) -> str:
    counts = [
        f"{slot.path!r} ({type(site).__name__}) {frame.ran.count(slot)} times"
        for slot, site in zip(frame.link.slots, frame.sites, strict=True)
    ]
    return (
        f"In one call of {type(frame.block).__name__} each site with attention must be called once, but they ran: "
        f"{', '.join(counts)}. Does the block return early, call forward() instead of the module, or pass its weights "
        "to a fused kernel? Then detach() and choose other sites."
    )
