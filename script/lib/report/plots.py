"""Plots of the report: inline SVG by matplotlib, in colors that follow the page (light or dark)."""

import html
import io
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from script.lib.report.curves import Curves, Lengths
from script.lib.report.words import Both, escaped, same, text
from torch_src.runtime.libraries import import_library

# matplotlib writes these colors; COLORS replaces them with CSS variables of the page.
INK, RULE = "#010203", "#040506"
FIRST, SECOND = "#0072b2", "#d55e00"  # blue and vermilion of Okabe and Ito, safe for color-blind readers
GOLD, OTHER = "#009e73", "#777777"  # their green, hatched, and a gray
COLORS = {INK: "currentColor", RULE: "var(--rule)", FIRST: "var(--first)", SECOND: "var(--second)",
          GOLD: "var(--gold)", OTHER: "var(--soft)"}  # fmt: skip
STYLES: tuple[dict[str, Any], ...] = (  # of the stages: never distinguished by color alone
    {"color": FIRST, "linestyle": "-", "marker": "o"},
    {"color": SECOND, "linestyle": "--", "marker": "s"},
    {"color": GOLD, "linestyle": "-.", "marker": "^"},
    {"color": OTHER, "linestyle": ":", "marker": "D"},
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
SMALL = (3.1, 1.9)

Axes = Any  # matplotlib.axes.Axes; matplotlib is an optional requirement


def matplotlib() -> Any:
    """Return the library; UserError if it cannot be imported."""
    return import_library("matplotlib", "requirements-demo.txt")


class Words:
    """The texts of a plot: matplotlib draws the English ones, the page gets both languages."""

    def __init__(self) -> None:
        self.known: dict[str, Both] = {}

    def __call__(self, word: Both) -> str:
        self.known[escaped(word.en)] = word
        return word.en

    def translate(self, svg: str) -> str:
        """Return the SVG with both languages in its <text> elements."""
        return re.sub(r">([^<>]+)</text>", self._pair, svg)

    def _pair(self, match: re.Match[str]) -> str:
        word = self.known.get(escaped(html.unescape(match[1])))
        return f">{text(word).replace('span', 'tspan')}</text>" if word else match[0]


def plot(label: Both, draw: Callable[[Axes, Words], None], size: tuple[float, float] = SIZE) -> str:
    """Return the SVG of what draw(axes, words) draws; `label` is its title, and its text when read aloud."""
    words = Words()
    with matplotlib().rc_context(SETTINGS):
        from matplotlib.figure import Figure  # without pyplot: no window system, no global state

        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot(title=words(label))
        draw(axes, words)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator")))
    return words.translate(inline_svg(file.getvalue(), label.en))


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


def training(curves: Curves, stage: int, name: Both) -> list[str]:
    """Return the plots of a model's training: loss, MRR@10 on dev, and, small, the learning rate."""
    svgs = []
    for tag, title, unit in (
        (
            "train/loss",
            Both("training loss", "训练损失"),
            Both("loss (mean since the last point)", "损失（上一点以来的均值）"),
        ),
        ("dev/MRR@10", Both("MRR@10 on dev during training", "训练中开发集 MRR@10"), same("MRR@10 (0 to 1)")),
        ("train/lr", Both("learning rate", "学习率"), same("")),
    ):
        if points := curves.points.get(tag):
            best = curves.best_step if tag.startswith("dev/") else 0
            style = {**STYLES[stage], "linestyle": "-"}
            draw = partial(line, points=points, unit=unit, style=style, best=best)
            label = Both(f"{name.en}: {title.en}", f"{name.zh}：{title.zh}")
            svgs.append(plot(label, draw, SMALL if tag == "train/lr" else SIZE))
    return svgs


def line(
    axes: Axes, words: Words, points: dict[int, float], unit: Both, style: dict[str, Any], best: int
) -> None:
    """Draw a curve over the steps; a ring marks the step of the saved weights (0: none)."""
    markers = {} if len(points) <= 60 else {"marker": ""}
    axes.plot(list(points), list(points.values()), **{**style, **markers})
    axes.set(xlabel=words(Both("step (updates of the weights)", "步（权重更新次数）")), ylabel=words(unit))
    axes.yaxis.set_major_formatter(tick)
    if best and best in points:
        saved = f"{best:,}, {points[best]:.4f}"
        label = words(Both(f"saved: step {saved}", f"保存：第 {saved.replace(', ', ' 步，')}"))
        axes.plot([best], [points[best]], "o", mfc="none", mec=INK, markersize=11, label=label)
        axes.legend(loc="lower right")


def hit_rate(rates: dict[Both, list[float]]) -> str:
    """Return the plot of {stage: hit rate at k = 1, 2, ...}."""

    def draw(axes: Axes, words: Words) -> None:
        for (name, values), style in zip(rates.items(), STYLES, strict=False):
            axes.plot(range(1, len(values) + 1), values, label=words(name), markevery=(0, 7), **style)
        top = len(next(iter(rates.values())))
        axes.set(xlabel=words(Both("k (passages per query)", "k（每个问题的段落数）")),
                 ylabel=words(Both("hit rate (share of queries)", "命中率（问题的比例）")),
                 xlim=(0, top + 1), ylim=(0, 1.02), xticks=[1, *range(10, top + 1, 10)])  # fmt: skip
        axes.legend(loc="lower right")

    return plot(Both("Hit rate: a gold passage in the top k", "命中率：前 k 个里有正例"), draw)


def bars(axes: Axes, values: np.ndarray, edges: np.ndarray, color: str, **more: str) -> None:
    """Draw a histogram in percent of the values."""
    heights = 100 * np.histogram(values, edges)[0] / len(values)
    axes.stairs(heights, edges, fill=True, color=color, alpha=0.25, linewidth=0)
    axes.stairs(heights, edges, color=color, linewidth=1.6, **more)


def with_legend_above(axes: Axes, **labels: str) -> None:
    """Put the legend above the highest bar."""
    axes.set(ylim=(0, 1.3 * axes.get_ylim()[1]), **labels)
    axes.legend(loc="upper right")


def score_histogram(name: Both, gold: Sequence[float], others: Sequence[float]) -> str:
    """Return the plot of a stage's scores: gold passages and the other candidates."""

    def draw(axes: Axes, words: Words) -> None:
        edges = np.histogram_bin_edges([*gold, *others], 40)
        for scores, label, color, hatch in (
            (others, Both("not gold", "非正例"), OTHER, ""),
            (gold, Both("gold", "正例"), GOLD, "////"),
        ):
            if scores:
                counted = words(label + same(f" ({len(scores):,})"))
                bars(axes, np.array(scores), edges, color, label=counted, hatch=hatch)
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter(tick)
        share = Both("% of the passages of this group", "占本组段落的 %")
        score = Both("score", "分数")
        with_legend_above(axes, xlabel=words(score), ylabel=words(share))

    return plot(Both(f"Scores: {name.en}", f"分数：{name.zh}"), draw)


def length_histogram(name: Both, knob: str, lengths: Lengths) -> str:
    """Return the plot of the lengths of queries or passages, with the length limit of the model."""
    tokens = lengths.tokens
    top = int(max(np.percentile(tokens, 99), 1.15 * lengths.limit)) + 1
    step = max(1, round(top / 40))
    edges = np.arange(0, top + 2 * step, step)

    def draw(axes: Axes, words: Words) -> None:
        bars(axes, np.minimum(tokens, edges[-1] - 1), edges, FIRST)
        share = f"{knob} = {lengths.limit}: {100 * lengths.truncated:.1f} % "
        label = words(Both(f"{share}truncated", f"{share}被截断"))
        axes.axvline(lengths.limit, ymax=0.8, color=SECOND, linestyle="--", label=label)
        with_legend_above(
            axes, xlabel=words(Both("tokens (without the prefix)", "token 数（不含前缀）")),
            ylabel=words(Both(f"% of the {name.en}", f"占{name.zh}的 %")),
        )  # fmt: skip

    return plot(Both(f"Lengths of {name.en}", f"{name.zh}长度"), draw)
