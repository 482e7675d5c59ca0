"""Pictures: pages of attention, heat maps, lines against iterations. They are returned, never shown."""

from loop_lens.figures.attention import attention_page
from loop_lens.figures.heatmap import draw_heatmap
from loop_lens.figures.lines import line_figure

__all__ = [
    "attention_page",
    "draw_heatmap",
    "line_figure",
]
