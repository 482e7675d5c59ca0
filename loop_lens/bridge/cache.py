"""Activations of a looped model, by firing and by iteration."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens import ActivationCache

from loop_lens.bridge.names import Looped, select_sites
from loop_lens.unrolling.additive import raise_non_additive
from loop_lens.unrolling.runs import Plan
from loop_lens.unrolling.schedule import Schedule


class LoopCache(ActivationCache):
    """An ``ActivationCache`` that knows iterations.

    Both spellings of a name find the same tensor. Everything that transformer-lens does with a
    cache works, except that decompositions of the residual stream into a sum refuse models whose
    stream is not one sum. Names mean what they meant in the run that was recorded, whatever number of
    iterations the model is set to now.

    Attributes:
        schedule: The firings of that run.
        mask: Which positions hold tokens rather than padding [batch pos]; None where all do.

    Example:
        >>> _, cache = model.run_with_cache(prompt)
        >>> cache["loop.3.blocks.1.hook_resid_post"] is cache["resid_post", 8]
        True
    """

    model: Looped
    mask: Bool[Tensor, "batch pos"] | None = None
    _stacks: tuple[tuple[weakref.ref[Tensor], str], ...] = ()

    def __init__(
        self,
        cache_dict: dict[str, Tensor],
        model: Any,
        schedule: Schedule | None = None,
        has_batch_dim: bool = True,
    ) -> None:
        super().__init__(cache_dict, model, has_batch_dim)
        self.schedule: Schedule = model.schedule if schedule is None else schedule

    def as_recorded(self) -> AbstractContextManager[Any]:
        """The model with the names and the number of layers of the run that was recorded."""
        return self.model.body.within(Plan(self.schedule), call=True)

    def __getitem__(self, key: Any) -> Tensor:
        if isinstance(key, str) and key in self.cache_dict:
            return self.cache_dict[key]
        with self.as_recorded():
            return super().__getitem__(self._stored(key))

    def __contains__(self, key: object) -> bool:
        with self.as_recorded():
            return self._stored(key) in self.cache_dict

    def _stored(self, key: Any) -> Any:
        """The name under which the cache holds what a key asks for, the key itself if it holds none."""
        if not isinstance(key, str) or key in self.cache_dict:
            return key
        base, grad = (key[:-5], "_grad") if key.endswith("_grad") else (key, "")
        if base not in self.model.registry:  # hook_dict shows less while hooks run
            return key
        spellings = (self.model.registry.flat(base), self.model.registry.canonical(base))
        return next((n + grad for n in spellings if n + grad in self.cache_dict), key)

    def over_iterations(
        self, name: str, *, layer: int | None = None, segment: str | None = None
    ) -> Float[Tensor, "iteration ..."]:
        """One site at every iteration of its loop.

        Args:
            name: The hook, as for `HookedLoopedTransformer.name` (``"resid_post"``, ``"pattern"``,
                ``"state_out"``).
            layer: Layer within the loop; none for sites between blocks.
            segment: The loop; the innermost by default.

        Returns:
            The activations stacked along a new first dimension, iterations in firing order.

        Raises:
            KeyError: If the cache lacks one of them; names it.

        Example:
            >>> _, cache = model.run_with_cache(prompt)
            >>> cache.over_iterations("state_out").shape
            torch.Size([8, 1, 11, 64])
        """
        with self.as_recorded():
            sites = select_sites(self.model, name, layer=layer, segment=self._loop(segment))
        return torch.stack(self._require(site.name for site in sites))

    def grid(self, name: str, *, segment: str | None = None) -> Float[Tensor, "iteration layer ..."]:
        """One hook at every iteration and layer of a loop.

        Args:
            name: The hook, as for `HookedLoopedTransformer.name`.
            segment: The loop; the innermost by default.

        Returns:
            The activations, iterations and layers first, both in firing order.

        Raises:
            KeyError: If the cache lacks one of them; names it.

        Example:
            >>> _, cache = model.run_with_cache(prompt)
            >>> cache.grid("resid_post").shape
            torch.Size([8, 2, 1, 11, 64])
        """
        loop = self._loop(segment)
        layers = range(self.schedule.segments[loop])
        return torch.stack([self.over_iterations(name, layer=i, segment=loop) for i in layers], dim=1)

    def _loop(self, segment: str | None) -> str:
        return self.schedule.innermost_loop if segment is None else segment

    def _require(self, names: Iterable[str]) -> list[Tensor]:
        names = list(names)
        missing = [name for name in names if name not in self]
        if missing:
            raise KeyError(
                f"the cache does not hold {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}: "
                "cache them, e.g. run_with_cache(tokens, names_filter=model.names(...))"
            )
        return [self[name] for name in names]

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> LoopCache:
        """As in transformer-lens, keeping the class."""
        sliced = super().apply_slice_to_batch_dim(batch_slice)
        part = LoopCache(sliced.cache_dict, self.model, self.schedule, has_batch_dim=sliced.has_batch_dim)
        if self.mask is not None:
            part.mask = self.mask[batch_slice].reshape(-1, self.mask.shape[1])
        return part

    def decompose_resid(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformer-lens, on an additive stream.

        Raises:
            NonAdditiveStreamError: If the model's stream is not one sum.
        """
        self._require_additive("decompose_resid")
        return super().decompose_resid(*args, **kwargs)

    def accumulated_resid(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformer-lens."""
        stack = super().accumulated_resid(*args, **kwargs)
        return (
            stack
            if _asked("accumulated_resid", args, kwargs).get("apply_ln")
            else self._noted(stack, "streams")
        )

    def stack_head_results(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformer-lens; with ``incl_remainder`` or ``apply_ln`` on an additive stream only.

        Raises:
            NonAdditiveStreamError: If asked for a share of the stream that is not one sum, or where a norm
                follows the branch.
        """
        return self._branches("stack_head_results", args, kwargs)

    def stack_neuron_results(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformer-lens; with ``incl_remainder`` or ``apply_ln`` on an additive stream only.

        Raises:
            NonAdditiveStreamError: If asked for a share of the stream that is not one sum, or where a norm
                follows the branch.
        """
        return self._branches("stack_neuron_results", args, kwargs)

    def _branches(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        asked = _asked(name, args, kwargs)
        if asked.get("incl_remainder") or asked.get("apply_ln"):
            self._require_additive(f"{name}(incl_remainder=..., apply_ln=...)", of_branches=True)
        return self._noted(getattr(super(), name)(*args, **kwargs), "branches")

    def get_full_resid_decomposition(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformer-lens, on an additive stream.

        Raises:
            NonAdditiveStreamError: If the model's stream is not one sum, or norms follow its branches.
        """
        self._require_additive("get_full_resid_decomposition", of_branches=True)
        return super().get_full_resid_decomposition(*args, **kwargs)

    def logit_attrs(self, residual_stack: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As in transformer-lens, on an additive stream; of `accumulated_resid` on any whose final norm is folded.

        Raises:
            NonAdditiveStreamError: If a stream that is not one sum would be taken for one.
        """
        known = next(
            (kind for ref, kind in self._stacks if ref() is not None and ref() is _whole(residual_stack)), ""
        )
        if not (known == "streams" and self._final_norm_is_folded):
            self._require_additive("logit_attrs", of_branches=known == "branches")
        return super().logit_attrs(residual_stack, *args, **kwargs)

    @property
    def _final_norm_is_folded(self) -> bool:
        weight = getattr(self.model.ln_final.original_component, "weight", None)  # type: ignore[attr-defined]
        return weight is None or bool((weight == 1).all())

    def _noted(self, found: Any, kind: str) -> Any:
        """What was found, remembered for as long as it lives."""
        stack: Tensor = found[0] if isinstance(found, tuple) else found
        alive = [(ref, known) for ref, known in self._stacks if ref() is not None]
        self._stacks = (*alive, (weakref.ref(_whole(stack)), kind))
        return found

    def _require_additive(self, what: str, *, of_branches: bool = False) -> None:
        reason = self.model.body.non_additive_because
        blocks = self.model.firings.prototypes  # type: ignore[attr-defined]
        if (
            reason is None
            and of_branches
            and any(hasattr(b, n) for b in blocks for n in ("ln1_post", "ln2_post"))
        ):
            reason = "a norm follows each branch, and what a head or neuron adds to the stream is behind it"
        if reason is not None:
            raise_non_additive(what, reason)


def _as_recorded(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def within(self: LoopCache, *args: Any, **kwargs: Any) -> Any:
        with self.as_recorded():
            return method(self, *args, **kwargs)

    return within


# transformer-lens' own functions ask the model for its layers, its blocks and their number.
for _name in (
    "accumulated_resid",
    "apply_ln_to_stack",
    "compute_head_results",
    "decompose_resid",
    "get_full_resid_decomposition",
    "get_neuron_results",
    "logit_attrs",
    "logit_lens",
    "stack_activation",
    "stack_head_results",
    "stack_neuron_results",
):
    setattr(LoopCache, _name, _as_recorded(getattr(LoopCache, _name)))


def _asked(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of transformer-lens' cache by name, however they were given."""
    return inspect.signature(getattr(ActivationCache, name)).bind(None, *args, **kwargs).arguments


def _whole(stack: Tensor) -> Tensor:
    """What a tensor is a view of."""
    return stack if stack._base is None else stack._base
