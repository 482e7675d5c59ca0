"""The Jacobian lens on loops: each site carried to the end by its mean derivative."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.tools.analysis import JacobianLens

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.lenses.readers import coda_start
from loop_lens.lenses.tuned import fingerprint, read_lens_file, require_model
from loop_lens.prompts.reader import read_together
from loop_lens.unrolling.sites import Firing, Site

_FILE = "loop_lens jacobian lens"


@dataclass(frozen=True)
class LoopJacobianLens:
    """Matrices that carry a block's output to the end.

    Attributes:
        matrices: By site, ``{prefix}`` of the firing (or of the layer, ``core.{layer}``, where factorised);
            each [d_model d_model], acting on columns.
        factorised: Whether iterations share matrices: a block's output is carried to the end of its
            iteration, from there by one matrix per further iteration, and through the coda by another.
        n_prompts: Prompts that the means are over.
        model_id: Fingerprint of the model.
        ends_normed: Whether it ends behind the final norm (loops that end in it, factorised).
    """

    matrices: dict[str, Tensor]
    factorised: bool
    n_prompts: int
    model_id: str
    ends_normed: bool | None = False
    _powers: dict[tuple[str, int], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def carry(self, stream: Tensor, spot: Site, model: HookedLoopedTransformer) -> Tensor:
        """The stream [... d_model] of a block's output, carried to the end."""
        matrix = self.matrix(spot, model).to(stream.device)
        return (stream.float() @ matrix.T).to(stream.dtype)

    def matrix(self, spot: Site, model: HookedLoopedTransformer) -> Tensor:
        """The matrix of one site [d_model d_model]."""
        place = spot.place
        assert isinstance(place, Firing)
        loop = model.schedule.main_loop
        if not self.factorised:
            if place.index == len(model.schedule) - 1:
                return torch.eye(model.cfg.d_model)
            return self.matrices[place.prefix]
        if place.segment != loop:
            if place.index == len(model.schedule) - 1:
                return torch.eye(model.cfg.d_model)
            return self.matrices[place.prefix]
        assert isinstance(place.iteration, int)
        left = model.recurrences - 1 - place.iteration
        key = (f"core.{place.layer}", left)
        if key not in self._powers:
            iterations = torch.linalg.matrix_power(self.matrices["iteration"], left)
            self._powers[key] = self.matrices["coda"] @ iterations @ self.matrices[key[0]]
        return self._powers[key]

    def require(self, model: HookedLoopedTransformer, spots: Sequence[Site]) -> None:
        """Raise ValueError unless it was fitted for this model and these sites."""
        d_model = next(iter(self.matrices.values())).shape[0]
        require_model(self.model_id, d_model, model, "this Jacobian lens was fitted")
        for spot in spots:
            place = spot.place
            if not (isinstance(place, Firing) and spot.short == "resid_post"):
                raise ValueError(f"a Jacobian lens reads blocks' outputs (resid_post), not {spot.flat}")
            last = place.index == len(model.schedule) - 1
            looped = self.factorised and place.segment == model.schedule.main_loop
            key = f"core.{place.layer}" if looped else place.prefix
            if key not in self.matrices and not last:
                raise ValueError(
                    f"this Jacobian lens has no matrix for {spot.flat}: it was fitted at another number of "
                    "iterations or for other sites. factorised=True fits one for any number of iterations"
                )

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file."""
        described = {
            "kind": _FILE,
            "factorised": self.factorised,
            "n_prompts": self.n_prompts,
            "model_id": self.model_id,
            "ends_normed": self.ends_normed,
        }
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in self.matrices.items()}
        save_file(tensors, path, metadata={"loop_lens": json.dumps(described)})
        return path

    @classmethod
    def load(cls, path: str | Path) -> LoopJacobianLens:
        """Read a file that `save` wrote.

        Raises:
            ValueError: If it is another kind of file.
        """
        described, matrices = read_lens_file(path, _FILE)
        described.pop("kind")
        return cls(matrices, **described)


def fit_jacobian_lens(
    model: HookedLoopedTransformer,
    prompts: Sequence[str],
    *,
    factorised: bool = False,
    skip_first: int = 0,
    dim_batch: int = 16,
    progress: bool = True,
) -> LoopJacobianLens:
    """Fit a Jacobian lens.

    Unfactorised it is transformer-lens' own, on the unrolled model: one matrix per firing. Factorised,
    the derivative is taken within iterations only and multiplied together: a matrix for each layer of
    the core to the end of its iteration, one for a whole iteration (means over iterations, too), one
    for the coda. That is exact for linear loops, needs no more matrices at more iterations, and
    serves numbers of iterations that it was not fitted at.

    Args:
        model: The model.
        prompts: Texts.
        factorised: Whether to factorise at loop ends.
        skip_first: Leading positions left out of the mean; the last position is always left out.
        dim_batch: Output dimensions per backward pass.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If no prompt is long enough, or the model has nested loops and ``factorised``.

    Source:
        Gurnee et al. (2026), the Jacobian lens; for loops arXiv 2609.01924. There the product is over
        layers; here over iterations, which is what weight tying makes equal.
    """
    if not prompts:
        raise ValueError("prompts is empty: give some texts or tokens")
    if not factorised:
        fitted: Any = JacobianLens.fit(
            model,
            list(prompts),
            corpus="given prompts",
            dim_batch=dim_batch,
            skip_first_positions=skip_first,
            show_progress=progress,
        )
        matrices = {model.schedule[layer].prefix: j.float() for layer, j in fitted.jacobians.items()}
        return LoopJacobianLens(matrices, False, fitted.n_prompts, fingerprint(model))
    return _fit_factorised(model, prompts, skip_first, dim_batch, progress)


def _fit_factorised(
    model: HookedLoopedTransformer, prompts: Sequence[str], skip_first: int, dim_batch: int, progress: bool
) -> LoopJacobianLens:
    schedule, loop = model.schedule, model.schedule.main_loop
    if len(schedule.loops) > 1:
        raise ValueError("factorised=True is for one loop, this model has loops in loops: leave it out")
    times, n_layers = model.recurrences, schedule.segments[loop]
    first_coda = coda_start(model)
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(key: str, matrix: Tensor) -> None:
        sums[key] = sums.get(key, torch.zeros_like(matrix)) + matrix
        counts[key] = counts.get(key, 0) + 1

    for prompt in tqdm(prompts, desc="Jacobian lens", delay=2, disable=not progress):
        tokens = read_together(model, prompt, "prompts")[:1]
        if tokens.shape[1] < skip_first + 2:
            continue
        for t in range(times):
            sources = {f"core.{i}": f"{loop}.{t}.blocks.{i}.hook_resid_post" for i in range(n_layers)}
            if t:
                sources["iteration"] = f"{loop}.{t}.hook_state_in"
            target = f"{loop}.{t}.hook_state_out"
            for key, matrix in _derivatives(model, tokens, sources, target, skip_first, dim_batch).items():
                add(key, matrix)
        for key, matrix in _outside(model, tokens, first_coda, skip_first, dim_batch).items():
            add(key, matrix)
    if not sums:
        raise ValueError(f"every prompt is shorter than {skip_first + 2} tokens: nothing to fit on")
    matrices = {key: total / counts[key] for key, total in sums.items()}
    eye = torch.eye(model.cfg.d_model)
    matrices.setdefault("coda", eye)
    matrices.setdefault("iteration", eye)
    normed = first_coda is None and model.body.ends_normed
    return LoopJacobianLens(matrices, True, len(prompts), fingerprint(model), normed)


def _outside(
    model: HookedLoopedTransformer, tokens: Tensor, first_coda: int | None, skip_first: int, dim_batch: int
) -> dict[str, Tensor]:
    """Derivatives of the end with respect to the blocks outside the loop, and to the loop's end."""
    schedule, loop = model.schedule, model.schedule.main_loop
    end = f"{loop}.{model.recurrences - 1}.hook_state_out"
    own = [f for f in list(schedule)[:-1] if f.segment != loop]
    sources = {f.prefix: f"{f.prefix}.hook_resid_post" for f in own}
    if first_coda is None:
        return _derivatives(model, tokens, sources, end, skip_first, dim_batch)
    last = f"{schedule[-1].prefix}.hook_resid_post"
    return _derivatives(model, tokens, {**sources, "coda": end}, last, skip_first, dim_batch)


