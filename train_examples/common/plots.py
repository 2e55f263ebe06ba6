"""Colours and axes of the examples' pictures."""

from matplotlib.axes import Axes

# Colours that differ for colour-blind readers too (Okabe and Ito).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


def tidy(ax: Axes) -> None:
    """Draw a light grid, and no frame at the top and right."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, linewidth=0.6)
