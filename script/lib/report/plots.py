"""Plots of script/report.py: inline SVG by matplotlib, in colours that follow the page (light or dark)."""

import html
import io
import re
from collections.abc import Callable
from functools import partial

import numpy as np

from script.lib.report.curves import Curves, Lengths
from torch_src.runtime.errors import UserError

# Written by matplotlib as they are, and put into the page's words: so the plots follow its colours.
INK, RULE = "#010203", "#040506"
FIRST, SECOND = "#0072b2", "#d55e00"  # Okabe and Ito's blue and vermilion: told apart by the colour-blind
GOLD, OTHER = "#009e73", "#777777"  # their green, hatched, and a grey
COLOURS = {INK: "currentColor", RULE: "var(--rule)", FIRST: "var(--first)", SECOND: "var(--second)",
           GOLD: "var(--gold)", OTHER: "var(--soft)"}  # fmt: skip
STYLES = (  # of the retriever, of the re-ranker: never by colour alone
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
SIZE = (4.7, 3.2)  # inches of 72 units each: about as wide as a column of the page, so that 11 is legible


def matplotlib():
    """Return the library; UserError when it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError(
            "matplotlib is not installed: python -m pip install -r requirements-tools.txt"
        ) from None
    return matplotlib


def plot(label: str, draw: Callable) -> str:
    """Return the SVG of what draw(axes) draws; `label` is its title, and what a screen reader says."""
    with matplotlib().rc_context(SETTINGS):
        from matplotlib.figure import Figure  # without pyplot: no window system, no global state

        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot(title=label)
        draw(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator")))
    return as_part_of_a_page(file.getvalue(), label)


def as_part_of_a_page(svg: str, label: str) -> str:
    """Return the <svg> element alone: no prologue, metadata, size or names that other plots have, too."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    opening, rest = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', opening)[0]
    for colour, word in COLOURS.items():
        rest = rest.replace(colour, word)
    return f'<svg {box} role="img" aria-label="{html.escape(label)}">{rest}'


def short(value: float, _) -> str:
    """Return what stands at a tick: the value itself, never an offset from another one."""
    return f"{value:.6g}"


def training(curves: Curves, stage: int, name: str) -> list[str]:
    """Return the plots of a model's training: loss, MRR@10 on dev, learning rate."""
    drawn = []
    for tag, title, unit in (
        ("train/loss", "training loss", "loss (mean since the last point)"),
        ("dev/MRR@10", "MRR@10 on dev while training", "MRR@10 (0 to 1)"),
        ("train/lr", "learning rate", "learning rate"),
    ):
        if points := curves.points.get(tag):
            kept = curves.best_step if tag.startswith("dev/") else 0
            style = {**STYLES[stage], "linestyle": "-"}
            drawn.append(
                plot(f"{name}: {title}", partial(line, points=points, unit=unit, style=style, kept=kept))
            )
    return drawn


def line(axes, points: dict[int, float], unit: str, style: dict, kept: int) -> None:
    """Draw a curve over the steps; the step whose weights were kept (0: none) is ringed."""
    markers = {} if len(points) <= 60 else {"marker": ""}
    axes.plot(list(points), list(points.values()), **{**style, **markers})
    axes.set(xlabel="step (updates of the weights)", ylabel=unit)
    axes.yaxis.set_major_formatter(short)
    if kept and kept in points:
        axes.plot([kept], [points[kept]], "o", mfc="none", mec=INK, markersize=11,
                  label=f"kept: step {kept:,}, {points[kept]:.4f}")  # fmt: skip
        axes.legend(loc="lower right")


def hit_rate(curves: dict[str, list[float]]) -> str:
    """Return the plot of {stage: hit rate at k = 1, 2, ...}."""

    def draw(axes) -> None:
        for (name, values), style in zip(curves.items(), STYLES, strict=False):
            axes.plot(range(1, len(values) + 1), values, label=name, markevery=(0, 7), **style)
        top = len(next(iter(curves.values())))
        axes.set(xlabel="k (passages looked at)", ylabel="hit rate (share of queries)",
                 xlim=(0, top + 1), ylim=(0, 1.02), xticks=[1, *range(10, top + 1, 10)])  # fmt: skip
        axes.legend(loc="lower right")

    return plot("Hit rate: a gold passage among the first k", draw)


def bars(axes, values: np.ndarray, edges: np.ndarray, colour: str, **more) -> None:
    """Draw a histogram in per cent of the values."""
    heights = 100 * np.histogram(values, edges)[0] / len(values)
    axes.stairs(heights, edges, fill=True, color=colour, alpha=0.25, linewidth=0)
    axes.stairs(heights, edges, color=colour, linewidth=1.6, **more)


def with_legend_above(axes, **labels: str) -> None:
    """Put the legend where no bar reaches."""
    axes.set(ylim=(0, 1.3 * axes.get_ylim()[1]), **labels)
    axes.legend(loc="upper right")


def score_histogram(name: str, positives: list[float], negatives: list[float]) -> str:
    """Return the plot of a stage's scores of gold passages and of the other candidates."""

    def draw(axes) -> None:
        edges = np.histogram_bin_edges([*positives, *negatives], 40)
        for scores, label, colour, hatch in (
            (negatives, f"not gold ({len(negatives):,})", OTHER, ""),
            (positives, f"gold ({len(positives):,})", GOLD, "////"),
        ):
            if scores:
                bars(axes, np.array(scores), edges, colour, label=label, hatch=hatch)
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter(short)
        with_legend_above(axes, xlabel=f"score of the {name}", ylabel="% of the passages of that kind")

    return plot(f"Scores of the {name}", draw)


def length_histogram(name: str, knob: str, lengths: Lengths) -> str:
    """Return the plot of the lengths of queries or passages, with the limit that the model cuts at."""
    tokens = lengths.tokens
    top = int(max(np.percentile(tokens, 99), 1.15 * lengths.limit)) + 1
    step = max(1, round(top / 40))
    edges = np.arange(0, top + 2 * step, step)

    def draw(axes) -> None:
        bars(axes, np.minimum(tokens, edges[-1] - 1), edges, FIRST)
        label = f"{knob} = {lengths.limit}: {100 * lengths.cut:.1f} % are cut"
        axes.axvline(lengths.limit, ymax=0.8, color=SECOND, linestyle="--", label=label)
        with_legend_above(axes, xlabel="tokens, prefix and special ones included", ylabel=f"% of the {name}")

    return plot(f"Lengths of {name}", draw)
