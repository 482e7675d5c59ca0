"""What measures one thing while batches run."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from loop_lens.prompts.reader import Batch
from loop_lens.unrolling.sites import Site


class Probe:
    """Base of what measures one thing while batches run.

    A probe says which sites it wants, sees their values batch by batch, and adds up what it needs of them.
    Sites lie within blocks or between them, at every firing and iteration.

    Attributes:
        hooks: The hooks whose sites it is asked about, by transformer-lens' short names, e.g.
            ``("resid_post", "pattern", "state_out")``.

    Example:
        >>> from loop_lens.measuring import Probe, measure
        >>> class LargestState(Probe):
        ...     hooks = ("state_out",)
        ...     largest = 0.0
        ...
        ...     def see(self, site, value):
        ...         self.largest = max(self.largest, float(value.norm(dim=-1).max()))
        >>> probe = LargestState()
        >>> measure(model, prompts, [probe], progress=False)
        >>> probe.largest > 0
        True
    """

    hooks: tuple[str, ...] = ()

    def wants(self, site: Site) -> bool:
        """Whether it sees this site; by default all that ``hooks`` name."""
        return True

    def refers_to(self, site: Site, *, last: bool) -> bool:
        """Whether a reference run keeps this site's value for `begin`, if the probe wants the site.

        Args:
            site: A site of the reference run.
            last: Whether it is in the last iteration of its loop; by default only these are kept.
        """
        return last

    def begin(self, batch: Batch, reference: Mapping[Site, Tensor]) -> None:
        """A batch is about to run.

        Args:
            batch: The prompts.
            reference: What the reference run kept for it; empty without a reference.
        """

    def see(self, site: Site, value: Tensor) -> None:
        """A value, in the order in which the model computes them. It may be kept, not written to."""

    def end(self) -> None:
        """The batch has run."""
