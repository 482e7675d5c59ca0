"""`HookedLoopedTransformer`: a TransformerBridge with hook points for every firing."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens import ActivationCache
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.component_setup import setup_submodules
from transformer_lens.model_bridge.exceptions import StopAtLayerException
from transformer_lens.model_bridge.sources.transformers_driver import TransformersDriver

from loop_lens.bridge import weights
from loop_lens.bridge.cache import LoopCache
from loop_lens.bridge.firings import FiringBlocks, StreamHookPoint, hook_point
from loop_lens.bridge.registry import BlockNames, HookRegistry
from loop_lens.models.native.attention import accept_either_cache_name
from loop_lens.unrolling.additive import NoScale, raise_non_additive
from loop_lens.unrolling.body import LoopBody
from loop_lens.unrolling.calls import Bare, hidden_states, map_output, with_hidden_states
from loop_lens.unrolling.schedule import Schedule
from loop_lens.unrolling.sites import Firing, Site, act_name, pick
from loop_lens.unrolling.slots import tied_clone
from loop_lens.unrolling.tree import Iteration, UnknownNameError
from loop_lens.unrolling.unroller import Run

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None
Hook = tuple[str | Callable[[str], bool], Callable[..., Any]]
Select = int | slice | Iterable[int] | None
_GATES = ("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in")
# By model, since a hook may run another one.
_SCOPES: ContextVar[dict[int, dict[str, HookPoint]] | None] = ContextVar("hook points in scope", default=None)


class HookedLoopedTransformer(TransformerBridge):
    """A looped language model whose every firing has hook points of its own.

    To transformer-lens it is a model of as many layers as there are firings. Each firing's block is
    a tied clone, made when it is first asked for; a firing that nobody hooks is the bare module.

    Do not call this directly: see `loop_lens.boot`, `loop_lens.wrap`, `loop_lens.loopify`.

    Attributes:
        body: What unrolls the model.
        blocks: The firings' bridges, in order.
    """

    body: LoopBody

    def __init__(
        self, model: nn.Module, adapter: ArchitectureAdapter, tokenizer: Any, body: LoopBody
    ) -> None:
        self.__dict__.update(body=body, _physical=True, _native_keys=list(model.state_dict()))
        prototypes = nn.ModuleList(tied_clone(block) for block in body.blocks)
        root = _Holder(model, body.block_path)
        held = root.put(prototypes)
        try:
            super().__init__(model, adapter, tokenizer, driver=TransformersDriver(model, adapter, tokenizer))
        finally:
            root.restore(held)
        wired: Any = self._modules["blocks"]
        self.__dict__["_prototypes"] = wired
        for prototype in wired:
            _do_not_checkpoint(prototype)
            accept_either_cache_name(prototype)
            if isinstance(mid := getattr(prototype, "hook_resid_mid", None), HookPoint):
                mid.__class__ = StreamHookPoint
        self.cfg.n_params = self.n_params_total
        self._install_firings()
        body.executor, body.observer = self._run_firing, self
        body.install()

    # ---- how firings become blocks ----

    def _install_firings(self) -> None:
        """Replace the prototypes by one block per firing, and list the hooks that these have."""
        prototypes: nn.ModuleList = self.__dict__["_prototypes"]
        listed = super().hook_dict
        names: list[BlockNames] = []
        for p in range(len(prototypes)):
            prefix = f"blocks.{p}."
            names.append(
                BlockNames(
                    {
                        name.removeprefix(prefix): (point.name or name).removeprefix(prefix)
                        for name, point in listed.items()
                        if name.startswith(prefix)
                    }
                )
            )
        fixed = {name: point for name, point in listed.items() if not name.startswith("blocks.")}
        self.__dict__["_physical_registry"] = self.__dict__["_hook_registry"]
        self.__dict__.pop("_everything", None)
        blocks = FiringBlocks(self.body.schedule, self._make_block)
        blocks.training = self.training
        self._modules["blocks"] = blocks
        self.__dict__["_hook_registry"] = HookRegistry(blocks, names, fixed)
        self.cfg.n_layers = len(self.body.schedule)
        own = {id(p) for p in self.original_model.parameters()}
        shared = all(id(p) in own for proto in prototypes for p in proto.parameters())
        self.__dict__["_split"] = [] if self._weights_processed else _split_projections(prototypes)
        # After weight processing, blocks whose bridge holds weights of its own (split from a fused
        # projection) must not fall back to the bare module, which still has the old ones.
        self.__dict__["_always_bridge"] = self._weights_processed and not shared
        self.__dict__["_physical"] = False

    @contextmanager
    def _physical_view(self) -> Generator[None, None, None]:
        """Look like an ordinary bridge over the physical blocks, for what processes weights."""
        prototypes: nn.ModuleList = self.__dict__["_prototypes"]
        root = _Holder(self.original_model, self.body.block_path)
        held = root.put(prototypes)
        self._modules["blocks"] = prototypes
        self.__dict__["_hook_registry"] = self.__dict__["_physical_registry"]
        self.cfg.n_layers = len(prototypes)
        self.__dict__["_physical"] = True
        try:
            yield
        finally:
            root.restore(held)
            self._install_firings()

    def _make_block(self, firing: Firing) -> nn.Module:
        prototype: Any = self.__dict__["_prototypes"][firing.block]
        points = (m for m in prototype.modules() if isinstance(m, HookPoint))
        if any(point.fwd_hooks or point.bwd_hooks for point in points):
            # Hooks that transformer-lens itself put there close over this very prototype.
            block = self._wire_anew(firing)
        else:
            block = tied_clone(prototype)
        if self.body.non_additive_because:
            # Where transformer-lens' path patching and edge attribution look before they assume that
            # a head's output reaches every later block as it is.
            block.residual_contribution_scale = NoScale(self.body.non_additive_because)  # type: ignore[assignment]
        self._name_block(firing, block)
        if hasattr(block, "_maybe_wire_capture_hooks"):
            block._maybe_wire_capture_hooks()
        return block

    def _wire_anew(self, firing: Firing) -> Any:
        template: Any = (self.adapter.component_mapping or {})["blocks"]
        block = copy.deepcopy(template)  # holds no weights yet, and parts that are in no module tree
        block.set_original_component(tied_clone(self.body.blocks[firing.block]))
        setup_submodules(block, self.adapter, block.original_component)
        block._wire_ln1_module()
        block.train(self.training)
        _do_not_checkpoint(block)
        accept_either_cache_name(block)
        for module in block.modules():
            if hasattr(module, "_register_aliases"):
                module._register_aliases()
            if hasattr(module, "setup_hook_compatibility"):
                module.setup_hook_compatibility()
        return block

    def _name_block(self, firing: Firing, block: Any) -> None:
        block.name = f"blocks.{firing.index}"
        for hook in self.registry.names[firing.block].points:
            hook_point(block, hook).name = f"blocks.{firing.index}.{hook}"

    def _run_firing(
        self, run: Run, firing: Firing, bare: Bare, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        blocks: Any = self._modules["blocks"]
        always = self.__dict__["_always_bridge"]
        block = blocks.open(firing) if always else blocks.opened.get(firing.prefix)
        if run.stop == firing.index:
            stream = hidden_states(args, kwargs)
            raise StopAtLayerException(stream if block is None else block.bridge.hook_in(stream))
        if block is None:
            return bare(*args, **kwargs)
        inside = always or block.hooked_inside
        if not (inside or block.hooked_ends):
            return bare(*args, **kwargs)
        stream = hidden_states(args, kwargs)
        if block.bridge.hook_in._forward_hooks:
            # A hook may write in place, and this is the tensor that the block before has put out.
            stream = stream.clone()
        if inside:
            args, kwargs = with_hidden_states(stream, args, kwargs)
            return block.bridge(*args, **kwargs)
        args, kwargs = with_hidden_states(block.bridge.hook_in(stream), args, kwargs)
        return map_output(block.bridge.hook_out, bare(*args, **kwargs))

    def wants(self, site: str) -> bool:
        """Whether a site between blocks has hooks."""
        point = self.registry.sites.get(site)
        return point is not None and bool(point._forward_hooks or point._backward_hooks)

    def see(self, site: str, value: Tensor) -> Tensor:
        """Pass a value between blocks through its hook point."""
        return self.registry.sites[site](value.clone())  # a hook may write in place

    # ---- schedule and recurrences ----

    @property
    def schedule(self) -> Schedule:
        """The firings of one forward; prints as a tree."""
        return self.body.schedule

    @property
    def recurrences(self) -> int:
        """Number of iterations of the (outermost) loop."""
        return self.schedule.loops[self.schedule.main_loop].times

    def set_recurrences(self, recurrences: int | None = None, **times: int) -> None:
        """Change the number of iterations. Hooks stay with their iteration and layer.

        Args:
            recurrences: Iterations of the outermost loop.
            **times: Iterations by loop name, for nested loops: ``set_recurrences(H=2, L=5)``.

        Raises:
            ValueError: If a number is below 1.
        """
        if recurrences is not None:
            times[self.schedule.main_loop] = recurrences
        for name, n in times.items():
            if isinstance(n, bool) or not isinstance(n, int) or n < 1:
                raise ValueError(f"recurrences must be a whole number of at least 1, got {n!r} for {name!r}")
        if self.body.order is not None:
            raise RuntimeError("the iterations run in another order: leave that context before changing R")
        self.body.set_times(**times)
        blocks: Any = self._modules["blocks"]
        for firing, block in blocks.reschedule(self.schedule):
            self._name_block(firing, block)
        self.cfg.n_layers = len(self.schedule)

    @contextmanager
    def at_recurrences(
        self, recurrences: int | None = None, **times: int
    ) -> Generator[HookedLoopedTransformer, None, None]:
        """Other numbers of iterations within a context, see `set_recurrences`."""
        before = {name: loop.times for name, loop in self.schedule.loops.items()}
        self.set_recurrences(recurrences, **times)
        try:
            yield self
        finally:
            self.set_recurrences(**before)

    @property
    def initial_state(self) -> Any:
        """What the state before the first iteration is made from: a seed, ``"zeros"`` or a tensor
        [batch pos d_model]; None where the model leaves no choice.
        """
        return self.body.initial_state

    @initial_state.setter
    def initial_state(self, value: Any) -> None:
        self.body.set_initial_state(value)

    # ---- names ----

    @property
    def registry(self) -> HookRegistry:
        """All hook points by name."""
        return self.__dict__["_hook_registry"]

    def name(
        self, hook: str, *, iteration: Iteration = None, layer: int | None = None, segment: str | None = None
    ) -> str:
        """The loop spelling of one hook's name.

        Args:
            hook: transformer-lens' short name (``"resid_post"``, ``"pattern"``), a full one within
                the block (``"attn.hook_pattern"``), or a site between blocks (``"state_in"``).
            iteration: Iteration of the loop, a tuple (outermost first) in nested loops.
            layer: Layer within the segment; none for sites between blocks.
            segment: ``"prelude"``, ``"coda"``, or a loop; the innermost loop by default.

        Raises:
            KeyError: If there is no such hook; says which iterations, layers and hooks there are.
        """
        if segment is None:
            segment = self.schedule.innermost_loop
        self.schedule.require_segment(segment)
        if layer is None:
            return self._site_name(hook, segment, iteration)
        try:
            firing = self.schedule.find(segment, iteration, layer)
        except UnknownNameError as error:
            raise UnknownNameError(f"{error}; {self.registry.describe_hooks(0)}") from None
        name = f"{firing.prefix}.{act_name(hook, firing.index)}"
        self.registry.locate(name)
        return name

    def _site_name(self, hook: str, segment: str, iteration: Iteration) -> str:
        own = hook if hook.startswith("hook_") else f"hook_{hook}"
        if own in self.schedule.sites:
            return own
        for name, site in self.schedule.sites.items():
            if (site.hook, site.segment, site.iteration) == (own, segment, iteration):
                return name
        raise UnknownNameError(
            f"{hook!r} of {segment!r}, iteration {iteration}, does not exist as a site between blocks "
            f"(and no layer was given): {self.schedule.describe()}"
        )

    def names(
        self, hook: str, *, iteration: Select = None, layer: Select = None, segment: str | None = None
    ) -> list[str]:
        """Loop spellings of one hook at many places, for ``names_filter``.

        Args:
            hook: As for `name`.
            iteration: One, several or a slice of the segment's iterations in firing order; all by
                default.
            layer: One, several or a slice of its layers; all by default.
            segment: One segment; without one the innermost loop, or every segment if neither
                iteration nor layer is given.

        Raises:
            KeyError: If there is no such hook, iteration or layer.
        """
        if f"hook_{hook.removeprefix('hook_')}" in self.schedule.hooks_between:
            loop = segment or self.schedule.innermost_loop
            picked = pick("iteration", iteration, self.schedule.iterations(loop))
            return list(dict.fromkeys(self._site_name(hook, loop, t) for t in picked))
        if segment is None and iteration is None and layer is None:
            return [
                f"{firing.prefix}.{act_name(hook, firing.index)}"
                for firing in self.schedule
                if self.registry.locate(f"{firing.prefix}.{act_name(hook, firing.index)}")
            ]
        segment = segment or self.schedule.innermost_loop
        self.schedule.require_segment(segment)
        layers = pick("layer", layer, list(range(self.schedule.segments[segment])))
        iterations = pick("iteration", iteration, self.schedule.iterations(segment))
        return [self.name(hook, iteration=t, layer=i, segment=segment) for t in iterations for i in layers]

    def locate(self, name: str) -> Site:
        """The site of a name, in either spelling: its place, its hook, and its other names.

        Raises:
            KeyError: If there is no such hook; says what there is.
        """
        return self.registry.locate(name)

    def flat_name(self, name: str, *, missing_ok: bool = False) -> str:
        """transformer-lens' spelling of a name given in either.

        Raises:
            KeyError: If there is no such hook, unless ``missing_ok`` (then the name as it is).
        """
        try:
            return self.registry.flat(name)
        except UnknownNameError:
            if missing_ok:
                return name
            raise

    def canonical_name(self, name: str) -> str:
        """The one name, among a hook point's aliases, that the hook point itself goes by.

        Raises:
            KeyError: If there is no such hook.
        """
        return self.registry.canonical(name)

    # ---- hooks ----

    @property
    def hook_dict(self) -> Any:
        """Hook points by name. Lists flat names and sites between blocks, finds loop names too."""
        if self.__dict__["_physical"]:
            return super().hook_dict
        return (_SCOPES.get() or {}).get(id(self), self.registry)

    @property
    def mod_dict(self) -> dict[str, Any]:
        """Modules and hook points by name, as in transformer-lens; opens every block."""
        if self.__dict__["_physical"]:
            return super().mod_dict
        modules = {name: module for name, module in self.named_modules() if name}
        for firing in self.schedule:
            block = self._modules["blocks"][firing.index]  # type: ignore[index]
            modules.update({f"blocks.{firing.index}.{n}".rstrip("."): m for n, m in block.named_modules()})
        return {**modules, **self.registry}

    def get_hook_point(self, hook_name: str) -> HookPoint | None:
        """The hook point of this name in either spelling, or None."""
        return self.hook_dict.get(hook_name)

    def add_hook(self, name: Any, hook_fn: Any, dir: Any = "fwd", is_permanent: bool = False) -> None:
        """Add a hook by name, in either spelling, or to all names that a predicate accepts."""
        if isinstance(name, str):
            super().add_hook(self.canonical_name(name), hook_fn, dir, is_permanent)
            return
        accepted = self._matching(name)
        with self._scoped(accepted):
            super().add_hook(set(accepted).__contains__, hook_fn, dir, is_permanent)

    def _matching(self, accepts: Callable[[str], bool]) -> list[str]:
        return [flat for flat, looped in self.registry.spellings() if accepts(flat) or accepts(looped)]

    @contextmanager
    def _scoped(self, names: Iterable[str]) -> Generator[None, None, None]:
        """Let transformer-lens see these hook points alone: it walks all that it sees."""
        scope: dict[str, HookPoint] = {}
        for name in names:
            point = self.registry[name]
            scope[name] = point
            scope.setdefault(point.name or name, point)
        token = _SCOPES.set({**(_SCOPES.get() or {}), id(self): scope})
        try:
            yield
        finally:
            _SCOPES.reset(token)

    def _resolve(self, hooks: Iterable[Hook]) -> tuple[list[Hook], list[str]]:
        """Hooks with flat names, and all names that they touch."""
        resolved: list[Hook] = []
        touched: list[str] = []
        for name, function in hooks:
            if isinstance(name, str):
                accepted = [self.registry.flat(name)]
                resolved.append((accepted[0], function))
            else:
                accepted = self._matching(name)
                resolved.append((set(accepted).__contains__, function))
            touched += accepted
        return resolved, touched

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Any = (),
        bwd_hooks: Any = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Generator[HookedLoopedTransformer, None, None]:
        """Temporary hooks, as in transformer-lens; names in either spelling."""
        forward, touched = self._resolve(fwd_hooks)
        backward, also = self._resolve(bwd_hooks)
        with ExitStack() as stack:
            with self._scoped([*touched, *also]):
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
        **kwargs: Any,
    ) -> Any:
        """Run with temporary hooks, as in transformer-lens; names in either spelling."""
        bounds = self._bounds(start_at_layer, stop_at_layer)
        forward, touched = self._resolve(fwd_hooks)
        backward, also = self._resolve(bwd_hooks)
        live = {name for name in (*touched, *also) if self._runs(name, *bounds)}
        with self._scoped([*touched, *also]):
            return super().run_with_hooks(
                input,
                [(n, f) for n, f in forward if not isinstance(n, str) or n in live],
                [(n, f) for n, f in backward if not isinstance(n, str) or n in live],
                reset_hooks_end,
                clear_contexts,
                return_type,
                stop_at_layer,
                start_at_layer,
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
            **kwargs: As in transformer-lens (``pos_slice``, ``incl_bwd``, ``device``, ...).

        Returns:
            What the model returns, and the cache.

        Raises:
            KeyError: If a name does not exist.
        """
        bounds = self._bounds(start_at_layer, stop_at_layer)
        by_point, gated = self._selected(names_filter, bounds)
        if names_filter is not None:
            self._warn_gated_skipped("run_with_cache", gated)
        seen = list(by_point)
        if bounds[1] is not None and bounds[1] < len(self.schedule):
            seen.append(f"blocks.{bounds[1]}.hook_in")
        with self._scoped(seen):
            output, cache = super().run_with_cache(
                input,
                True,
                remove_batch_dim,
                names_filter=by_point.__contains__,
                stop_at_layer=stop_at_layer,
                start_at_layer=start_at_layer,
                **kwargs,
            )
        if isinstance(names_filter, str | list | tuple):
            self._warn_unfired(name for name in by_point if name not in cache.cache_dict)
        return output, self._looped_cache(cache, by_point, names_filter, return_cache_object)

    def _selected(
        self, names_filter: NamesFilter, bounds: tuple[int | None, int | None]
    ) -> tuple[dict[str, list[str]], list[str]]:
        """What to cache: each hook point's own name with all names asked for, and what is gated off."""
        everything = names_filter is None and bounds == (None, None)
        flags = tuple(getattr(self.cfg, flag, False) for flag in _GATES)
        known: Any = self.__dict__.get("_everything")
        if everything and known is not None and known[0] is self.schedule and known[1] == flags:
            return known[2]
        by_point: dict[str, list[str]] = {}
        for name in dict.fromkeys(self._chosen(names_filter)):
            if self._runs(name, *bounds):
                by_point.setdefault(self.canonical_name(name), []).append(name)
        gated = [name for name in by_point if self._gated_hook_reason(name) is not None]
        for name in gated:
            del by_point[name]
        if everything:
            self.__dict__["_everything"] = (self.schedule, flags, (by_point, gated))
        return by_point, gated

    def _warn_unfired(self, names: Iterable[str]) -> None:
        unfired = list(names)
        if unfired:
            warnings.warn(
                f"{len(unfired)} hook point(s) did not fire in this forward and are not in the cache: "
                f"{', '.join(unfired[:3])}. This architecture's attention or MLP does not pass through them.",
                stacklevel=3,
            )

    def _looped_cache(
        self, cache: ActivationCache, by_point: dict[str, list[str]], names_filter: Any, wrap: bool
    ) -> Any:
        tensors = cache.cache_dict
        # What is cached once, under the name that hook functions see, is found under all its names.
        for canonical, names in by_point.items():
            for suffix in ("", "_grad"):
                if canonical + suffix in tensors:
                    tensor = tensors[canonical + suffix]
                    tensors.update((name + suffix, tensor) for name in names)
        if wrap:
            return LoopCache(tensors, self, has_batch_dim=cache.has_batch_dim)
        asked = [names_filter] if isinstance(names_filter, str) else names_filter
        if isinstance(asked, list | tuple):
            tensors.update((n, tensors[self.flat_name(n)]) for n in asked if self.flat_name(n) in tensors)
        return tensors

    def _chosen(self, names_filter: NamesFilter) -> list[str]:
        if names_filter is None:
            return list(self.registry)
        if isinstance(names_filter, str):
            return [self.registry.flat(names_filter)]
        if callable(names_filter):
            return self._matching(names_filter)
        return [self.registry.flat(name) for name in names_filter]

    def get_caching_hooks(self, names_filter: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Caching hooks without adding them, as in transformer-lens; names in either spelling."""
        if names_filter is None:
            return super().get_caching_hooks(None, *args, **kwargs)
        chosen = self._chosen(names_filter)
        with self._scoped(chosen):
            return super().get_caching_hooks(set(chosen).__contains__, *args, **kwargs)

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

    # ---- forward ----

    def _bounds(self, start: int | None, stop: int | None) -> tuple[int | None, int | None]:
        n = len(self.schedule)
        return tuple(n + k if k is not None and k < 0 else k for k in (start, stop))  # type: ignore[return-value]

    def _runs(self, name: str, start: int | None, stop: int | None) -> bool:
        """Whether a site fires when only the firings from start to stop run."""
        if start is None and stop is None:
            return True
        if name in self.registry.fixed:
            late = name.startswith(("ln_final", "unembed", "hook_unembed"))
            return (stop is None or not late) and (start is None or not self._is_embedding_stage_hook(name))
        site = self.registry.locate(name)
        if site.between:
            return (start is None or site.fired_before > start) and (
                stop is None or site.fired_before <= stop
            )
        return (start is None or site.fired_before >= start) and (stop is None or site.fired_before < stop)

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
        """
        if recurrences is not None:
            with self.at_recurrences(recurrences):
                return self.forward(
                    input,
                    *args,
                    start_at_layer=start_at_layer,
                    stop_at_layer=stop_at_layer,
                    prelude_out=prelude_out,
                    rows=rows,
                    **kwargs,
                )
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
        for projection in self.__dict__["_split"]:
            projection.follow()
        with self.body.window(**window):
            return super().forward(input, *args, **kwargs)

    def _require_residual(self, input: Any, start: int) -> Tensor:
        if not (isinstance(input, Tensor) and input.is_floating_point()):
            raise ValueError(
                "start_at_layer takes the residual stream [batch pos d_model] that enters that firing, e.g. "
                f"cache['blocks.{start}.hook_resid_pre'], got {type(input).__name__}"
            )
        if not 0 <= start < len(self.schedule):
            raise ValueError(
                f"start_at_layer={start} does not exist: there are firings 0-{len(self.schedule) - 1}"
            )
        return input if input.ndim == 3 else input.unsqueeze(0)

    def accumulated_bias(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformer-lens, on an additive stream."""
        if self.body.non_additive_because:
            raise_non_additive("accumulated_bias", self.body.non_additive_because)
        return super().accumulated_bias(*args, **kwargs)

    # ---- weights, flags, modes ----

    def enable_compatibility_mode(self, *args: Any, **kwargs: Any) -> None:
        """transformer-lens' weight processing, once per physical block: iterations keep sharing.

        Raises:
            ValueError: If folding is not sound for this model; says why. Hook names alone are had
                with ``no_processing=True``.
        """
        no_processing = kwargs.get("no_processing", args[1] if len(args) > 1 else False)
        reason = self.body.fold_unsound_because
        if reason and not no_processing:
            raise ValueError(
                f"weight processing is not sound for this model: {reason}. "
                "enable_compatibility_mode(no_processing=True) gives the legacy names without it."
            )
        with self._physical_view():
            super().enable_compatibility_mode(*args, **kwargs)

    def _set_flag(self, setter: Callable[[bool], None], value: bool) -> None:
        blocks: Any = self._modules["blocks"]
        opened = [block.bridge for block in blocks.opened.values()]
        prototypes: nn.ModuleList = self.__dict__["_prototypes"]
        self._modules["blocks"] = nn.ModuleList([*prototypes, *opened])
        try:
            setter(value)
        finally:
            self._modules["blocks"] = blocks

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Whether to expose each head's contribution, as in transformer-lens."""
        self._set_flag(super().set_use_attn_result, use_attn_result)

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Whether queries, keys and values have inputs of their own, as in transformer-lens."""
        self._set_flag(super().set_use_split_qkv_input, use_split_qkv_input)

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Whether each head has an input of its own, as in transformer-lens."""
        self._set_flag(super().set_use_attn_in, use_attn_in)

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Whether the MLP's input is exposed, as in transformer-lens."""
        self._set_flag(super().set_use_hook_mlp_in, use_hook_mlp_in)

    def train(self, mode: bool = True) -> HookedLoopedTransformer:
        """Set training mode everywhere."""
        super().train(mode)
        for block in getattr(self._modules.get("blocks"), "opened", {}).values():
            block.bridge.train(mode)
        if "_prototypes" in self.__dict__:
            self.__dict__["_prototypes"].train(mode)
        return self

    def to(self, *args: Any, **kwargs: Any) -> HookedLoopedTransformer:
        """Move or cast. Iterations keep sharing weights; silent unless ``print_details=True``."""
        kwargs.setdefault("print_details", False)
        super().to(*args, **kwargs)
        kwargs.pop("print_details", None)
        # Weights that transformer-lens split from a fused projection live in the bridges alone.
        self.__dict__["_prototypes"].to(*args, **kwargs)
        return self

    @property
    def n_params(self) -> int:
        """Number of parameters, the checkpoint's at any number of iterations."""
        return self.n_params_total

    def state_dict(self, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Weights under the names of the checkpoint, at any number of iterations."""
        if self.__dict__["_physical"] or destination is not None or prefix:
            return super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        return weights.published_state(self, keep_vars=keep_vars)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load weights under the checkpoint's names or the native ones."""
        return weights.load_state(self, state_dict, strict=strict, assign=assign)

    def native_state(self, *, keep_vars: bool = False) -> dict[str, Tensor]:
        """Weights under the wrapped model's own names."""
        raw = self.original_model.state_dict(keep_vars=keep_vars)
        clean = {key.replace("._original_component", ""): value for key, value in raw.items()}
        return {key: clean[key] for key in self.__dict__["_native_keys"]}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `loop_lens.boot` opens again: config, safetensors, tokenizer."""
        weights.save(self, Path(folder))

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.cfg.model_name})\n{self.schedule}"


def _do_not_checkpoint(block: nn.Module) -> None:
    """A hooked block is not checkpointed: its hooks would fire again in backward, or be gone by then."""
    for module in block.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False  # type: ignore[assignment]


class _SplitProjection:
    """Queries, keys and values that transformer-lens split from a fused projection.

    They are parameters of their own, made once: training or moving the fused one leaves them behind.
    """

    def __init__(self, attention: Any) -> None:
        self.attention = attention
        self.seen = self._state()

    def _state(self) -> tuple[tuple[int, int], ...]:
        fused = self.attention.qkv.original_component.parameters()
        return tuple((parameter.data_ptr(), parameter._version) for parameter in fused)

    def follow(self) -> None:
        """Split anew if the fused projection changed since."""
        state = self._state()
        if state == self.seen:
            return
        parts = self.attention.split_qkv_matrix(self.attention.original_component)
        with torch.no_grad():
            for name, part in zip("qkv", parts, strict=True):
                own = dict(getattr(self.attention, name).original_component.named_parameters())
                for key, parameter in part.named_parameters():
                    own[key].data = parameter.data
        self.seen = state


def _split_projections(prototypes: Iterable[nn.Module]) -> list[_SplitProjection]:
    attentions: list[Any] = [getattr(prototype, "attn", None) for prototype in prototypes]
    return [
        _SplitProjection(attention)
        for attention in attentions
        if getattr(attention, "split_qkv_matrix", None) is not None and hasattr(attention, "qkv")
    ]


class _Holder:
    """The place in a model where transformer-lens looks for its blocks."""

    def __init__(self, model: nn.Module, path: str) -> None:
        parent, _, self.name = path.rpartition(".")
        self.parent = model.get_submodule(parent)

    def put(self, blocks: nn.ModuleList) -> nn.Module | None:
        """Put blocks there; returns what was there."""
        held = self.parent._modules.get(self.name)
        self.parent._modules[self.name] = blocks
        return held

    def restore(self, held: nn.Module | None) -> None:
        """Put back what was there."""
        if held is None:
            del self.parent._modules[self.name]
        else:
            self.parent._modules[self.name] = held
