"""The page of one model's dynamics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loop_lens.experiments import report
from loop_lens.experiments.dynamics.measures import Dynamics, summary

_FIGURES = {
    "relative_step": "Step of each iteration relative to the norm, a line per layer, a spread over prompts around it.",
    "cosine": "Cosine of each layer to its state at the reference (M5).",
    "pattern_step": "Frobenius norm of the change of attention per iteration, mean over heads (M3).",
    "settling": "Mean total variation of each head's attention per iteration; red: where it settles (0.01).",
    "pairs_attention": "Frobenius distance of attention between every two firings (M7); lines: where an iteration or "
    "a segment begins.",
    "pairs_residual": "Cosine of the stream between every two firings (M8).",
    "trajectories": "States of the last token of the first prompt, in two principal components of all states, by "
    "quartile of the iterations.",
    "extrapolation": "Loss and accuracy on the next token, and the divergence from the model at its own number of "
    "iterations, against the number of iterations.",
}


def write_dynamics(found: Dynamics, *, out: Path, name: str, about: str, command: str) -> Path:
    """Write a model's tables and figures into a folder, and the page beside it.

    Args:
        found: What was measured.
        out: The folder; the page is ``out.md``. What stands in its ``notes.md`` goes into the page.
        name: The model's name.
        about: What ran: prompts, iterations, reference.
        command: The command that was given.

    Returns:
        The page.
    """
    report.save_tables(found.parts, out)
    layers, spectrum = summary(found), found.spectrum.to_dataframe().drop(columns="position", errors="ignore")
    table = found.extrapolation.to_dataframe()
    answers: Any = table[
        [c for c in table.columns if not c.endswith(("_std", "_prompts")) and "step" not in c]
    ]
    report.save_csv(layers, out / "layers.csv")
    report.save_csv(answers, out / "extrapolation.csv")
    for label, figure in _figures(found).items():
        report.save_figure(figure, out / f"{label}.png", few_colours=label != "settling")
    parts = [
        about,
        "## By layer\n\nAt the last iteration; shares are of tokens (Algorithm 1, cosine to the last state).",
        report.markdown_table(layers),
        "## Jacobian of an iteration\n\nSpectral radius and leading singular value, first prompt, 16 tokens.",
        report.markdown_table(spectrum),
        "## Against the number of iterations",
        report.markdown_table(answers),
        report.notes_of(out),
        "## Figures",
        *(report.picture(out, label, caption=text) for label, text in _FIGURES.items()),
    ]
    return report.write_page(out, f"Dynamics of {name}", command, parts)


def _figures(found: Dynamics) -> dict[str, Any]:
    settling = found.settling.plot()
    settling.set_size_inches(7, min(8, settling.get_size_inches()[1]))  # models have many heads
    return {
        "relative_step": found.convergence.plot("relative_step"),
        "cosine": found.convergence.plot("cosine"),
        "pattern_step": found.convergence.plot("pattern_step"),
        "settling": settling,
        "pairs_attention": found.pairs.plot("frobenius"),
        "pairs_residual": found.pairs.plot("cosine"),
        "trajectories": found.trajectories.plot(),
        "extrapolation": found.extrapolation.plot(),
    }
