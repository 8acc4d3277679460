"""Learning curves of the cross-encoder: pairs seen against dev MRR@10, by loss, group size, rate and start.

    python script/bench/cross_curves.py --data_dir D --model M --folder F --cross_params C/cross_params.bin
    python script/bench/cross_curves.py ... --plot docs/cross_curves.svg            and draw them

Trains a dual encoder with the recipe few_queries, takes its results as dev candidates and mines negatives
from them. Then it trains cross-encoders with the same number of pairs in each update; each differs from the
first in one thing:

    listwise     groups of 8, started from the retriever, the head's rate ten times the others'
    pointwise    every pair by itself
    groups of N  one positive and N - 1 negatives
    one rate     the head has the rate of the other weights
    encoder      started from the pretrained encoder
    re-ranker    started from the trained re-ranker of --cross_params, head included

Each re-ranks the first --depth candidates of every dev query after every quarter of its updates. Runs that
are up to date are skipped. Prints a table of the curves' points, then a JSON line.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root

import torch_src  # noqa: F401 (first: it reports missing packages)

# isort: split

from metric.evaluation import compute_metrics, load_reference, load_result
from script.run_all import call, conversion
from torch_src.hparams import parse
from torch_src.inference_de_hparams import InferenceDeHparams
from torch_src.runtime.errors import UserError
from torch_src.runtime.libraries import import_library
from torch_src.runtime.program import exit_status
from torch_src.training.checkpoints import load_checkpoint

LR, HEAD_LR = 1e-4, 1e-3
EVALUATIONS = 4
ALL = 1_000_000
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#777777", "#e69f00", "#000000")  # Okabe and Ito
MARKERS = "os^vDXP"
LABELS = {
    "listwise": "listwise, groups of 8", "groups of 2": "listwise, groups of 2",
    "groups of 16": "listwise, groups of 16", "one rate": "8, head at the same rate",
    "encoder": "8, from the pretrained encoder", "re-ranker": "8, from a trained re-ranker",
}  # fmt: skip


def variants(pairs: int, reranker: str) -> dict[str, dict[str, Any]]:
    """Return the settings of each curve with `pairs` pairs in an update."""
    base = {"loss": "listwise", "group_size": 8, "groups_per_step": pairs // 8, "lr": LR, "head_lr": HEAD_LR}
    found = {
        "listwise": base,
        "pointwise": {**base, "loss": "pointwise", "batch_size": pairs},
        **{
            f"groups of {size}": {**base, "group_size": size, "groups_per_step": pairs // size}
            for size in (2, 16)
        },
        "one rate": {**base, "head_lr": 0.0},
        "encoder": {**base, "dual_params": "none"},
    }
    if reranker:
        found["re-ranker"] = {**base, "dual_params": "none", "cross_params": reranker}
    return found


class LearningCurves:
    """The runs of all variants and seeds, each in its own folder."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.folder = args, Path(args.folder).resolve()
        self.dual = self.folder / "dual"
        self.files = ["--data_dir", args.data_dir, "--threads", str(args.threads)]

    def prepare(self) -> float:
        """Train the retriever, search and mine; return its dev MRR@10."""
        args, output = self.args, ["--output_dir", str(self.dual)]
        call([
            "do_dual_train.py", *self.files, *output, "--recipe", "few_queries", "--pretrained_model_path",
            args.model, "--max_steps", str(args.dual_steps), "--eval_every", "-1", "--seed", "42",
        ])  # fmt: skip
        words = [*self.files, *output, "--topk", "50"]
        call(["do_dual_infer.py", *words])
        call(conversion(parse(InferenceDeHparams, words), self.dual / "res.top50", 50))
        call([
            "script/mine_negatives.py", *self.files, *output, "--topk", "50", "--negatives", "15",
            "--select", "sample",
        ])  # fmt: skip
        reference = load_reference(str(Path(args.data_dir) / "dev/dev.json"))
        return float(compute_metrics(reference, load_result(str(self.dual / "dual_res.json")))["MRR@10"])

    def train(self, name: str, settings: dict[str, Any], seed: int) -> dict[int, float]:
        """Train one cross-encoder; return pairs seen -> dev MRR@10."""
        args = self.args
        output = self.folder / f"{name.replace(' ', '_')}-{seed}"
        settings = {"dual_params": self.dual / "dual_params.bin", **settings}
        steps = args.pairs // args.batch
        call([
            "do_cross_train.py", *self.files, "--output_dir", str(output),
            "--pretrained_model_path", args.model, "--train_set", str(self.dual / "mined/cross.train.tsv"),
            "--dev_candidates", str(self.dual / "res.top50"), "--dev_queries", str(ALL),
            "--dev_depth", str(args.depth), "--eval_every", str(steps // EVALUATIONS),
            "--max_steps", str(steps), "--epoch", "1000", "--max_seq_len", str(args.max_seq_len),
            "--dropout", "0", "--seed", str(seed),
            *(word for knob, value in settings.items() for word in (f"--{knob}", str(value))),
        ])  # fmt: skip
        state = load_checkpoint(output / "cross_checkpoint.pt")
        if state is None:
            raise UserError(f"{output}: no checkpoint with the curve; delete the folder to train again")
        history = state["progress"]["history"]
        return {int(row["step"]) * args.batch: row["MRR@10"] for row in history if "MRR@10" in row}

    def run(self) -> tuple[float, dict[str, list[dict[int, float]]]]:
        """Return (the retriever's MRR@10, {variant: the curve of each seed})."""
        retriever = self.prepare()
        curves = {}
        for name, settings in variants(self.args.batch, self.args.cross_params).items():
            curves[name] = [self.train(name, settings, seed) for seed in self.args.seeds]
            print(f"{name}: {curves[name]}", flush=True)
        return retriever, curves


def mean_curve(curves: list[dict[int, float]]) -> dict[int, float]:
    """Return the mean of the seeds' curves."""
    return {pairs: statistics.mean(curve[pairs] for curve in curves) for pairs in curves[0]}


def draw(path: str, retriever: float, curves: dict[str, list[dict[int, float]]]) -> None:
    """Write the curves as a picture: means of the seeds; bars from the lowest to the highest, if several."""
    plt = import_library("matplotlib.pyplot", "requirements-demo.txt")
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "curves", "font.size": 10})
    figure, axes = plt.subplots(figsize=(7.6, 3.6), constrained_layout=True)
    for (name, seeds), color, marker in zip(curves.items(), COLORS, MARKERS, strict=False):
        mean = mean_curve(seeds)
        below = [value - min(curve[pairs] for curve in seeds) for pairs, value in mean.items()]
        above = [max(curve[pairs] for curve in seeds) - value for pairs, value in mean.items()]
        bars = (below, above) if len(seeds) > 1 else None
        line = {"color": color, "marker": marker, "markersize": 4, "label": LABELS.get(name, name)}
        axes.errorbar(list(mean), list(mean.values()), yerr=bars, capsize=2, **line)
    axes.axhline(retriever, color="#444444", linestyle="--", label="the retriever's order")
    axes.set(xlabel="pairs seen in training", ylabel="dev MRR@10, re-ranked")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.endswith("svg") else None)


