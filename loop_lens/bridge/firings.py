"""`Firings`: how physical blocks become one bridge per firing, and how a firing runs."""

from __future__ import annotations

import copy
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.component_setup import setup_submodules
from transformer_lens.model_bridge.exceptions import StopAtLayerException

from loop_lens.bridge.blocks import FiringBlocks, hook_point
from loop_lens.bridge.grafts import call_like_modules, copy_values, graft
from loop_lens.bridge.latents import keep_latents
from loop_lens.bridge.norms import keep_own_norms
from loop_lens.bridge.projections import fuse_projections, projections_apart
from loop_lens.bridge.registry import BlockNames, HookRegistry
from loop_lens.models.native.attention import take_what_transformers_passes
from loop_lens.unrolling.additive import NoScale
from loop_lens.unrolling.body import LoopBody
from loop_lens.unrolling.calls import Bare, hidden_states, map_output, output_stream, with_hidden_states
from loop_lens.unrolling.clones import Shape, tied_clone
from loop_lens.unrolling.runs import Run
from loop_lens.unrolling.sites import Firing


class StreamHookPoint(HookPoint):
    """A hook point on a branch's input that stands for the stream itself.

    ``hook_resid_mid`` is where the stream enters the MLP's norm, and the residual connection goes
    past it: a value that a hook returns there would reach the MLP alone. This one writes it into the
    stream, as transformer-lens' in-place setters do. Gradients stay those of the branch.
    """

    def __call__(self, x: Any) -> Any:
        """Pass the stream through the hooks."""
        shown = super().__call__(x)
        if shown is x or not self.fwd_hooks or torch.equal(shown, x):
            return shown
        return x.copy_(shown)


