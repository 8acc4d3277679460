"""Plots of the report: inline SVG by matplotlib, in colors that follow the page (light or dark)."""

import html
import io
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from script.lib.report.curves import Curves, Lengths
from torch_src.runtime.libraries import import_library

# matplotlib writes these colors; COLORS replaces them with CSS variables of the page.
INK, RULE = "#010203", "#040506"
FIRST, SECOND = "#0072b2", "#d55e00"  # blue and vermilion of Okabe and Ito, safe for color-blind readers
GOLD, OTHER = "#009e73", "#777777"  # their green, hatched, and a gray
COLORS = {INK: "currentColor", RULE: "var(--rule)", FIRST: "var(--first)", SECOND: "var(--second)",
          GOLD: "var(--gold)", OTHER: "var(--soft)"}  # fmt: skip
STYLES: tuple[dict[str, Any], ...] = (  # retriever, re-ranker: never distinguished by color alone
    {"color": FIRST, "linestyle": "-", "marker": "o"},
    {"color": SECOND, "linestyle": "--", "marker": "s"},
)
SETTINGS = {
    "svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 11, "text.color": INK,
    "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "grid.color": RULE, "axes.grid": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "legend.frameon": False,
    "figure.constrained_layout.h_pad": 0.08, "hatch.linewidth": 0.6,
    "lines.markersize": 4, "axes.titlesize": 11, "axes.titleweight": "bold",
}  # fmt: skip
SIZE = (4.7, 3.2)  # inches of 72 units: about the width of a page column, so that font size 11 is legible

Axes = Any  # matplotlib.axes.Axes; matplotlib is an optional requirement


def matplotlib() -> Any:
    """Return the library; UserError if it cannot be imported."""
    return import_library("matplotlib", "requirements-tools.txt")


def plot(label: str, draw: Callable[[Axes], None]) -> str:
    """Return the SVG of what draw(axes) draws; `label` is its title and its text for screen readers."""
    with matplotlib().rc_context(SETTINGS):
        from matplotlib.figure import Figure  # without pyplot: no window system, no global state

        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot(title=label)
        draw(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator")))
    return inline_svg(file.getvalue(), label)


def inline_svg(svg: str, label: str) -> str:
    """Return the <svg> element alone, without prologue, metadata, size and ids that other plots also have."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    opening, rest = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', opening)
    assert box is not None
    for color, variable in COLORS.items():
        rest = rest.replace(color, variable)
    return f'<svg {box[0]} role="img" aria-label="{html.escape(label)}">{rest}'


def tick(value: float, _: int) -> str:
    """Return the label of a tick: the value itself, never an offset from another value."""
    return f"{value:.6g}"


def training(curves: Curves, stage: int, name: str) -> list[str]:
    """Return the plots of a model's training: loss, MRR@10 on dev, learning rate."""
    svgs = []
    for tag, title, unit in (
        ("train/loss", "training loss", "loss (mean since the last point)"),
        ("dev/MRR@10", "MRR@10 on dev during training", "MRR@10 (0 to 1)"),
        ("train/lr", "learning rate", "learning rate"),
    ):
        if points := curves.points.get(tag):
            best = curves.best_step if tag.startswith("dev/") else 0
            style = {**STYLES[stage], "linestyle": "-"}
            draw = partial(line, points=points, unit=unit, style=style, best=best)
            svgs.append(plot(f"{name}: {title}", draw))
    return svgs


def line(axes: Axes, points: dict[int, float], unit: str, style: dict[str, Any], best: int) -> None:
    """Draw a curve over the steps; a ring marks the step of the saved weights (0: none)."""
    markers = {} if len(points) <= 60 else {"marker": ""}
    axes.plot(list(points), list(points.values()), **{**style, **markers})
    axes.set(xlabel="step (updates of the weights)", ylabel=unit)
    axes.yaxis.set_major_formatter(tick)
    if best and best in points:
        axes.plot([best], [points[best]], "o", mfc="none", mec=INK, markersize=11,
                  label=f"saved: step {best:,}, {points[best]:.4f}")  # fmt: skip
        axes.legend(loc="lower right")


def hit_rate(rates: dict[str, list[float]]) -> str:
    """Return the plot of {stage: hit rate at k = 1, 2, ...}."""

    def draw(axes: Axes) -> None:
        for (name, values), style in zip(rates.items(), STYLES, strict=False):
            axes.plot(range(1, len(values) + 1), values, label=name, markevery=(0, 7), **style)
        top = len(next(iter(rates.values())))
        axes.set(xlabel="k (passages per query)", ylabel="hit rate (share of queries)",
                 xlim=(0, top + 1), ylim=(0, 1.02), xticks=[1, *range(10, top + 1, 10)])  # fmt: skip
        axes.legend(loc="lower right")

    return plot("Hit rate: a gold passage in the top k", draw)


def bars(axes: Axes, values: np.ndarray, edges: np.ndarray, color: str, **more: str) -> None:
    """Draw a histogram in percent of the values."""
    heights = 100 * np.histogram(values, edges)[0] / len(values)
    axes.stairs(heights, edges, fill=True, color=color, alpha=0.25, linewidth=0)
    axes.stairs(heights, edges, color=color, linewidth=1.6, **more)


def with_legend_above(axes: Axes, **labels: str) -> None:
    """Put the legend above the highest bar."""
    axes.set(ylim=(0, 1.3 * axes.get_ylim()[1]), **labels)
    axes.legend(loc="upper right")


def score_histogram(name: str, gold: Sequence[float], others: Sequence[float]) -> str:
    """Return the plot of a stage's scores: gold passages and the other candidates."""

    def draw(axes: Axes) -> None:
        edges = np.histogram_bin_edges([*gold, *others], 40)
        for scores, label, color, hatch in (
            (others, f"not gold ({len(others):,})", OTHER, ""),
            (gold, f"gold ({len(gold):,})", GOLD, "////"),
        ):
            if scores:
                bars(axes, np.array(scores), edges, color, label=label, hatch=hatch)
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter(tick)
        with_legend_above(axes, xlabel=f"score of the {name}", ylabel="% of the passages of this group")

    return plot(f"Scores of the {name}", draw)


def length_histogram(name: str, knob: str, lengths: Lengths) -> str:
    """Return the plot of the lengths of queries or passages, with the length limit of the model."""
    tokens = lengths.tokens
    top = int(max(np.percentile(tokens, 99), 1.15 * lengths.limit)) + 1
    step = max(1, round(top / 40))
    edges = np.arange(0, top + 2 * step, step)

    def draw(axes: Axes) -> None:
        bars(axes, np.minimum(tokens, edges[-1] - 1), edges, FIRST)
        label = f"{knob} = {lengths.limit}: {100 * lengths.truncated:.1f} % truncated"
        axes.axvline(lengths.limit, ymax=0.8, color=SECOND, linestyle="--", label=label)
        with_legend_above(axes, xlabel="tokens (with prefix and special tokens)", ylabel=f"% of the {name}")

    return plot(f"Lengths of {name}", draw)
