"""Text of a user's (tokens, names, titles) as pages and pictures take it: shown as it is, never run."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from typing import Any

_OPENING = "\ue000lt\ue000"


def in_html(text: Any) -> str:
    """Text within HTML, or within an attribute in quotes."""
    return html.escape(str(text))


def in_markdown(text: Any) -> str:
    """Text within a line of Markdown, or a cell of its tables."""
    return html.escape(" ".join(str(text).splitlines()), quote=False).replace("|", "\\|")


def in_figure(text: Any) -> str:
    """Text of a matplotlib figure, where dollars would begin a formula."""
    return str(text).replace("$", r"\$")


def in_script(render: Callable[..., str], *texts: Sequence[Any]) -> str:
    """What ``render`` makes of lists of texts, which it writes as JSON into a script.

    A script ends at the first ``</script>``, even within a string, so ``<`` is written as JSON's escape.
    """
    marked = [[str(text).replace("<", _OPENING) for text in each] for each in texts]
    return render(*marked).replace("\\ue000lt\\ue000", "\\u003c")
