"""The Jacobian lens on loops: each site carried to the end by its mean derivative."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.lenses.base import Lens
from loop_lens.lenses.logit import to_logits
from loop_lens.lenses.tuned import require_model
from loop_lens.measuring.files import read_file, write_file
from loop_lens.unrolling.sites import Firing, Site


@dataclass(frozen=True)
class LoopJacobianLens(Lens):
    """Matrices that carry a block's output to the end: ``logits = W_U norm(J x)``, J the mean of d x_end / d x.

    Attributes:
        matrices: By firing, ``loop.3.blocks.1`` (or by layer, ``core.1``, where factorised); each
            [d_model d_model], acting on columns.
        factorised: Whether iterations share matrices: a block's output is carried to the end of its
            iteration, from there by one matrix per further iteration, and through the coda by another:
            J = J_coda J_iteration^(R-1-t) J_layer.
        n_prompts: Prompts that the means are over.
        model_id: Fingerprint of the model.
        ends_normed: Whether it ends behind the final norm (loops that end in it, factorised).

    Source:
        Gurnee et al. (2026), the Jacobian lens; for loops arXiv 2609.01924. There the product is over
        layers; here over iterations, which is what weight tying makes equal.

    Example:
        >>> from loop_lens.lenses import LoopJacobianLens, fit_jacobian_lens
        >>> lens = fit_jacobian_lens(model, prompt, factorised=True, dim_batch=64, progress=False)
        >>> sorted(lens.matrices)
        ['coda', 'core.0', 'core.1', 'iteration', 'prelude.blocks.0']
        >>> LoopJacobianLens.load(lens.save("lens.safetensors")).n_prompts
        1
    """

    kind = "jacobian"

    matrices: dict[str, Tensor]
    factorised: bool
    n_prompts: int
    model_id: str
    ends_normed: bool = False
    _powers: dict[tuple[str, int], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def read(
        self, stream: Float[Tensor, "*rest d_model"], site: Site, model: HookedLoopedTransformer
    ) -> Float[Tensor, "*rest vocab"]:
        """Logits of a block's output, carried to the end."""
        matrix = self.matrix(site, model).to(stream.device)
        return to_logits(model, (stream.float() @ matrix.T).to(stream.dtype), normed=self.ends_normed)

    def matrix(self, site: Site, model: HookedLoopedTransformer) -> Float[Tensor, "d_model d_model"]:
        """The matrix of one site."""
        place, key = site.place, self._key(site, model)
        if key is None:
            return torch.eye(model.cfg.d_model)
        if not key.startswith("core."):
            return self.matrices[key]
        assert isinstance(place.iteration, int)
        left = model.recurrences - 1 - place.iteration
        if (key, left) not in self._powers:
            iterations = torch.linalg.matrix_power(self.matrices["iteration"], left)
            self._powers[key, left] = self.matrices["coda"] @ iterations @ self.matrices[key]
        return self._powers[key, left]

    def _key(self, site: Site, model: HookedLoopedTransformer) -> str | None:
        """What a block's matrix goes by, None for the last block, which is at the end already."""
        if self.factorised and site.segment == model.schedule.main_loop:
            return f"core.{site.layer}"
        return None if site.place == model.schedule[-1] else site.place.prefix

    def require(self, model: HookedLoopedTransformer, sites: Sequence[Site]) -> None:
        """It must have been fitted for the model and the sites, which are blocks' outputs."""
        super().require(model, sites)
        d_model = next(iter(self.matrices.values())).shape[0]
        require_model(self.model_id, d_model, model, "this Jacobian lens was fitted")
        for site in sites:
            if not (isinstance(site.place, Firing) and site.short == "resid_post"):
                raise ValueError(f"a Jacobian lens reads blocks' outputs (resid_post), not {site.flat}")
            key = self._key(site, model)
            if key is not None and key not in self.matrices:
                raise ValueError(
                    f"this Jacobian lens has no matrix for {site.flat}: it was fitted at another number of "
                    "iterations or for other sites. factorised=True fits one for any number of iterations"
                )

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file."""
        names = ("factorised", "n_prompts", "model_id", "ends_normed")
        about = {name: getattr(self, name) for name in names}
        return write_file(path, type(self).__name__, self.matrices, about)

    @classmethod
    def load(cls, path: str | Path) -> LoopJacobianLens:
        """Read a file that `save` wrote.

        Raises:
            UnreadableError: If it is another kind of file, or damaged.
        """
        with read_file(path, cls.__name__) as (matrices, about):
            return cls(matrices, **about)