class Firings:
    """The blocks of a bridge: one prototype per physical block, from which each firing's is made.

    transformer-lens wires the prototypes in place of the model's blocks (`prototypes_in`). After
    that, `install` puts one bridge per firing where the prototypes were, and `run` runs firings.

    Args:
        bridge: The bridge that they belong to.
        body: What unrolls its model.

    Attributes:
        prototypes: One block per physical block; transformer-lens' bridges once they are wired.
        blocks: One bridge per firing.
        physical: Whether the bridge shows the prototypes, not the firings.
    """

    prototypes: nn.ModuleList
    blocks: FiringBlocks

    def __init__(self, bridge: TransformerBridge, body: LoopBody) -> None:
        self.bridge, self.body = bridge, body
        self.prototypes = nn.ModuleList(tied_clone(block, follow=True) for block in body.blocks)
        self._shapes = [Shape(block) for block in body.blocks]
        self.blocks = FiringBlocks(body, self._make, self._name)
        self.physical = True
        self._names: list[BlockNames] = []
        self._physical_registry: dict[str, HookPoint] = {}

    @contextmanager
    def prototypes_in(self, model: nn.Module) -> Generator[None, None, None]:
        """Put the prototypes where transformer-lens looks for a model's blocks."""
        parent, _, name = self.body.block_path.rpartition(".")
        modules = model.get_submodule(parent)._modules
        held = modules.get(name)
        modules[name] = self.prototypes
        try:
            yield
        finally:
            if held is None:
                del modules[name]
            else:
                modules[name] = held

    def adopt(self) -> None:
        """Take over the prototypes that transformer-lens has wired, and install the firings."""
        self.prototypes = self.bridge.blocks  # type: ignore[assignment]
        keep_own_norms(self.bridge)
        for prototype in self.prototypes:
            _prepare(prototype)
            if isinstance(mid := getattr(prototype, "hook_resid_mid", None), HookPoint):
                mid.__class__ = StreamHookPoint
        self.install()

    def install(self) -> None:
        """Replace the prototypes by one block per firing, and list the hooks that these have."""
        bridge = self.bridge
        listed, self._physical_registry = bridge.hook_dict, bridge._hook_registry
        self._names = [BlockNames.listed(listed, block) for block in range(len(self.prototypes))]
        fixed = {name: point for name, point in listed.items() if not name.startswith("blocks.")}
        self.blocks = FiringBlocks(self.body, self._make, self._name)
        self.blocks.training = bridge.training
        registry = HookRegistry(self.blocks, self._names, fixed)
        bridge.blocks, bridge._hook_registry = self.blocks, registry  # type: ignore[assignment]
        self.body.executor, self.body.observer = self.run, registry
        self.physical = False

    @contextmanager
    def physical_view(self) -> Generator[None, None, None]:
        """Make the bridge an ordinary one over the physical blocks, for what processes weights."""
        bridge = self.bridge
        bridge.blocks, bridge._hook_registry = self.prototypes, self._physical_registry
        self.physical = True
        try:
            with self.prototypes_in(bridge.original_model), projections_apart(self.prototypes):
                yield
        finally:
            self.install()

    @contextmanager
    def every_block(self) -> Generator[None, None, None]:
        """Let the bridge's blocks be all those made so far, prototypes included: a flag goes to each."""
        self.bridge.blocks = nn.ModuleList([*self.prototypes, *self._opened()])
        try:
            yield
        finally:
            self.bridge.blocks = self.blocks

    def train(self, mode: bool) -> None:
        """Set training mode on all blocks made so far."""
        for block in (*self.prototypes, *self._opened()):
            block.train(mode)

    def run(self, run: Run, firing: Firing, bare: Bare, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one firing: its bridge if something inside is hooked, otherwise the bare module."""
        block = self.blocks.opened.get(firing.prefix)
        if run.stop == firing.index:
            stream = hidden_states(args, kwargs)
            raise StopAtLayerException(stream if block is None else block.bridge.hook_in(stream))
        if block is None:
            return bare(*args, **kwargs)
        inside = block.hooked_inside
        if not (inside or block.hooked_ends):
            return bare(*args, **kwargs)
        self.blocks.open(firing)  # its flat names may be those of another number of iterations
        stream = hidden_states(args, kwargs)
        if block.bridge.hook_in._forward_hooks:
            # A hook may write in place, and this is the tensor that the block before has put out.
            stream = stream.clone()
        if inside:
            self._follow(run, firing.block)
            args, kwargs = with_hidden_states(stream, args, kwargs)
            out = block.bridge(*args, **kwargs)
            if block.bridge._is_standalone_hidden_state_call(
                args, kwargs
            ):  # transformer-lens packs what comes of it
                return self.body.in_form(output_stream(out), firing, bare, args, kwargs)
            return out
        args, kwargs = with_hidden_states(block.bridge.hook_in(stream), args, kwargs)
        return map_output(block.bridge.hook_out, bare(*args, **kwargs))

    def _opened(self) -> list[nn.Module]:
        return [block.bridge for block in list(self.blocks.opened.values())]

    def _follow(self, run: Run, block: int) -> None:
        """Let the bridges of a physical block be over what it is by now; looked at once in a forward."""
        seen: set[int] = run.notes.setdefault("followed", set())
        if block in seen:
            return
        seen.add(block)
        changed = self._shapes[block].changed_values()
        if changed == []:
            return
        physical = self.body.blocks[block]
        opened = [one for one in self.blocks.opened.values() if one.block == block]
        if changed is None and self.bridge._weights_processed:
            raise RuntimeError(
                f"the modules of block {block} were changed after its weights were processed: change the model "
                "first, then open it and process its weights"
            )
        for tree in (self.prototypes[block], *(one.bridge for one in opened)):
            if changed is None:
                graft(tree, tied_clone(physical, follow=True))
            else:
                copy_values(changed, tree)
            _prepare(tree)
        if changed is None:
            for one in opened:
                one.watch()
            self._shapes[block] = Shape(physical)

    def _make(self, firing: Firing) -> nn.Module:
        prototype: Any = self.prototypes[firing.block]
        points = (m for m in prototype.modules() if isinstance(m, HookPoint))
        if any(point.fwd_hooks or point.bwd_hooks for point in points):
            # Hooks that transformer-lens itself put there close over this very prototype.
            block = self._wire_anew(firing)
        else:
            block = tied_clone(prototype)
        if self.body.non_additive_because:
            # Where transformer-lens' path patching and edge attribution look before they assume that
            # a head's output reaches every later block as it is.
            block.residual_contribution_scale = NoScale(self.body.non_additive_because)
        if hasattr(block, "_maybe_wire_capture_hooks"):
            block._maybe_wire_capture_hooks()
        return block

    def _wire_anew(self, firing: Firing) -> Any:
        adapter = self.bridge.adapter
        template: Any = (adapter.component_mapping or {})["blocks"]
        block = copy.deepcopy(template)  # holds no weights yet, and parts that are in no module tree
        block.set_original_component(tied_clone(self.body.blocks[firing.block], follow=True))
        setup_submodules(block, adapter, block.original_component)
        block._wire_ln1_module()
        block.train(self.bridge.training)
        _prepare(block)
        for module in block.modules():
            if hasattr(module, "_register_aliases"):
                module._register_aliases()
            if hasattr(module, "setup_hook_compatibility"):
                module.setup_hook_compatibility()
        return block

    def _name(self, firing: Firing, block: Any) -> None:
        block.name = f"blocks.{firing.index}"
        for hook in self._names[firing.block].points:
            hook_point(block, hook).name = f"blocks.{firing.index}.{hook}"


def _prepare(block: nn.Module) -> None:
    # A hooked block is not checkpointed: its hooks would fire again in backward, or be gone by then.
    for module in block.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False  # type: ignore[assignment]
    take_what_transformers_passes(block)
    keep_latents(block)
    keep_own_norms(block)
    fuse_projections(block)
    call_like_modules(block)
