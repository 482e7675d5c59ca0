"""``hops-no-injection``: the same task, in a loop that is given the prelude's output once only."""

from __future__ import annotations

from dataclasses import replace

from loop_lens.training.recipes.hops import HOPS, hops_config

HOPS_NO_INJECTION = replace(
    HOPS,
    name="hops-no-injection",
    summary="The model of `hops` without injection: prelude 1, core 2, coda 1, and a loop that starts from the "
    "prelude's output and never sees it again, so that all it needs must stay in its state.",
    intended=HOPS.intended + " Compare its dynamics with those of `hops`.",
    model=lambda task: hops_config(task, injection="none", initial_state="prelude"),
)
