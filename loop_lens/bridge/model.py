"""`HookedLoopedTransformer`: a TransformerBridge with hook points for every firing."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.sources.transformers_driver import TransformersDriver

from loop_lens.bridge.cache import LoopCache
from loop_lens.bridge.doors import require_known
from loop_lens.bridge.firings import Firings
from loop_lens.bridge.iterations import CountsFirings
from loop_lens.bridge.modes import SharedBlocks
from loop_lens.bridge.names import Shown, in_scope, resolve, visible
from loop_lens.bridge.registry import few
from loop_lens.bridge.selection import Bounds, NamesFilter, Selector, as_asked, firing_at
from loop_lens.bridge.weights import Weights
from loop_lens.prompts.inputs import token_mask
from loop_lens.unrolling.additive import raise_non_additive
from loop_lens.unrolling.body import LoopBody
from loop_lens.unrolling.calls import additive


class HookedLoopedTransformer(SharedBlocks):
    """A looped language model whose every firing has hook points of its own.

    To transformer-lens it is a model of as many layers as there are firings. Each firing's block is
    a tied clone, made when it is first asked for; a firing that nobody hooks is the bare module.

    Do not call this directly: see `loop_lens.boot`, `loop_lens.wrap`, `loop_lens.loopify`.

    Attributes:
        body: What unrolls the model.
        firings: What makes and runs the blocks of its firings.
        blocks: The firings' bridges, in order.

    Example:
        >>> model = loop_lens.boot("loop-lens/hops")
        >>> logits, cache = model.run_with_cache(prompt)
        >>> cache["loop.3.blocks.1.hook_resid_post"] is cache["blocks.8.hook_resid_post"]
        True
    """

    def __init__(
        self, model: nn.Module, adapter: ArchitectureAdapter, tokenizer: Any, body: LoopBody
    ) -> None:
        self.body, self.firings = body, Firings(self, body)
        self.weights, self.saved_tokenizer = Weights(model, body), tokenizer
        self._selector = Selector(self)
        with self.firings.prototypes_in(model):
            super().__init__(model, adapter, tokenizer, driver=TransformersDriver(model, adapter, tokenizer))
        CountsFirings.over(self.cfg)
        self.cfg.n_params = self.n_params_total
        self.firings.adopt()
        body.install()

    @property
    def hook_dict(self) -> Any:
        """Hook points by name. Lists flat names and sites between blocks, finds loop names too."""
        return super().hook_dict if self.firings.physical else visible(self.registry)

    @property
    def mod_dict(self) -> dict[str, Any]:
        """Modules and hook points by name, as in transformer-lens; opens every block."""
        if self.firings.physical:
            return super().mod_dict
        modules = {name: module for name, module in self.named_modules() if name}
        for i, block in enumerate(self.firings.blocks):
            modules.update({f"blocks.{i}.{name}".rstrip("."): m for name, m in block.named_modules()})
        return {**modules, **self.registry}

    def get_hook_point(self, hook_name: str) -> HookPoint | None:
        """The hook point of this name in either spelling, or None."""
        return self.hook_dict.get(hook_name)

    def add_hook(self, name: Any, hook_fn: Any, dir: Any = "fwd", is_permanent: bool = False) -> None:
        """Add a hook by name, in either spelling, or to all names that a predicate accepts."""
        if isinstance(name, str):
            own = self.registry.canonical(name)
            super().add_hook(own, Shown(self.registry, hook_fn, own, None), dir, is_permanent)
            return
        for own, function in resolve(self, [(name, hook_fn)], "add_hook"):
            super().add_hook(own, Shown(self.registry, function.function, own, None), dir, is_permanent)

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Any = (),
        bwd_hooks: Any = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Generator[HookedLoopedTransformer, None, None]:
        """Temporary hooks, as in transformer-lens; names in either spelling.

        Example:
            >>> with model.hooks(fwd_hooks=[("loop.3.hook_state_out", lambda value, hook: 0 * value)]):
            ...     zeroed = model(prompt)
            >>> torch.equal(zeroed, model(prompt))
            False
        """
        forward, backward = resolve(self, fwd_hooks, "hooks"), resolve(self, bwd_hooks, "hooks")
        with ExitStack() as stack:
            with in_scope(self.registry, [name for name, _ in (*forward, *backward)]):
                stack.enter_context(super().hooks(forward, backward, reset_hooks_end, clear_contexts))
            yield self

    def run_with_hooks(
        self,
        input: Any,
        fwd_hooks: Any = (),
        bwd_hooks: Any = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        return_type: str | None = "logits",
        stop_at_layer: int | None = None,
        start_at_layer: int | None = None,
        remove_batch_dim: bool = False,
        *,
        recurrences: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run with temporary hooks, as in transformer-lens; names in either spelling.

        ``recurrences`` is the number of iterations, for this run only.

        Example:
            >>> at = model.name("z", iteration=2, layer=1)
            >>> model.run_with_hooks(prompt, fwd_hooks=[(at, lambda value, hook: 0 * value)]).shape
            torch.Size([1, 11, 11])
        """
        require_known(self, "run_with_hooks", kwargs)
        with ExitStack() as stack:
            stack.enter_context(self._whole_call(recurrences))
            bounds = self._bounds(start_at_layer, stop_at_layer)
            every = [resolve(self, hooks, "run_with_hooks") for hooks in (fwd_hooks, bwd_hooks)]
            forward, backward = ([h for h in hooks if self._selector.fires(h[0], bounds)] for hooks in every)
            stack.enter_context(in_scope(self.registry, [name for name, _ in (*forward, *backward)]))
            return super().run_with_hooks(
                input,
                forward,
                backward,
                reset_hooks_end,
                clear_contexts,
                return_type,
                bounds[1],
                bounds[0],
                remove_batch_dim,
                **kwargs,
            )

    def run_with_cache(  # type: ignore[override]
        self,
        input: Any,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        names_filter: NamesFilter = None,
        stop_at_layer: int | None = None,
        start_at_layer: int | None = None,
        *,
        recurrences: int | None = None,
        reset_hooks_end: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Run and cache activations, as in transformer-lens.

        Args:
            input: Text or tokens.
            return_cache_object: Whether to return a `LoopCache` or a plain dict.
            remove_batch_dim: Whether to drop a batch dimension of one.
            names_filter: A name, names or a predicate on names, in either spelling; everything by
                default.
            stop_at_layer: Firing to stop before.
            start_at_layer: Firing to start at; ``input`` is then the stream that enters it.
            recurrences: Number of iterations, for this run only; the cache keeps its names.
            reset_hooks_end: Whether to take the caching hooks away again; the cache follows later runs otherwise.
            **kwargs: As in transformer-lens (``pos_slice``, ``incl_bwd``, ``device``, ...).

        Returns:
            What the model returns, and the cache.

        Raises:
            KeyError: If a name does not exist.

        Example:
            >>> _, cache = model.run_with_cache(prompt, names_filter=model.names("pattern", layer=1))
            >>> cache.over_iterations("pattern", layer=1).shape
            torch.Size([8, 1, 4, 11, 11])
        """
        require_known(self, "run_with_cache", kwargs)
        with ExitStack() as stack:
            stack.enter_context(self._whole_call(recurrences))
            bounds = self._bounds(start_at_layer, stop_at_layer)
            selection = self._selector.select(names_filter, bounds)
            if names_filter is not None:
                self._warn_gated_skipped("run_with_cache", selection.gated)
            wanted = list(selection.names)
            if not reset_hooks_end:  # hooks that stay write each of the names asked for
                wanted += selection.asked(names_filter)
            seen = list(wanted)
            if bounds[1] is not None and bounds[1] < len(self.schedule):
                seen.append(f"blocks.{bounds[1]}.hook_in")
            stack.enter_context(in_scope(self.registry, seen))
            output, cache = super().run_with_cache(
                input,
                True,
                remove_batch_dim,
                names_filter=set(wanted).__contains__,
                stop_at_layer=bounds[1],
                start_at_layer=bounds[0],
                reset_hooks_end=reset_hooks_end,
                **kwargs,
            )
            tensors: dict[str, Tensor] = cache.cache_dict
            if isinstance(names_filter, str | list | tuple):
                selection.warn_unfired(tensors)
            selection.spread(tensors)
            if return_cache_object:
                found = LoopCache(tensors, self, self.schedule, has_batch_dim=cache.has_batch_dim)
                found.mask = token_mask(self, input, **kwargs)
                return output, found
            return output, as_asked(tensors, names_filter, self.registry)

    def get_caching_hooks(self, names_filter: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Caching hooks without adding them, as in transformer-lens; names in either spelling."""
        if names_filter is None:
            return super().get_caching_hooks(None, *args, **kwargs)
        chosen = self._selector.named(names_filter)
        with in_scope(self.registry, chosen):
            cache, *both = super().get_caching_hooks(set(chosen).__contains__, *args, **kwargs)
        # They store under the name that they are shown, and under the others that were asked for.
        return cache, *([(self.registry.canonical(name), f) for name, f in hooks] for hooks in both)

    def _resolve_hook_point(self, name: str, aliases: Any, hook_dict: Any) -> tuple[str, HookPoint]:
        """The hook point of a flat name, whatever names another thread's forward gives to open blocks."""
        if self.firings.physical:
            return super()._resolve_hook_point(name, aliases, hook_dict)
        return name, self.registry[name]

    def _warn_gated_skipped(self, api: str, names: list[str], stacklevel: int = 3) -> None:
        if names:
            warnings.warn(
                f"{api}: skipped {len(names)} gated-off hooks that would never fire ({few([], names)}): call "
                "the relevant set_use_*(True) setter first to enable them.",
                stacklevel=stacklevel,
            )

    def hook_points(self) -> Iterable[HookPoint]:
        """Every hook point once; opens every block."""
        return list({id(point): point for point in self.registry.values()}.values())

    def clear_contexts(self) -> None:
        """Clear what hooks stored on their hook points."""
        for point in self.registry.existing():
            point.clear_context()

    def remove_all_hook_fns(
        self, direction: Any = "both", including_permanent: bool = False, level: int | None = None
    ) -> None:
        """Remove hooks from every hook point."""
        for point in self.registry.existing():
            point.remove_hooks(direction, including_permanent=including_permanent, level=level)

    def _bounds(self, start: int | None, stop: int | None) -> Bounds:
        n = len(self.schedule)
        first, last = firing_at("start_at_layer", start, n, n - 1), firing_at("stop_at_layer", stop, n, n)
        if first is not None and last is not None and first > last:
            raise ValueError(
                f"start_at_layer={start} comes after stop_at_layer={stop}: a forward runs from the first to the second"
            )
        return first, last

    def forward(
        self,
        input: Any,
        *args: Any,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        recurrences: int | None = None,
        prelude_out: Tensor | None = None,
        rows: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model, as in transformer-lens.

        Args:
            input: Text, tokens [batch pos], or the stream [batch pos d_model] that enters the
                firing ``start_at_layer``.
            *args: As in transformer-lens.
            start_at_layer: Firing to start at. Earlier firings do not run.
            stop_at_layer: Firing to stop before; returns the stream that enters it.
            recurrences: Number of iterations, for this forward only.
            prelude_out: With ``start_at_layer`` inside a loop with injection: what it injects,
                ``cache["hook_prelude_out"]``.
            rows: Which prompt each row of the batch belongs to [batch], where one prompt has several
                rows, for whatever is set per prompt (see `loop_lens.interventions`).
            **kwargs: As in transformer-lens.

        Raises:
            ValueError: If the residual stream alone does not determine the rest of the forward.
            TypeError: If a keyword is none that this method, transformer-lens' or the model's own reads.

        Example:
            >>> model(prompt, recurrences=2).shape
            torch.Size([1, 11, 11])
            >>> _, cache = model.run_with_cache(prompt)
            >>> stream, e = cache["blocks.9.hook_resid_pre"], cache["hook_prelude_out"]
            >>> later = model(stream, start_at_layer=9, prelude_out=e)
            >>> torch.allclose(later, model(prompt), atol=1e-5)
            True
        """
        if recurrences is not None:
            with self._whole_call(recurrences):
                return self.forward(
                    input,
                    *args,
                    start_at_layer=start_at_layer,
                    stop_at_layer=stop_at_layer,
                    prelude_out=prelude_out,
                    rows=rows,
                    **kwargs,
                )
        require_known(self, "forward", kwargs)
        if "logits_and_cache" in (*args[:1], kwargs.get("return_type")):
            kwargs.setdefault("use_cache", True)
        start, stop = self._bounds(start_at_layer, stop_at_layer)
        window: dict[str, Any] = {"stop": stop, "rows": rows}
        if start is not None:
            input = self._require_residual(input, start)
            kwargs.update(self.body.require_resumable(start, prelude_out))
            # A copy, since a hook may write into what enters the block.
            window.update(start=start, residual=input.clone())
            if rows is not None:
                # Before the block that it enters, one row stands for all: masks and positions are alike.
                input = input[:1]
        elif prelude_out is not None:
            raise ValueError("prelude_out goes with start_at_layer: otherwise the prelude computes it")
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.ndim == 4:
            kwargs["attention_mask"] = additive(mask, self.W_E.dtype)  # eager attention adds it to scores
        with self.body.window(**window):
            return super().forward(input, *args, **kwargs)

    def _require_residual(self, input: Any, start: int) -> Tensor:
        if not (isinstance(input, Tensor) and input.is_floating_point()):
            raise ValueError(
                "start_at_layer takes the residual stream [batch pos d_model] that enters that firing, e.g. "
                f"cache['blocks.{start}.hook_resid_pre'], got {type(input).__name__}"
            )
        return input if input.ndim == 3 else input.unsqueeze(0)

    def accumulated_bias(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformer-lens, on an additive stream."""
        if self.body.non_additive_because:
            raise_non_additive("accumulated_bias", self.body.non_additive_because)
        return super().accumulated_bias(*args, **kwargs)

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.cfg.model_name})\n{self.schedule}"
