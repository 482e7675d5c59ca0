"""What a looped model has beyond an ordinary bridge: a schedule, numbers of iterations, names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Self

from loop_lens.bridge.doors import require_known
from loop_lens.bridge.firings import Firings
from loop_lens.bridge.names import Select, find_site, select_sites
from loop_lens.bridge.registry import HookRegistry
from loop_lens.prompts.inputs import ReadsInput
from loop_lens.unrolling.body import LoopBody
from loop_lens.unrolling.runs import Plan
from loop_lens.unrolling.schedule import Schedule
from loop_lens.unrolling.sites import Site
from loop_lens.unrolling.tree import Iteration


class CountsFirings:
    """A bridge's configuration whose number of layers is that of the firings of a forward that begins here."""

    _bridge_ref: Any

    @property
    def n_layers(self) -> int:
        """Number of firings."""
        bridge = self._bridge_ref() if self._bridge_ref is not None else None
        return vars(self)["n_layers"] if bridge is None else len(bridge.blocks)

    @n_layers.setter
    def n_layers(self, n: int) -> None:
        vars(self)["n_layers"] = n

    def to_dict(self) -> dict[str, Any]:
        """All fields."""
        return {**vars(self), "n_layers": self.n_layers}

    @classmethod
    def over(cls, cfg: Any) -> None:
        """Put this class over a configuration's own."""
        own = type(cfg)
        cfg.__class__ = type(own.__name__, (cls, own), {"__module__": own.__module__, "__doc__": own.__doc__})


class LoopedBridge(ReadsInput):
    """A bridge over the firings of a loop: what fires, how often, and under which names.

    Attributes:
        body: What unrolls the model.
        firings: What makes and runs the blocks of its firings.
    """

    body: LoopBody
    firings: Firings

    @property
    def schedule(self) -> Schedule:
        """The firings of one forward; prints as a tree.

        Example:
            >>> print(model.schedule)
            prelude  1 block             firing  0
            loop     8 x 2 blocks        firings 1-16
            coda     1 block             firing  17
        """
        return self.body.schedule

    @property
    def recurrences(self) -> int:
        """Number of iterations of the (outermost) loop.

        Example:
            >>> model.recurrences
            8
        """
        return self.schedule.loops[self.schedule.main_loop].times

    def set_recurrences(self, recurrences: int | None = None, **times: int) -> None:
        """Change the number of iterations. Hooks stay with their iteration and layer; blocks without hooks are
        let go when their iteration no longer runs.

        Args:
            recurrences: Iterations of the outermost loop.
            **times: Iterations by loop name, for nested loops: ``set_recurrences(H=2, L=5)``.

        Raises:
            ValueError: If a number is below 1.

        Example:
            >>> model.set_recurrences(32)
            >>> len(model.schedule), model.cfg.n_layers
            (66, 66)
        """
        self.body.schedule = self._with_times(recurrences, times)
        if (
            self.schedule is self.body.base
        ):  # not within a context, where other numbers will be in force again
            self.firings.blocks.give_back()

    def _with_times(self, recurrences: int | None, times: dict[str, int]) -> Schedule:
        if self.body.order is not None:
            raise RuntimeError("the iterations run in another order: leave that context before changing R")
        if recurrences is not None:
            times[self.schedule.main_loop] = recurrences
        return self.schedule.with_times(**times)

    def at_recurrences(self, recurrences: int | None = None, **times: int) -> AbstractContextManager[Self]:
        """Other numbers of iterations within a context, see `set_recurrences`.

        They hold for what this thread (or asynchronous task) runs; others keep the model's own number.

        Example:
            >>> with model.at_recurrences(2):
            ...     model(prompt).shape, model.recurrences
            (torch.Size([1, 11, 11]), 2)
        """
        return self.body.within(Plan(self._with_times(recurrences, times)), self)

    def _whole_call(self, recurrences: int | None) -> AbstractContextManager[Any]:
        """One number of iterations for all that a call does, even if the model's own changes meanwhile."""
        if recurrences is not None:
            return self.body.within(Plan(self._with_times(recurrences, {})), call=True)
        return self.body.within(self.body.plan, call=True)

    def generate(self, input: Any = "", *args: Any, recurrences: int | None = None, **kwargs: Any) -> Any:
        """Sample tokens, as in transformer-lens; all steps run the same number of iterations.

        Args:
            input: Text, tokens [batch pos], or a tokenizer's own output.
            *args: As in transformer-lens.
            recurrences: Number of iterations, for this call only.
            **kwargs: As in transformer-lens (``max_new_tokens``, ``do_sample``, ``return_type``, ...).

        Example:
            >>> tokens = model.to_tokens(prompt)
            >>> model.generate(tokens, max_new_tokens=2, do_sample=False, stop_at_eos=False, recurrences=4).shape
            torch.Size([1, 13])
        """
        require_known(self, "generate", kwargs)
        with self._whole_call(recurrences):
            return super().generate(input, *args, **kwargs)

    def generate_stream(
        self, input: Any = "", *args: Any, recurrences: int | None = None, **kwargs: Any
    ) -> Iterator[Any]:
        """Sample tokens step by step, as in transformer-lens, see `generate`."""
        require_known(self, "generate_stream", kwargs)
        plan = self.body.plan if recurrences is None else Plan(self._with_times(recurrences, {}))
        stream = super().generate_stream(input, *args, **kwargs)
        while True:
            with self.body.within(plan, call=True):  # never around a yield: the caller's code is not the call
                step = next(stream, stream)
            if step is stream:
                return
            yield step

    def hf_generate(self, input: Any = "", *args: Any, recurrences: int | None = None, **kwargs: Any) -> Any:
        """Generate with transformers' own method, as in transformer-lens, see `generate`."""
        require_known(self, "hf_generate", kwargs)
        with self._whole_call(recurrences):
            return super().hf_generate(input, *args, **kwargs)

    @property
    def initial_state(self) -> Any:
        """What the state before the first iteration is made from: a seed, ``"zeros"`` or a tensor
        [batch pos d_model]; None where the model leaves no choice.

        Example:
            >>> model.initial_state
            0
        """
        return self.body.initial_state

    @initial_state.setter
    def initial_state(self, value: Any) -> None:
        self.body.set_initial_state(value)

    @property
    def registry(self) -> HookRegistry:
        """All hook points by name."""
        return self._hook_registry  # type: ignore[return-value]

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

        Example:
            >>> model.name("pattern", iteration=3, layer=1)
            'loop.3.blocks.1.attn.hook_pattern'
            >>> model.name("state_in", iteration=3), model.name("resid_post", segment="coda", layer=0)
            ('loop.3.hook_state_in', 'coda.blocks.0.hook_resid_post')
        """
        return find_site(self, hook, iteration=iteration, layer=layer, segment=segment).name

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

        Example:
            >>> model.names("resid_post", iteration=slice(6, None), layer=1)
            ['loop.6.blocks.1.hook_resid_post', 'loop.7.blocks.1.hook_resid_post']
        """
        sites = select_sites(self, hook, iteration=iteration, layer=layer, segment=segment)
        return [site.name for site in sites]

    def locate(self, name: str) -> Site:
        """The site of a name, in either spelling: its place, its hook, and its other names.

        Raises:
            KeyError: If there is no such hook; says what there is.

        Example:
            >>> site = model.locate("blocks.8.attn.hook_pattern")
            >>> site.name, site.iteration, site.layer
            ('loop.3.blocks.1.attn.hook_pattern', 3, 1)
            >>> place, hook = site
            >>> place.index, hook
            (8, 'attn.hook_pattern')
        """
        return self.registry.locate(name)
