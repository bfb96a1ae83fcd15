"""The figure of a comparison: training curves of every run, and the plan P of the first S2T2 run.

It needs no display. The colours are Okabe and Ito's, which colour-blind readers can tell apart.
"""

import itertools
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import LogLocator, NullFormatter

from s2t2_dist.config import Translate
from s2t2_dist.lm.translation import Translation
from s2t2_dist.report.runs import FinishedRun

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#666666"
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
}
SMOOTHING_SHARE = 15  # a curve is averaged over 1/15 of its steps
HIGHEST = 1.15  # times the worst baseline: curves that start above it are cut off
PLAN_TOKENS = 300  # sharpest source and target tokens shown
BLOCKS = 12  # singular vectors used to order them
LEAST_MASS = 0.1  # relative to a uniform plan's entry; smaller entries are grey


def draw(path: Path, runs: dict[str, FinishedRun], baselines: dict[str, float]) -> None:
    """Write the figure as PNG.

    Args:
        runs: by their label in the legend.
        baselines: bits per byte of horizontal lines, by label.
    """
    translation = first_translation(list(runs.values()))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(13 if translation else 8, 5.2), layout="constrained")
        FigureCanvasAgg(figure)
        if translation:
            left, right = figure.subfigures(1, 2, width_ratios=(1.25, 1))
            image, histogram = right.subplots(2, 1, height_ratios=(2.4, 1))
            _draw_plan(image, translation)
            _draw_histogram(histogram, translation.embed_plan)
        else:
            left = figure
        _draw_curves(left.subplots(), runs, baselines)
        figure.savefig(path, dpi=160)


def first_translation(runs: list[FinishedRun]) -> Translation | None:
    """The first learned plan; a plan of S2T2 is preferred to those of other methods."""
    stages = [(run, s) for run in runs for s in run.recipe.stages if isinstance(s, Translate)]
    stages.sort(key=lambda pair: pair[1].method not in ("dykstra", "dual"))
    return stages[0][0].translation_of(stages[0][1]) if stages else None


def _draw_curves(axes: Axes, runs: dict[str, FinishedRun], baselines: dict[str, float]) -> None:
    floor, ceiling = list(baselines.values()), list(baselines.values())
    for (label, run), colour in zip(runs.items(), itertools.cycle(COLOURS), strict=False):
        points = _draw_run(axes, run, colour)
        ending = f"{drawable(label)}: {points[-1]:.3f}"
        axes.plot([], [], "o-", color=colour, label=ending, markeredgecolor="white")
        floor.append(min(points))
        ceiling.append(min(points[0], HIGHEST * max(baselines.values())))
    for label, bits in baselines.items():
        axes.axhline(bits, color=GREY, linewidth=1, linestyle="--")
        place = {"xycoords": ("axes fraction", "data"), "va": "center"}
        axes.annotate(f" {label}\n {bits:.3f}", (1, bits), color=GREY, **place)
    axes.set_ylim(min(floor) - 0.08, max(ceiling) + 0.12)
    axes.set_xlim(left=0, right=1.12 * axes.dataLim.xmax)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("bits per byte")
    axes.set_title("Training loss (line: moving average) and validation (dots)")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.legend(loc="upper right")


def drawable(text: str) -> str:
    """Text as the figure's font can draw it: other characters as their code, and no mathematics."""
    font = get_font(findfont(FontProperties()))
    known = font.get_charmap()
    parts = (char if ord(char) in known else f"U+{ord(char):04X}" for char in text)
    return "".join(parts).replace("$", "\\$")


def _draw_run(axes: Axes, run: FinishedRun, colour: str) -> list[float]:
    """Draw the stages of a run one after the other; returns its validation points."""
    points = []
    for index, stage in enumerate(run.recipe.stages):
        start = run.first_step(index)
        steps, bits = training_curve(run, index)
        axes.plot(start + steps, bits, color=colour, alpha=0.18, linewidth=0.8)
        axes.plot(start + steps, smooth(bits), color=colour, linewidth=1.8)
        evaluated = run.evaluations(index)
        values = [line["eval_bits_per_byte"] for line in evaluated.values()]
        at = [start + step for step in evaluated]
        axes.plot(at, values, "o", color=colour, markersize=6, markeredgecolor="white")
        points += values
        if index:
            place = ("data", "axes fraction")
            axes.axvline(start, color=colour, linewidth=0.8, linestyle=":")
            axes.annotate(
                f" {stage.name}", (start, 0.01), xycoords=place, va="bottom", color=colour
            )
    return points