def _derivatives(
    model: HookedLoopedTransformer,
    tokens: Tensor,
    sources: dict[str, str],
    target: str,
    skip_first: int,
    dim_batch: int,
) -> dict[str, Tensor]:
    """Mean derivatives [d_model d_model] of a target with respect to each source.

    Effects are summed over the target's positions and averaged over the source's, as in the lens.
    """
    if not sources:
        return {}
    seen: dict[str, Tensor] = {}

    def see(name: str) -> Any:
        def hook(value: Tensor, hook: Any) -> Tensor:
            seen[name] = value if value.requires_grad else value.requires_grad_()
            return seen[name]

        return hook

    d_model, n = model.cfg.d_model, tokens.shape[1]
    valid = torch.arange(skip_first, n - 1)
    names = [*dict.fromkeys([*sources.values(), target])]
    with torch.enable_grad():
        model.run_with_hooks(
            tokens.expand(dim_batch, -1), fwd_hooks=[(name, see(name)) for name in names], return_type=None
        )
        found = {key: torch.zeros(d_model, d_model) for key in sources}
        for start in range(0, d_model, dim_batch):
            size = min(dim_batch, d_model - start)
            cotangent = torch.zeros_like(seen[target])
            rows = torch.arange(size)
            cotangent[rows[:, None], valid[None], start + rows[:, None]] = 1.0
            gradients = torch.autograd.grad(
                seen[target],
                [seen[name] for name in sources.values()],
                cotangent,
                retain_graph=start + size < d_model,
                allow_unused=True,
            )
            for key, gradient in zip(sources, gradients, strict=True):
                if gradient is not None:
                    found[key][start : start + size] = gradient[:size, valid].float().mean(1).cpu()
    return found
