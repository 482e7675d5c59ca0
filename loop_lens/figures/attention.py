"""One head's attention pattern at every iteration, as a page that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import circuitsvis.attention as cv
from jaxtyping import Float
from torch import Tensor

from loop_lens.figures.escaping import in_html, in_script

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body{{font-family:system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem}}</style></head>
<body><h1>{title}</h1><p>{text}</p>{figure}</body></html>
"""


def attention_page(
    patterns: Float[Tensor, "iteration query key"],
    tokens: Sequence[str],
    path: str | Path,
    *,
    title: str = "Attention by iteration",
    text: str = "",
    names: Sequence[str] | None = None,
) -> Path:
    """Write a page with one attention pattern per iteration, drawn by circuitsvis.

    Args:
        patterns: Attention of one head at each iteration.
        tokens: The tokens as strings, one per position.
        path: Where to write the page.
        title: The page's title.
        text: A sentence below it; like all text of the page it is shown as it is, not as HTML.
        names: What to call each pattern; the iterations by default.

    Returns:
        The path.

    Raises:
        ValueError: If the patterns hold NaN, or their size is not the number of tokens (circuitsvis
            would draw both without a word).

    Example:
        >>> from loop_lens.figures import attention_page
        >>> _, cache = model.run_with_cache(prompt)
        >>> patterns = cache.over_iterations("pattern", layer=1)[:, 0, 0]
        >>> attention_page(patterns, model.to_str_tokens(prompt), "page.html").exists()
        True
    """
    n = len(tokens)
    if patterns.ndim != 3 or patterns.shape[1:] != (n, n):
        raise ValueError(
            f"patterns have shape {tuple(patterns.shape)}, but {n} tokens need [iteration {n} {n}]"
        )
    if patterns.isnan().any():
        bad = patterns.isnan().any(dim=(1, 2)).nonzero()[0].item()
        raise ValueError(f"the pattern of iteration {bad} holds NaN: the forward that made it diverged")
    names = list(names) if names is not None else [f"t={t}" for t in range(len(patterns))]
    if len(names) != len(patterns):
        raise ValueError(f"{len(names)} names for {len(patterns)} patterns")
    attention = patterns.detach().float().cpu()
    figure = in_script(
        lambda words, heads: cv.attention_heads(attention, words, attention_head_names=heads).local_src,
        tokens,
        names,
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    page = _PAGE.format(title=in_html(title), text=in_html(text), figure=figure)
    path.write_text(page, encoding="utf-8")
    return path
