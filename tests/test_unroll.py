"""Tied clones and slots, on plain torch modules."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from loop_lens.unrolling import FiringCountError, Run, Unroller
from loop_lens.unrolling.calls import common_parent
from loop_lens.unrolling.clones import tied_clone
from loop_lens.unrolling.kv import CacheSlot
from loop_lens.unrolling.schedule import Schedule
from loop_lens.unrolling.sites import Firing
from loop_lens.unrolling.tree import Blocks, Loop, Segments


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor, *, fail: bool = False) -> Tensor:
        if fail:
            raise RuntimeError("broken")
        return self.linear(x).tanh()


class Toy(nn.Module):
    def __init__(self, times: int = 3) -> None:
        super().__init__()
        self.first, self.loop, self.times = Block(), nn.ModuleList([Block(), Block()]), times

    def forward(self, x: Tensor, *, fail_at: int = -1) -> Tensor:
        x = self.first(x)
        for t in range(self.times):
            for block in self.loop:
                x = block(x, fail=t == fail_at)
        return x


def unrolled(model: Toy, times: int = 3) -> tuple[Unroller, list[Firing]]:
    core = Loop("loop", times, Blocks("core", 2))
    unroller = Unroller(model, [model.first, *model.loop], Schedule(Segments(Blocks("prelude", 1), core)))
    fired: list[Firing] = []

    def execute(run: Run, firing: Firing, bare: Any, args: Any, kwargs: Any) -> Any:
        fired.append(firing)
        return bare(*args, **kwargs)

    unroller.executor = execute
    unroller.install()
    return unroller, fired


X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


def test_each_call_is_its_own_firing() -> None:
    model = Toy()
    expected = model(X)
    unroller, fired = unrolled(model)
    assert torch.equal(model(X), expected)
    assert fired == list(unroller.schedule)


def test_an_executor_may_change_one_firing() -> None:
    model = Toy()
    unroller, _ = unrolled(model)

    def execute(run: Run, firing: Firing, bare: Any, args: Any, kwargs: Any) -> Any:
        out = bare(*args, **kwargs)
        return out * 0 if firing.prefix == "loop.1.blocks.0" else out

    unroller.executor = execute
    x = model.loop[1].forward(torch.zeros(4, 3))
    for block in model.loop:
        x = block.forward(x)
    assert torch.equal(model(X), x)


def test_iterations_change_at_run_time() -> None:
    model = Toy()
    unroller, fired = unrolled(model)
    model.times = 7
    with pytest.raises(FiringCountError, match="more than 3 times"):
        model(X)
    unroller.schedule = unroller.schedule.with_times(loop=7)
    fired.clear()
    model(X)
    assert fired == list(unroller.schedule)


def test_an_aborted_forward_leaves_the_count_right() -> None:
    model = Toy()
    unroller, fired = unrolled(model)
    expected = model(X)
    for t in range(3):
        with pytest.raises(RuntimeError, match="broken"):
            model(X, fail_at=t)
        assert unroller.run is None
        fired.clear()
        assert torch.equal(model(X), expected) and fired == list(unroller.schedule)


def test_threads_count_for_themselves() -> None:
    model = Toy()
    unroller, _ = unrolled(model)
    barrier, seen = threading.Barrier(2), {0: [], 1: []}
    names = threading.local()

    def execute(run: Run, firing: Firing, bare: Any, args: Any, kwargs: Any) -> Any:
        barrier.wait(5)
        seen[names.me].append(firing.index)
        return bare(*args, **kwargs)

    unroller.executor = execute

    def work(me: int) -> None:
        names.me = me
        model(X)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen[0] == seen[1] == list(range(7))


def test_a_forward_within_a_forward() -> None:
    model = Toy()
    unroller, _ = unrolled(model)
    expected, inner = model(X), []

    def execute(run: Run, firing: Firing, bare: Any, args: Any, kwargs: Any) -> Any:
        if firing.index == 3 and not inner:
            inner.append(None)
            inner[0] = model(X)
        return bare(*args, **kwargs)

    unroller.executor = execute
    assert torch.equal(model(X), expected) and torch.equal(inner[0], expected)


def test_recomputation_from_outside_a_forward_is_the_bare_block() -> None:
    model = Toy()
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    expected = x.grad
    _, fired = unrolled(model)

    class Checkpointed(Toy):
        def forward(self, x: Tensor, *, fail_at: int = -1) -> Tensor:
            x = self.first(x)
            for _ in range(self.times):
                for block in self.loop:
                    x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            return x

    outer = Checkpointed()
    outer.load_state_dict(model.state_dict())
    unroller, fired = unrolled(outer)
    y = X.clone().requires_grad_()
    outer(y).sum().backward()
    assert torch.equal(y.grad, expected) and len(fired) == len(unroller.schedule)


def test_slots_come_off_again() -> None:
    model = Toy()
    kinds = [type(m) for m in model.modules()]
    keys = list(model.state_dict())
    unroller, fired = unrolled(model)
    assert list(model.state_dict()) == keys
    assert isinstance(model.first, Block) and type(model.first).__name__ == "Block"
    with pytest.raises(ValueError, match="unrolled already"):
        unroller.install()
    unroller.remove()
    assert [type(m) for m in model.modules()] == kinds
    model(X)
    assert not fired


def test_the_schedule_must_be_the_models() -> None:
    model = Toy()
    with pytest.raises(ValueError, match="names 2 physical blocks, the model has 1"):
        Unroller(model, [model.first], Schedule(Segments(Blocks("a", 2))))


def test_copies_of_an_unrolled_model_count_for_themselves() -> None:
    model = Toy()
    _, fired = unrolled(model)
    twin = copy.deepcopy(model)
    expected = model(X)
    fired.clear()
    assert torch.equal(twin(X), expected)
    with torch.no_grad():
        twin.first.linear.weight.zero_()
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("change", ["assign", "setattr", "dtype", "load"])
def test_clones_follow_whatever_happens_to_the_parameters(change: str) -> None:
    block = Block()
    clones = [tied_clone(block) for _ in range(3)]
    if change == "assign":
        state = {k: torch.ones_like(v) for k, v in block.state_dict().items()}
        block.load_state_dict(state, assign=True)
    elif change == "setattr":
        clones[0].linear.weight = nn.Parameter(torch.ones(3, 3))
    elif change == "dtype":
        block.to(torch.float64)
    else:
        clones[1].load_state_dict({k: torch.ones_like(v) for k, v in block.state_dict().items()})
    for clone in clones:
        assert clone.linear is not block.linear
        for (name, ours), theirs in zip(clone.named_parameters(), block.parameters(), strict=True):
            assert ours is theirs, name
        for ours, theirs in zip(clone.buffers(), block.buffers(), strict=True):
            assert ours is theirs


def test_clones_have_hooks_of_their_own() -> None:
    block = Block()
    clone, fired = tied_clone(block), []
    clone.linear.register_forward_hook(lambda m, a, out: fired.append("clone"))
    block(X)
    assert not fired
    clone(X)
    assert fired == ["clone"]
    assert clone.training is block.training
    clone.eval()
    assert block.training


def test_a_clone_keeps_references_within_the_tree() -> None:
    block = Block()
    block.linear.__dict__["neighbour"] = block.norm
    outside = nn.Linear(1, 1)
    block.linear.__dict__["other"] = outside
    clone = tied_clone(block)
    assert clone.linear.neighbour is clone.norm and clone.linear.other is outside


def test_cache_slots_hold_one_firing_each() -> None:
    cache = DynamicCache()
    keys = torch.randn(1, 2, 3, 4)
    for slot in range(5):
        held, _ = CacheSlot(cache, slot, 0).update(keys + slot, keys, 0)
        assert torch.equal(held, keys + slot)
    again, _ = CacheSlot(cache, 3, 0).update(keys, keys, 0)
    assert again.shape[2] == 6 and torch.equal(again[:, :, :3], keys + 3)
    assert CacheSlot(cache, 3, 0).get_seq_length() == 6 and CacheSlot(cache, 9, 0).get_seq_length() == 0


def test_the_trunk_is_found() -> None:
    model = nn.ModuleDict({"body": Toy(), "head": nn.Linear(3, 3)})
    body: Any = model["body"]
    assert common_parent(model, [body.first, *body.loop]) is body
    assert common_parent(model, list(body.loop)) is body
    with pytest.raises(ValueError, match="not a submodule"):
        common_parent(model, [Block()])
