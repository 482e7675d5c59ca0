"""Every public name has an Example, and every Example does what it says."""

from __future__ import annotations

import doctest
import importlib
import inspect
from typing import Any

import pytest
import torch

import loop_lens

PACKAGES = (
    "loop_lens",
    "loop_lens.unrolling",
    "loop_lens.prompts",
    "loop_lens.figures",
    "loop_lens.data",
    "loop_lens.shipped",
    "loop_lens.measuring",
    "loop_lens.interventions",
    "loop_lens.lenses",
    "loop_lens.dynamics",
    "loop_lens.stages",
    "loop_lens.training",
)
METHODS = (
    "name",
    "names",
    "locate",
    "set_recurrences",
    "at_recurrences",
    "run_with_cache",
    "run_with_hooks",
    "hooks",
    "generate",
    "forward",
    "enable_compatibility_mode",
    "state_dict",
    "save_pretrained",
    "schedule",
    "recurrences",
    "initial_state",
)


def public() -> dict[str, Any]:
    """Every public class and function by its shortest path, and the bridge's own methods."""
    found: dict[int, tuple[str, Any]] = {}
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in getattr(module, "__all__", ()):
            thing = getattr(module, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                found.setdefault(id(thing), (f"{package}.{name}", thing))
    every = dict(found.values())
    for kind, methods in (
        (loop_lens.HookedLoopedTransformer, METHODS),
        (loop_lens.LoopCache, ["over_iterations", "grid"]),
    ):
        every |= {f"loop_lens.{kind.__name__}.{m}": inspect.getattr_static(kind, m) for m in methods}
    return every


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What examples may use without making it."""
    return {
        "loop_lens": loop_lens,
        "torch": torch,
        "prompt": "a c c b b a ? a -> -> ->",
        "prompts": ["a c c b b a ? a -> -> ->", "d e e f f d ? e ->"],
    }


@pytest.mark.parametrize("name", sorted(public()))
def test_the_example_does_what_it_says(
    name: str, names: dict[str, Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    thing = public()[name]
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = loop_lens.boot("loop-lens/hops")  # anew each time: an example may change it
    finder = doctest.DocTestFinder(recurse=False)
    examples = [t for t in finder.find(thing, name, globs={**names, "model": model}) if t.examples]
    assert examples, f"{name} has no Example"
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    runner = doctest.DocTestRunner(optionflags=flags, verbose=False)
    told: list[str] = []
    for test in examples:
        runner.run(test, out=told.append)
    assert runner.failures == 0, "".join(told)


def test_rooms_are_attributes_of_the_package() -> None:
    for room in ("data", "dynamics", "stages", "training"):  # what importing loop_lens does not import
        assert loop_lens.__getattr__(room) is importlib.import_module(f"loop_lens.{room}")
    with pytest.raises(AttributeError, match="no attribute 'dynamic'"):
        loop_lens.dynamic  # noqa: B018
