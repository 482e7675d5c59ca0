"""The coda lens: what the rest of the model makes of the state after an iteration."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.lenses.base import Lens
from loop_lens.lenses.logit import is_normed, to_logits
from loop_lens.unrolling.sites import Site


class CodaLens(Lens):
    """The blocks after the loop, run from the state after iteration t: ``logits = coda(x_t)``.

    For every family these are the model's logits at t + 1 iterations. Where nothing comes after the loop,
    the final norm and the unembedding are left.

    Source:
        Lu et al., arXiv 2507.02199.

    Example:
        >>> from loop_lens.lenses import CodaLens
        >>> _, cache = model.run_with_cache(prompt)
        >>> site = model.locate("loop.3.hook_state_out")
        >>> with model.at_recurrences(4):
        ...     torch.allclose(CodaLens().read(cache[site.flat], site, model), model(prompt), atol=1e-5)
        True
    """

    kind = "coda"
    default_sites = "state_out"

    def read(
        self, stream: Float[Tensor, "*rest d_model"], site: Site, model: HookedLoopedTransformer
    ) -> Float[Tensor, "*rest vocab"]:
        """Logits of a state."""
        state, first = model.body.enter_coda(stream), coda_start(model)
        if first is None:
            return to_logits(model, state, normed=is_normed(model, site))
        return model(state, start_at_layer=first)

    def reads_across(self, model: HookedLoopedTransformer) -> bool:
        """Where there is a coda, by its attention."""
        return coda_start(model) is not None

    def says_output(self, site: Site, model: HookedLoopedTransformer) -> bool:
        """After the last iteration, unless iterations run in another order."""
        last = model.schedule.iterations(model.schedule.main_loop)[-1]
        return site.iteration == last and model.body.order is None

    def segment(self, model: HookedLoopedTransformer) -> str:
        """The outermost loop."""
        return model.schedule.main_loop

    def require(self, model: HookedLoopedTransformer, sites: Sequence[Site]) -> None:
        """Only states after an iteration can be read."""
        super().require(model, sites)
        loop = model.schedule.main_loop
        for site in sites:
            if not (site.between and site.segment == loop and site.short == "state_out"):
                raise ValueError(
                    f"kind={self.kind!r} reads the state after an iteration, {loop}.<t>.hook_state_out, "
                    f"not {site.flat}"
                )


def coda_start(model: HookedLoopedTransformer) -> int | None:
    """Index of the coda's first firing, None without a coda."""
    loop = model.schedule.main_loop
    after = 1 + max(b.last for b in model.schedule.boundaries if b.segment == loop)
    return after if after < len(model.schedule) else None
