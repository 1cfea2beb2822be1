"""Figures of numbers, as PNGs."""

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath
from jaxtyping import ArrayLike

from drl_jax.evaluation.density import History

# Panels beside each other, and the size of one [inches].
COLUMNS = 3
WIDTH, HEIGHT = 4.0, 3.0


class Panel(NamedTuple):
    """One pair of axes.

    Attributes:
      title: what is shown.
      scale: of the y axis, 'linear', 'log' or 'symlog'.
      curves: y by name; NaN where there is no point.
      marks: a height for some of the names: a dotted line in the curve's colour.
      x: of all curves [steps].
    """

    title: str
    scale: str
    curves: Mapping[str, Sequence[float]]
    marks: Mapping[str, float]
    x: Sequence[float]


def write_curves(path: epath.Path, panels: Sequence[Panel]) -> None:
    """Draws panels with logarithmic steps, 0 at their left edge, and writes them."""
    import matplotlib as mpl  # half a second, which most modes do not need
    from matplotlib.figure import Figure

    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(WIDTH * COLUMNS, HEIGHT * rows), layout="constrained")
    for number, panel in enumerate(panels, 1):
        axes = figure.add_subplot(rows, COLUMNS, number)
        colours = mpl.colormaps["viridis"].resampled(len(panel.curves) + 1)
        for i, (name, y) in enumerate(panel.curves.items()):
            axes.plot(panel.x, y, ".-", color=colours(i), label=name)
            if name in panel.marks:
                axes.axhline(panel.marks[name], color=colours(i), linestyle=":")
        axes.set_xscale("symlog", linthresh=1)
        axes.set_yscale(panel.scale)
        axes.set_xlim(left=0)
        axes.set_title(panel.title, fontsize="medium")
        axes.set_xlabel("steps")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    _write(figure, path)


def write_annealing(path: epath.Path, history: History, log_density: ArrayLike) -> None:
    """Draws how annealing went, from white noise at the left to data at the right.

    Args:
      path: of the PNG.
      history: of both passes.
      log_density: of each example of the data [nats].
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH * 2, HEIGHT * 2), layout="constrained")
    panels = (
        ("log Z of the rung [nats]", history.log_Z),
        ("effective sample size / chains", history.effective_sample_size),
        ("acceptance", history.acceptance),
    )
    for number, (title, (down, up)) in enumerate(panels, 1):
        axes = figure.add_subplot(2, 2, number)
        axes.plot(history.sigma_bar, down, color="tab:blue", label="down, from white noise")
        axes.plot(
            history.sigma_bar, up, color="tab:orange", linestyle="--", label="up, from data"
        )
        axes.set_xscale("log")
        axes.invert_xaxis()
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("standard deviation of the noise")
        axes.grid(alpha=0.3)
        if number > 1:
            axes.set_ylim(0, 1.05)
        axes.legend(fontsize="x-small")
    axes = figure.add_subplot(2, 2, 4)
    axes.hist(log_density, bins="auto", color="tab:blue")
    axes.set_title("log-density of the data [nats]", fontsize="medium")
    axes.set_ylabel("examples")
    _write(figure, path)


def _write(figure: Any, path: epath.Path) -> None:
    encoded = io.BytesIO()
    # Without the library's version in it, equal numbers are equal files.
    figure.savefig(encoded, format="png", metadata={"Software": None})
    path.write_bytes(encoded.getvalue())