def training_curve(run: FinishedRun, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps of a stage (1 to its last) and their training losses in bits per byte."""
    lines = [line for line in run.lines(index) if "loss" in line]
    steps = np.array([line["step"] for line in lines], dtype=np.int64)
    return steps, np.array([run.training_bits(line) for line in lines])


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over 1/SMOOTHING_SHARE of the curve; the window is cut at the ends."""
    half = len(values) // SMOOTHING_SHARE // 2
    sums = np.concatenate(([0.0], np.cumsum(values)))
    at = np.arange(len(values))
    first, last = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _draw_plan(axes: Axes, translation: Translation) -> None:
    relative = in_blocks(sharpest_part(translation, PLAN_TOKENS))
    colours = mpl.colormaps["magma_r"].with_extremes(under="#e4e4e4", bad="white")
    image = axes.imshow(
        np.ma.masked_less_equal(relative, 0),
        cmap=colours,
        norm=LogNorm(vmin=LEAST_MASS, vmax=max(10.0, relative.max())),
        interpolation="nearest",
        aspect="auto",
    )
    rows, columns = relative.shape
    axes.set_xlabel(f"{columns} target tokens")
    axes.set_ylabel(f"{rows} source tokens")
    axes.set_xticks([])
    axes.set_yticks([])
    which = " of E" if len(translation.plans) > 1 else ""
    axes.set_title(f"Transport plan P{which}: sharpest tokens, similar ones side by side")
    label = f"mass, uniform plan = 1 (grey: under {LEAST_MASS:g}, white: 0)"
    axes.figure.colorbar(image, ax=axes, label=label, extend="min")


def sharpest_part(translation: Translation, count: int) -> np.ndarray:
    """P divided by the uniform plan, for the rows and columns with the largest entries; dense.

    If the plans are separate, it is the plan of E.
    """
    plan = translation.embed_plan
    indices = plan.indices().numpy()
    marginals = (translation.source_marginal.numpy(), translation.target_marginal.numpy())
    uniform = marginals[0][indices[0]] * marginals[1][indices[1]]
    values = plan.values().double().numpy() / uniform
    places = []
    for side, size in enumerate(plan.shape):
        peak = np.zeros(size)
        np.maximum.at(peak, indices[side], values)
        place = np.full(size, -1)
        chosen = np.argsort(-peak, kind="stable")[:count]
        place[chosen] = np.arange(len(chosen))
        places.append(place[indices[side]])
    kept = (places[0] >= 0) & (places[1] >= 0)
    part = np.zeros([min(count, size) for size in plan.shape])
    part[places[0][kept], places[1][kept]] = values[kept]
    return part


def in_blocks(matrix: np.ndarray) -> np.ndarray:
    """Reorder rows and columns by their dominant singular vector, then by its weight in them."""
    left, scale, right = np.linalg.svd(matrix - matrix.mean(), full_matrices=False)
    orders = []
    for vectors in (left[:, :BLOCKS] * scale[:BLOCKS], right[:BLOCKS].T * scale[:BLOCKS]):
        strongest = np.abs(vectors).argmax(axis=1)
        weight = vectors[np.arange(len(vectors)), strongest]
        orders.append(np.lexsort((-weight, strongest)))
    return matrix[np.ix_(*orders)]


def _draw_histogram(axes: Axes, plan: torch.Tensor) -> None:
    rows, columns = plan.shape
    counts = np.bincount(plan.indices()[1].numpy(), minlength=columns)
    edges = np.geomspace(max(1, counts[counts > 0].min()), rows, 40)
    axes.hist(counts, bins=edges, color=COLOURS[0])
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(np.median(counts), color=COLOURS[1], linewidth=1.2)
    axes.set_title(f"Non-zeros per target token: median {np.median(counts):,.0f} of {rows:,}")
    axes.set_xlabel("source tokens with mass, per target token")
    axes.set_ylabel("target tokens")
