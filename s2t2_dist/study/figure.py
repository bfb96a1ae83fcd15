"""The figure of a study: for each variant the mean curve over seeds, in a band from min to max."""

import itertools
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from s2t2_dist.report.figure import COLOURS, GREY, HIGHEST, STYLE, drawable, smooth, training_curve
from s2t2_dist.report.runs import FinishedRun, unigram_bits

LINES = ("-", "--", ":")


def draw(path: Path, variants: dict[str, list[FinishedRun]]) -> None:
    """Write the figure as PNG.

    Args:
        variants: label -> the finished runs of all seeds, of one recipe; without runs it is left
            out.
    """
    shown = {label: runs for label, runs in variants.items() if runs}
    temporary = path.with_name(f".{path.name}.tmp")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 5.6), layout="constrained")
        FigureCanvasAgg(figure)
        _draw_curves(figure.subplots(), shown)
        figure.savefig(temporary, format="png", dpi=160)
    temporary.replace(path)


def _draw_curves(axes: Axes, variants: dict[str, list[FinishedRun]]) -> None:
    styles = itertools.product(LINES, COLOURS)
    lows, starts, guess = [], [], None
    for (label, runs), (line, colour) in zip(variants.items(), styles, strict=False):
        ends = _draw_variant(axes, runs, colour, line)
        guess = unigram_bits(runs[0].data)
        lows.append(ends.min())
        starts.append(validation_curve(runs)[1][:, 0].max())
        known = f"{drawable(label)}: {ends.mean():.3f}"
        axes.plot([], [], f"o{line}", color=colour, label=known, markeredgecolor="white")
    if guess is not None:
        axes.axhline(guess, color=GREY, linewidth=1, linestyle="--")
        place = {"xycoords": ("axes fraction", "data"), "va": "center"}
        axes.annotate(f" unigram\n {guess:.3f}", (1, guess), color=GREY, **place)
        top = min(max(starts), HIGHEST * guess)
        axes.set_ylim(min([*lows, guess]) - 0.05, max(top, guess) + 0.05)
        axes.legend(loc="upper right")
    axes.set_xlim(left=0)
    axes.set_xlabel("optimizer steps of all stages")
    axes.set_ylabel("bits per byte")
    axes.set_title(
        "Means over seeds: training (lines: moving average), validation (dots); bands: min to max"
    )
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)


def _draw_variant(axes: Axes, runs: list[FinishedRun], colour: str, line: str) -> np.ndarray:
    """Draw the runs of a variant; returns the last validation points, one for each run."""
    for index in range(len(runs[0].recipe.stages)):
        steps, bits = training_curves(runs, index)
        smoothed = np.array([smooth(one) for one in bits])
        if smoothed.size:
            at = runs[0].first_step(index) + steps
            axes.plot(at, smoothed.mean(0), line, color=colour, linewidth=1.6)
            band = {"color": colour, "alpha": 0.18, "linewidth": 0}
            axes.fill_between(at, smoothed.min(0), smoothed.max(0), **band)
    at, points = validation_curve(runs)
    mean = points.mean(0)
    spread = (mean - points.min(0), points.max(0) - mean)
    look = {"color": colour, "markersize": 5, "markeredgecolor": "white", "capsize": 2}
    axes.errorbar(at, mean, spread, fmt="o", **look)
    return points[:, -1]


def training_curves(runs: list[FinishedRun], index: int) -> tuple[np.ndarray, np.ndarray]:
    """The steps of a stage that every run has, (S,), and their training bits, (runs, S).

    A step that was skipped has no loss, and is left out of all.
    """
    curves = [training_curve(run, index) for run in runs]
    steps = curves[0][0]
    for other, _ in curves[1:]:
        steps = np.intersect1d(steps, other)
    return steps, np.array([bits[np.isin(at, steps)] for at, bits in curves])


def validation_curve(runs: list[FinishedRun]) -> tuple[np.ndarray, np.ndarray]:
    """Total steps of the validation points, (S,), and their bits, (runs, S)."""
    at, points = [], []
    for index in range(len(runs[0].recipe.stages)):
        found = [run.evaluations(index) for run in runs]
        for step in sorted(set.intersection(*(set(one) for one in found))):
            at.append(runs[0].first_step(index) + step)
            points.append([one[step]["eval_bits_per_byte"] for one in found])
    return np.array(at), np.array(points).T
