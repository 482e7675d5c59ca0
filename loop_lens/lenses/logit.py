"""The logit lens: the stream as if it were the last layer's."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.lenses.base import Lens
from loop_lens.unrolling.sites import Site


class LogitLens(Lens):
    """Final norm and unembedding, at any stream: ``logits = W_U norm(x) + b_U``.

    A state that has been through the final norm inside the loop (Ouro, HRM-Text) is not normed again.

    Source:
        nostalgebraist, "interpreting GPT: the logit lens" (2020).

    Example:
        >>> from loop_lens.lenses import LogitLens
        >>> _, cache = model.run_with_cache(prompt)
        >>> site = model.locate("loop.7.blocks.1.hook_resid_post")
        >>> LogitLens().read(cache[site.flat], site, model).shape
        torch.Size([1, 11, 11])
    """

    kind = "logit"

    def read(
        self, stream: Float[Tensor, "*rest d_model"], site: Site, model: HookedLoopedTransformer
    ) -> Float[Tensor, "*rest vocab"]:
        """Logits of a stream."""
        return to_logits(model, stream, normed=is_normed(model, site))


def is_normed(model: HookedLoopedTransformer, site: Site) -> bool:
    """Whether a site's stream has been through the final norm already."""
    return site.between and site.short == "state_out" and model.body.ends_normed


def to_logits(
    model: HookedLoopedTransformer, stream: Float[Tensor, "*rest d_model"], *, normed: bool
) -> Float[Tensor, "*rest vocab"]:
    """Logits by the model's own final norm, unembedding and scale, without statistics or hook points.

    ``transformer_lens.tools.analysis.logit_readout`` takes statistics as it reads: `loop_lens.lens` takes its own.
    """
    if not normed:
        stream = model.ln_final(stream)
    unembed: Any = getattr(model.unembed, "original_component", None) or model.unembed
    return model.adapter.apply_output_logits_transform(unembed(stream))
