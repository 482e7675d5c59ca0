"""What measures one thing while batches run."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from loop_lens.prompts.reader import Batch
from loop_lens.unrolling.sites import Firing

Ends = dict[tuple[str, str, int], Tensor]
"""What the reference run left, by (hook, segment, layer)."""


class Probe(Protocol):
    """What measures one thing while batches run.

    Attributes:
        hooks: transformer-lens' short names of what it sees, e.g. ``("resid_post", "pattern")``.
    """

    hooks: tuple[str, ...]

    def wants(self, hook: str, firing: Firing) -> bool:
        """Whether it sees this hook of this firing."""
        ...

    def begin(self, batch: Batch, ends: Ends) -> None:
        """A batch is about to run; ``ends`` is empty without a reference."""
        ...

    def see(self, hook: str, firing: Firing, value: Tensor) -> None:
        """A value, in firing order. It may be kept, not written to."""
        ...

    def end(self) -> None:
        """The batch has run."""
        ...
