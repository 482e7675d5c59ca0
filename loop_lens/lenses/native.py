"""The native lens: what a model that was made to be read after every iteration says there."""

from __future__ import annotations

from collections.abc import Sequence

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.lenses.coda import CodaLens
from loop_lens.unrolling.sites import Site


class NativeLens(CodaLens):
    """The coda lens, for models whose training chose the number of iterations or read every one of them.

    Ouro and HRM-Text read the normed state by the unembedding, Huginn and the retrofits by their coda. A
    looped ordinary decoder has no such readout, and is refused.

    Example:
        >>> loop_lens.lens(model, prompt, kind="native", positions=[-1]).top_ids[:, 0, 0, 0].shape
        torch.Size([8])
    """

    kind = "native"

    def require(self, model: HookedLoopedTransformer, sites: Sequence[Site]) -> None:
        """The model must have been made to be read after an iteration."""
        if not model.body.reads_iterations:
            raise ValueError(
                "kind='native' has no meaning for this model: nobody trained it to be read out after an "
                "iteration. kind='coda' runs its last layers from there, kind='logit' skips them"
            )
        super().require(model, sites)
