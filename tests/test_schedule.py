"""Schedules: firings in order, names both ways, no tensors."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

import loop_lens
from loop_lens.unrolling.schedule import Schedule
from loop_lens.unrolling.sites import Boundary, Firing
from loop_lens.unrolling.tree import Blocks, Loop, Segments, UnknownNameError

SITES = ("hook_state_in", "hook_injected", "hook_state_out")
FLAT = Schedule(
    Segments(
        Blocks("prelude", 2),
        Loop("loop", 4, Blocks("core", 4), sites=SITES),
        Blocks("coda", 2),
        sites=("hook_initial_state", "hook_prelude_out"),
    )
)
NESTED = Schedule(
    Segments(Loop("H", 2, Loop("L", 3, Blocks("L", 2), sites=SITES), Blocks("H", 2), sites=SITES))
)


def test_the_contracts_example() -> None:
    firing = FLAT[16]
    assert (firing.index, firing.segment, firing.iteration, firing.layer) == (16, "loop", 3, 2)
    assert firing.prefix == "loop.3.blocks.2"


def test_firings_come_in_order() -> None:
    assert [f.index for f in FLAT] == list(range(20))
    blocks = [0, 1, *[2, 3, 4, 5] * 4, 6, 7]
    assert [f.block for f in FLAT] == blocks and FLAT.n_blocks == 8
    assert FLAT.visits == ((0,), (1,), *[(i, i + 4, i + 8, i + 12) for i in (2, 3, 4, 5)], (18,), (19,))


def test_nested_loops() -> None:
    low = [f"H.{h}.L.{i}.blocks.{b}" for h in range(2) for i in range(3) for b in range(2)]
    high = [[f"H.{h}.blocks.{b}" for b in range(2)] for h in range(2)]
    assert [f.prefix for f in NESTED] == [*low[:6], *high[0], *low[6:], *high[1]]
    firing = NESTED[12]
    assert (firing.segment, firing.iteration, firing.layer) == ("L", (1, 2), 0)
    assert NESTED[14].segment == "H" and NESTED[14].iteration == 1
    assert NESTED.main_loop == "H" and NESTED.innermost_loop == "L"


@pytest.mark.parametrize("schedule", [FLAT, NESTED])
def test_every_name_is_found_both_ways(schedule: Schedule) -> None:
    for firing in schedule:
        for hook in ("hook_resid_post", "attn.hook_pattern", "mlp.in.hook_out"):
            for name in (f"blocks.{firing.index}.{hook}", f"{firing.prefix}.{hook}"):
                assert schedule.site(name) == (firing, hook)
        assert schedule.find(firing.segment, firing.iteration, firing.layer) is firing
    for name, site in schedule.sites.items():
        place, hook = schedule.site(name)
        assert isinstance(place, Boundary) and place == site.place and name.endswith(hook)


def test_it_prints_as_a_tree() -> None:
    assert str(FLAT) == (
        "prelude  2 blocks            firings 0-1\n"
        "loop     4 x 4 blocks        firings 2-17\n"
        "coda     2 blocks            firings 18-19"
    )
    assert str(NESTED) == (
        "H        2 x L + 2 blocks    4 firings within 6-15\n"
        "  L      3 x 2 blocks        12 firings within 0-13"
    )


@pytest.mark.parametrize(
    ("site", "before"),
    [
        ("hook_prelude_out", 2),
        ("hook_initial_state", 2),
        ("loop.0.hook_state_in", 2),
        ("loop.1.hook_injected", 6),
        ("loop.1.hook_state_out", 10),
    ],
)
def test_when_sites_are_reached(site: str, before: int) -> None:
    assert FLAT.site(site).fired_before == before


def test_when_sites_of_nested_loops_are_reached() -> None:
    assert NESTED.site("H.1.hook_state_in").fired_before == 8
    assert NESTED.site("H.1.hook_injected").fired_before == 14
    assert NESTED.site("H.0.hook_state_out").fired_before == 8
    assert NESTED.site("H.0.L.2.hook_injected").fired_before == 4


def test_other_numbers_of_iterations() -> None:
    more = FLAT.with_times(loop=6)
    assert len(more) == 28 and more[-1].prefix == "coda.blocks.1"
    assert len(NESTED.with_times(H=1, L=1)) == 4
    assert len(FLAT) == 20


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: Loop("loop", 0, Blocks("core", 1)), ValueError, "at least 1, got 0"),
        (lambda: Blocks("core", -1), ValueError, "-1 blocks"),
        (lambda: Schedule(Segments(Blocks("a", 1), Blocks("a", 1))), ValueError, "names must differ"),
        (lambda: Loop("loop", 1, Blocks("a", 1), Blocks("b", 1)), ValueError, "more than one run"),
        (lambda: FLAT.with_times(loop=0), ValueError, "at least 1"),
        (lambda: FLAT.with_times(ring=2), UnknownNameError, "there are loop|loop"),
        (lambda: FLAT[20], IndexError, "0-19"),
        (lambda: FLAT.site("blocks.20.hook_in"), UnknownNameError, "0-19"),
        (lambda: FLAT.site("loop.4.blocks.0.hook_in"), UnknownNameError, "loop 0-3"),
        (lambda: FLAT.site("loop.0.hook_exit_gate"), UnknownNameError, "hook_injected"),
        (lambda: FLAT.find("coda", None, 2), UnknownNameError, "layers 0-1"),
        (lambda: FLAT.find("coda", 1, 0), UnknownNameError, "outside the loop"),
        (lambda: FLAT.find("loop", 4, 0), UnknownNameError, "loop 0-3"),
        (lambda: FLAT.find("middle", 0, 0), UnknownNameError, "prelude, loop, coda"),
        (lambda: NESTED.find("L", (0, 3), 0), UnknownNameError, "H 0-1 x L 0-2"),
    ],
)
def test_what_does_not_exist_is_an_error_that_says_what_does(make: Any, error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        make()


def test_it_needs_no_torch() -> None:
    own = {f"loop_lens.unrolling.{name}" for name in ("numbers", "sites", "tree")}
    for name in ("numbers", "schedule", "sites", "tree"):
        source = ast.parse((Path(loop_lens.__file__).parent / "unrolling" / f"{name}.py").read_text())
        imported = {
            alias.name for node in source.body if isinstance(node, ast.Import) for alias in node.names
        }
        imported |= {node.module or "" for node in source.body if isinstance(node, ast.ImportFrom)}
        assert imported - own <= {
            "__future__",
            "re",
            "collections.abc",
            "dataclasses",
            "functools",
            "operator",
            "typing",
        }


def test_five_hundred_firings_are_listed_at_once() -> None:
    many = Schedule(Segments(Blocks("prelude", 2), Loop("loop", 127, Blocks("core", 4)), Blocks("coda", 2)))
    assert len(many) == 512 and isinstance(many[300], Firing)
    assert many.site("loop.126.blocks.3.hook_in").place == many[509]


def test_the_innermost_loop_is_the_deepest_or_is_asked_for() -> None:
    inner = Loop("a", 2, Blocks("a", 1))
    schedule = Schedule(Segments(Loop("A", 2, inner, Blocks("A", 1)), Loop("B", 3, Blocks("B", 1))))
    assert schedule.innermost_loop == "a" and schedule.main_loop == "A"
    beside = Schedule(Segments(Loop("A", 2, Blocks("A", 1)), Loop("B", 3, Blocks("B", 1))))
    with pytest.raises(ValueError, match="several innermost loops, A, B"):
        _ = beside.innermost_loop
