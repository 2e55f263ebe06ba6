"""Colours, resolution and axes of the examples' pictures."""

from matplotlib.axes import Axes

from jaxbn._palette import COLORS as COLORS
from jaxbn._palette import DPI as DPI


def tidy(ax: Axes) -> None:
    """Draw a light grid, and no frame at the top and right."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, linewidth=0.6)
