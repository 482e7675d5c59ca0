"""Bridges stay with the model's modules: when these change, and when they have torch hooks of their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformer_lens.model_bridge.generalized_components import AttentionBridge, JointGateUpMLPBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from loop_lens.models.native.attention import mix_in
from loop_lens.unrolling.calls import hidden_states, map_output, with_hidden_states
from loop_lens.unrolling.clones import HOOK_TABLES, FollowedHooks, with_copies, with_forward


def graft(bridge: Any, module: nn.Module) -> None:
    """Put a block's bridge, hook points and all, over another clone of what its block has become.

    Raises:
        RuntimeError: If a part that the bridge has hook points on is not there any more; nothing is changed then.
    """
    places = _places(bridge.original_component, module)
    tables = {id(t.followed): t for m in bridge.modules() for t in _followed(m).values()}
    parts = [part for part in bridge.modules() if isinstance(part, GeneralizedComponent)]
    for new in list(module.modules()):
        for name, table in _followed(new).items():
            setattr(new, name, tables.get(id(table.followed), table))
    for part in parts:
        original = part.original_component
        if original is not None and id(original) not in places:  # made by the bridge, of modules in the tree
            attributes = {k: v for k, v in vars(original).items() if k not in ("_parameters", "_buffers")}
            vars(original).update({key: with_copies(value, places) for key, value in attributes.items()})
        held = {key: places[id(value)] for key, value in vars(part).items() if id(value) in places}
        vars(part).update(held)
    for old in list(bridge.original_component.modules()):
        for name, child in old._modules.items():
            if id(old) in places and isinstance(child, GeneralizedComponent):
                places[id(old)]._modules[name] = child
    for part in parts:
        original = part.original_component
        part._modules["_original_component"] = places.get(id(original), original)


def _places(old: nn.Module, new: nn.Module) -> dict[int, nn.Module]:
    """What stands where each module of a bridged tree stood."""
    pairs, places = [(old, new)], dict[int, nn.Module]()
    for before, now in pairs:
        places[id(before)] = now
        for name, child in before._modules.items():
            there = now._modules.get(name)
            if isinstance(child, GeneralizedComponent):
                if there is None:
                    raise RuntimeError(
                        f"{type(now).__name__}, put in after the model was opened, has no {name!r}, and hook "
                        "points are on it: change the model before it is opened"
                    )
                child = child._modules["_original_component"]
            if child is not None and there is not None:
                pairs.append((child, there))
    return places


def copy_values(changed: Iterable[tuple[nn.Module, str]], tree: nn.Module) -> None:
    """Let the clones within a tree hold the values that were set on their originals."""
    clones = {id(t.followed): m for m in tree.modules() for t in _followed(m).values()}
    for module, key in changed:
        clone = clones.get(id(module._forward_hooks))
        if clone is not None:
            vars(clone)[key] = vars(module)[key]


def _followed(module: nn.Module) -> dict[str, FollowedHooks]:
    tables = ((name, vars(module)[name]) for name in HOOK_TABLES)
    return {name: table for name, table in tables if isinstance(table, FollowedHooks)}


class _CalledLikeItsModule:
    """Over a transformer-lens component that computes anew what its module computes.

    transformer-lens passes such a module's call by, and with it the torch hooks and whatever else was put
    around the forward. A module of another class than at opening is run, not computed anew.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = self.original_component
        if type(module).forward is not self._computes:
            stock: Any = AttentionBridge if isinstance(self, AttentionBridge) else GeneralizedComponent
            return stock.forward(self, *args, **kwargs)
        if "forward" not in vars(module) and not any(vars(module)[table] for table in HOOK_TABLES):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        own: Any = type(self)
        inner = own.__new__(own)
        ends = {"hook_in": nn.Identity(), "hook_out": nn.Identity()}
        vars(inner).update(vars(self) | {"_modules": self._modules | ends})
        args, kwargs = with_hidden_states(self.hook_in(hidden_states(args, kwargs)), args, kwargs)
        called = with_forward(module, super(_CalledLikeItsModule, inner).forward)  # type: ignore[misc]
        return map_output(self.hook_out, called(*args, **kwargs))


def call_like_modules(block: nn.Module) -> None:
    """Let a block's components that compute anew run what is put around their modules' forwards, too."""
    for part in block.modules():
        forward = getattr(type(part), "forward", None)
        attention = isinstance(part, AttentionBridge) and forward is not AttentionBridge.forward
        if attention or isinstance(part, JointGateUpMLPBridge):
            vars(part).setdefault("_computes", type(part.original_component).forward)  # type: ignore[union-attr]
            mix_in(part, _CalledLikeItsModule)