def parsed() -> argparse.Namespace:
    """Return the options."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("data_dir", "model", "folder"):
        options.add_argument(f"--{name}", required=True)
    options.add_argument("--cross_params", default="", help="a re-ranker of other data to start from")
    options.add_argument("--plot", default="", help="write the curves to this .svg or .png file")
    options.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    for name, default in (
        ("pairs", 6400), ("batch", 32), ("dual_steps", 57), ("depth", 10), ("max_seq_len", 192),
        ("threads", 0),
    ):  # fmt: skip
        options.add_argument(f"--{name}", type=int, default=default)
    args = options.parse_args()
    if args.batch % 16:
        options.error("--batch: must be a multiple of 16, the largest group")
    return args


def run(args: argparse.Namespace) -> None:
    """Run all variants and print the table."""
    retriever, curves = LearningCurves(args).run()
    print(f"\ndev MRR@10 in the retriever's order: {retriever:.4f}; re-ranked, mean of seeds {args.seeds}:")
    points = list(next(iter(curves.values()))[0])
    print(f"{'pairs':14}" + "".join(f"{pairs:>9,}" for pairs in points))
    for name, seeds in curves.items():
        print(f"{name:14}" + "".join(f"{value:9.4f}" for value in mean_curve(seeds).values()))
    if args.plot:
        draw(args.plot, retriever, curves)
    print(json.dumps({"bench": "cross_curves", **vars(args), "retriever": retriever, "curves": curves}))


if __name__ == "__main__":
    sys.exit(exit_status(lambda: run(parsed())))
