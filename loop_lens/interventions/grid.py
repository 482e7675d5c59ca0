"""What a sweep sweeps over: a pair of prompts, and the cells of a grid of sites, positions and heads."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.bridge.names import hook_of, n_heads
from loop_lens.interventions.where import Places, Where
from loop_lens.prompts.reader import read_together
from loop_lens.prompts.tokens import words_of
from loop_lens.unrolling.sites import Layout, Site

AXES = ("iteration", "layer", "position", "head", "firing")
Direction = Literal["denoising", "noising"]


@dataclass(frozen=True)
class Pair:
    """The prompts of two runs to compare, checked.

    Attributes:
        clean: Tokens [prompt pos].
        corrupted: Tokens [prompt pos].
        direction: Which of them receives values.
        words: The receiver's first prompt, token by token.
    """

    clean: Tensor
    corrupted: Tensor
    direction: Direction
    words: tuple[str, ...]

    @property
    def base(self) -> Tensor:
        """The tokens of the run that receives values."""
        return self.corrupted if self.direction == "denoising" else self.clean

    @property
    def donor(self) -> Tensor:
        """The tokens of the run that gives values."""
        return self.clean if self.direction == "denoising" else self.corrupted

    def by_role(self, base: float, donor: float) -> tuple[float, float]:
        """Two runs' metrics as those of the clean and of the corrupted run."""
        return (donor, base) if self.direction == "denoising" else (base, donor)

    @property
    def first_difference(self) -> int:
        """First position at which any prompt's two versions differ, the length if none does."""
        differs = (self.clean != self.corrupted).any(0).nonzero()
        return int(differs[0]) if len(differs) else self.clean.shape[1]

    @classmethod
    def of(cls, model: HookedLoopedTransformer, clean: Any, corrupted: Any, direction: Direction) -> Pair:
        """Check two batches of prompts.

        Raises:
            ValueError: If they do not pair up, token by token.
        """
        if direction not in ("denoising", "noising"):
            raise ValueError(f"direction {direction!r} is unknown: choose 'denoising' or 'noising'")
        tokens = [
            read_together(model, prompts, name)
            for prompts, name in ((clean, "clean"), (corrupted, "corrupted"))
        ]
        if len(tokens[0]) != len(tokens[1]):
            raise ValueError(f"{len(tokens[0])} clean and {len(tokens[1])} corrupted prompts do not pair up")
        if tokens[0].shape[1] != tokens[1].shape[1]:
            raise ValueError(
                f"the clean prompts have {tokens[0].shape[1]} tokens and the corrupted ones "
                f"{tokens[1].shape[1]}: a patch goes from a position to the same position, so give prompts "
                "of equal length"
            )
        base = tokens[1] if direction == "denoising" else tokens[0]
        return cls(tokens[0], tokens[1], direction, words_of(model, base[0]))


@dataclass(frozen=True)
class Grid:
    """The cells of a sweep.

    Attributes:
        axes: Names of the dimensions.
        labels: What stands along each.
        shape: Their lengths.
        places: For each cell its index, its sites, its position and its head.
        layout: How the site's values are indexed.
    """

    axes: tuple[str, ...]
    labels: dict[str, tuple[Any, ...]]
    shape: tuple[int, ...]
    places: list[tuple[tuple[int, ...], tuple[Site, ...], int | None, int | None]]
    layout: Layout

    @property
    def sites(self) -> list[Site]:
        """Every site that any cell touches, once."""
        return list(dict.fromkeys(site for _, sites, _, _ in self.places for site in sites))

    @classmethod
    def of(
        cls,
        model: HookedLoopedTransformer,
        site: str,
        over: str | Sequence[str],
        words: Sequence[str],
        where: Where,
    ) -> Grid:
        """Lay out a sweep.

        Raises:
            ValueError: If the site has no such axis.
            UnknownNameError: If the model has no such site, iteration, layer.
        """
        axes = (over,) if isinstance(over, str) else tuple(over)
        _require_axes(axes)
        hook, between = hook_of(model, site)
        if between and "layer" in axes:
            raise ValueError(f"the site {site!r} lies between blocks: it has no layers to sweep over")
        if "firing" in axes:
            if between or (where.iterations, where.layers, where.segment) != (None, None, None):
                raise ValueError("over='firing' takes every block of every segment: choose nothing else")
            found = [model.locate(name) for name in model.names(hook)]
        else:
            found = where.sites(model, site)
        layout = found[0].layout
        groups: dict[str, dict[Any, list[Site]]] = {
            "iteration": _group(found, lambda s: s.place.iteration),
            "layer": _group(found, lambda s: getattr(s.place, "layer", None)),
            "firing": _group(found, lambda s: getattr(s.place, "index", None)),
        }
        if "iteration" in axes and list(groups["iteration"]) == [None]:
            raise ValueError(
                f"the site {site!r} is outside the loop here: it has no iterations to sweep over"
            )
        chosen_positions = _chosen(where.positions, len(words), "position", "the prompts have positions")
        if layout == "stream" and (where.heads is not None or "head" in axes):
            raise ValueError(f"the site {site!r} has no heads: sites with heads are z, q, k, v, pattern")
        chosen_heads = (
            []
            if layout == "stream"
            else _chosen(where.heads, n_heads(model, hook), "head", "the site has heads")
        )
        values: dict[str, list[Any]] = {
            "iteration": list(groups["iteration"]),
            "layer": list(groups["layer"]),
            "firing": list(groups["firing"]),
            "position": chosen_positions,
            "head": chosen_heads,
        }
        if any(
            x not in axes and y is not None for x, y in (("position", where.positions), ("head", where.heads))
        ):
            raise ValueError("positions and heads choose along an axis: name that axis in over=")
        shape = tuple(len(values[axis]) for axis in axes)
        places: list[tuple[tuple[int, ...], tuple[Site, ...], int | None, int | None]] = []
        for index in itertools.product(*(range(n) for n in shape)):
            picked = {axis: values[axis][i] for axis, i in zip(axes, index, strict=True)}
            own = tuple(
                s for s in found if all(s in groups[axis][picked[axis]] for axis in groups if axis in picked)
            )
            places.append((index, own, picked.get("position"), picked.get("head")))
        labels = {axis: tuple(values[axis]) for axis in axes}
        if "position" in axes:
            labels["position"] = tuple((p, words[p]) for p in chosen_positions)
        return cls(axes, labels, shape, places, layout)


def _group(found: Sequence[Site], key: Callable[[Site], Any]) -> dict[Any, list[Site]]:
    groups: dict[Any, list[Site]] = {}
    for one in found:
        groups.setdefault(key(one), []).append(one)
    return groups


def _require_axes(axes: tuple[str, ...]) -> None:
    unknown = [axis for axis in axes if axis not in AXES]
    if unknown:
        raise ValueError(f"axis {unknown[0]!r} is unknown: sweep over any of {', '.join(AXES)}")
    if not axes or len(set(axes)) != len(axes):
        raise ValueError("over= must name each axis once, and at least one")
    if "firing" in axes and ({"iteration", "layer"} & set(axes)):
        raise ValueError("a firing is an iteration and a layer already: sweep over 'firing' alone")


def _chosen(wanted: Places, n: int, what: str, there_are: str) -> list[int]:
    if wanted is None:
        return list(range(n))
    outside = [i for i in wanted if not -n <= i < n]
    if outside:
        raise ValueError(f"{what} {outside[0]} does not exist: {there_are} 0-{n - 1}")
    return [i % n for i in wanted]
