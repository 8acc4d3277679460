"""An ablation of training: a larger batch, mined and denoised negatives, distillation, one at a time.

    python script/bench/ablation.py --data_dir D --model M --cross_params C1 C2 --folder F --seeds 1 2 3
    python script/bench/ablation.py ... --queries 1000 --dev_queries 300      on a random subset
    python script/bench/ablation.py ... --queries 400 --whole_collection      fewer queries, all passages

Each recipe changes one thing, with the same number of updates, --hard_negatives (or as many as the training
file has) and seeds:

    base       --batch queries per update, the negatives of the data set
    batch      --large queries per update, in chunks (GradCache)
    mined      negatives sampled from the top --topk of the retriever of recipe `batch` (its first seed)
    denoised   without those that the first re-ranker scores at --max_score or more
    distilled_kl, distilled_mse
               on the rows of `denoised`, with a loss towards the mean of the re-rankers' logits

Runs the programs of the README; runs that are up to date are skipped. Prints dev MRR@10 over the whole
collection (of the subset), mean and standard deviation of each recipe; its difference from the recipe before
(of both distilled ones: from `denoised`) with a paired test; then a JSON line. The test is over the queries,
on each query's mean over the seeds: it says whether other queries would give the same sign, not whether
other seeds would; for these, look at how many of them agree.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root

import torch_src  # noqa: F401 (first: it reports missing packages)

# isort: split

import numpy as np

from metric.evaluation import load_reference, load_result, per_query
from script.lib.foreign_files import Counts
from script.lib.official_layout import OfficialLayoutWriter, Passage, Query
from script.lib.paired_test import compare
from script.run_all import call, conversion
from torch_src.data.collection import PassageCollection
from torch_src.data.formats import parse_dual_row
from torch_src.data.lines import read_lines
from torch_src.hparams import parse
from torch_src.inference_de_hparams import InferenceDeHparams
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import atomic_folder, read_json, write_json
from torch_src.runtime.program import exit_status

# recipe -> the one that it is compared with
BEFORE = {
    "base": None, "batch": "base", "mined": "batch", "denoised": "mined", "distilled_kl": "denoised",
    "distilled_mse": "denoised",
}  # fmt: skip
METRIC = "MRR@10"


def write_subset(source: Path, folder: Path, queries: int, dev_queries: int, whole: bool) -> None:
    """Write a random subset of a data set: its queries and their passages, or with `whole` all passages."""
    path, generator = source / "train/dual.train.tsv", np.random.default_rng(0)
    rows = [parse_dual_row(text, path, line) for line, text in read_lines(path)]
    texts = list(dict.fromkeys(row.query for row in rows))
    if queries > len(texts):
        raise UserError(f"--queries {queries}: {path} has {len(texts):,}")
    chosen = {texts[at] for at in generator.choice(len(texts), queries, replace=False)}
    dev = [json.loads(text) for _, text in read_lines(source / "dev/dev.json")][:dev_queries]
    pids: dict[str, str] = {}
    if whole:
        collection = PassageCollection(source / "passage-collection")
        pids = {text: f"p{row}" for row, text in enumerate(dict.fromkeys(collection[:]))}
    train: dict[str, Query] = {}
    for row in rows:
        if row.query in chosen:
            query = train.setdefault(row.query, Query(f"q{len(train)}", row.query))
            for grade, text in ((1, row.positive), (0, row.negative)):
                query.judge(pids.setdefault(text, f"p{len(pids)}"), grade, 1)
    dev_rows = []
    for entry in dev:
        answers = [paragraph["paragraph_text"] for paragraph in entry["answer_paragraphs"]]
        positives = [pids.setdefault(text, f"p{len(pids)}") for text in answers]
        grades = dict.fromkeys(positives, 1)
        dev_rows.append(Query(entry["question_id"], entry["question"], split="dev", grades=grades))
    with atomic_folder(folder) as unfinished:
        layout = OfficialLayoutWriter(unfinished, seed=0, counts=Counts())
        layout.write_collection(Passage(pid, "", text) for text, pid in pids.items())
        layout.write_queries([*train.values(), *dev_rows])


class Ablation:
    """The runs of all steps and seeds, each in its own folder."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.folder = args, Path(args.folder).resolve()
        self.data = Path(args.data_dir).resolve()
        if args.queries:
            subset, names = self.folder / "data", ("data_dir", "queries", "dev_queries", "whole_collection")
            wanted = {name: getattr(args, name) for name in names}
            if not subset.exists():
                write_subset(self.data, subset, args.queries, args.dev_queries, args.whole_collection)
                write_json(self.folder / "part.json", wanted)
            elif read_json(self.folder / "part.json") != wanted:
                raise UserError(f"{subset}: has another subset; name another --folder")
            self.data = subset
        self.files = ["--data_dir", str(self.data), "--threads", str(args.threads)]

    def output(self, recipe: str, seed: int) -> Path:
        return self.folder / f"{recipe}-{seed}"

    def options(self, recipe: str) -> list[str]:
        """Return the options of a recipe."""
        args = self.args
        words = ["--hard_negatives", str(args.hard_negatives)]
        if recipe == "base":
            return [*words, "--batch_size", str(args.batch)]
        words += ["--batch_size", str(args.large), "--grad_cache_chunk", str(args.chunk)]
        if recipe != "batch":
            mined = "mined" if recipe == "mined" else "denoised"
            words += ["--train_set", str(self.folder / mined / "dual.train.tsv")]
        if recipe.startswith("distilled"):
            words += ["--teacher", *map(str, self.teachers())]
            words += ["--distill_temperature", str(args.distill_temperature)]
        if recipe == "distilled_kl":
            words += ["--distill_loss", "kl"]
        if recipe == "distilled_mse":
            words += ["--distill_loss", "margin_mse", "--distill_weight", str(args.mse_weight)]
        return words

    def teachers(self) -> list[Path]:
        """Return the files of the re-rankers' scores of the denoised rows."""
        return [self.folder / f"teacher{at}.tsv" for at in range(1, 1 + len(self.args.cross_params))]

    def score(self) -> None:
        """Score the denoised rows with each re-ranker."""
        train_set = str(self.folder / "denoised/dual.train.tsv")
        for params, output in zip(self.args.cross_params, self.teachers(), strict=True):
            words = ["--train_set", train_set, "--cross_params", params, "--output", str(output)]
            call(["script/score_training_set.py", *words, "--threads", str(self.args.threads)])

    def train(self, recipe: str, seed: int) -> np.ndarray:
        """Train, search and evaluate; return the metric (queries,) of each dev query."""
        args, output = self.args, self.output(recipe, seed)
        call([
            "do_dual_train.py", *self.files, "--output_dir", str(output),
            "--pretrained_model_path", args.model,
            "--seed", str(seed), "--max_steps", str(args.steps), "--epoch", "1000", "--lr", str(args.lr),
            "--pooling", "mean", "--normalize", "--temperature", "0.02", "--share_encoder", "--dropout", "0",
            "--query_prefix", "query: ", "--passage_prefix", "passage: ", "--q_max_seq_len", "40",
            "--p_max_seq_len", str(args.p_max_seq_len), "--eval_every", "-1", *self.options(recipe),
        ])  # fmt: skip
        words = [*self.files, "--output_dir", str(output), "--topk", "50"]
        call(["do_dual_infer.py", *words])
        call(conversion(parse(InferenceDeHparams, words), output / "res.top50", 50))
        reference = load_reference(str(self.data / "dev/dev.json"))
        values = per_query(reference, load_result(str(output / "dual_res.json"))).values()
        return np.array([each[METRIC] for each in values])

    def mine(self, recipe: str) -> None:
        """Mine the training files of a recipe with the retriever of recipe `batch` and its first seed."""
        args = self.args
        more = ["--cross_params", args.cross_params[0], "--max_score", str(args.max_score)]
        call([
            "script/mine_negatives.py", *self.files,
            "--output_dir", str(self.output("batch", args.seeds[0])),
            "--mined_dir", str(self.folder / recipe), "--topk", str(args.topk), "--negatives", "4",
            "--select", "sample", *(more if recipe == "denoised" else []),
        ])  # fmt: skip

    def run(self) -> dict[str, np.ndarray]:
        """Return {recipe: dev metric (seeds, queries)}."""
        found: dict[str, np.ndarray] = {}
        for recipe in BEFORE:
            if recipe in ("mined", "denoised"):
                self.mine(recipe)
            if recipe == "distilled_kl":
                self.score()
            found[recipe] = np.stack([self.train(recipe, seed) for seed in self.args.seeds])
            print(f"{recipe}: {found[recipe].mean(axis=1).tolist()}", flush=True)
        return found


def parsed() -> argparse.Namespace:
    """Return the options."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("data_dir", "model", "folder"):
        options.add_argument(f"--{name}", required=True)
    options.add_argument("--cross_params", required=True, nargs="+", help="the first one denoises, all teach")
    options.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    for name, default in (
        ("steps", 40), ("batch", 4), ("large", 16), ("chunk", 8), ("topk", 30), ("queries", 0),
        ("dev_queries", 300), ("p_max_seq_len", 96), ("threads", 0), ("hard_negatives", 4),
    ):  # fmt: skip
        options.add_argument(f"--{name}", type=int, default=default)
    options.add_argument("--whole_collection", action="store_true")
    options.add_argument("--lr", type=float, default=5e-5)
    options.add_argument("--max_score", type=float, default=0.1)
    options.add_argument("--distill_temperature", type=float, default=2.0)
    options.add_argument("--mse_weight", type=float, default=0.1, help="--distill_weight of margin_mse")
    return options.parse_args()


def tests(found: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Return {recipe: its difference from the recipe before, and the seeds with a gain}."""
    tests = {}
    for recipe, before in BEFORE.items():
        if before:
            one, other = found[before], found[recipe]
            gains = int((other.mean(axis=1) > one.mean(axis=1)).sum())
            difference = compare(one.mean(axis=0), other.mean(axis=0))
            tests[recipe] = {"before": before, **dataclasses.asdict(difference), "seeds_better": gains}
    return tests


def table(found: dict[str, np.ndarray], tests: dict[str, dict[str, Any]], seeds: list[int]) -> list[str]:
    """Return the lines of both tables."""
    lines = [f"{'recipe':13} {'mean':>8} {'deviation':>10}   dev {METRIC} of seeds {seeds}"]
    for recipe, values in found.items():
        means = values.mean(axis=1).tolist()
        spread = statistics.stdev(means) if len(means) > 1 else 0.0
        each = "  ".join(f"{value:.4f}" for value in means)
        lines.append(f"{recipe:13} {statistics.mean(means):8.4f} {spread:10.4f}   {each}")
    names = f"{'difference':>10} {'95 % interval':>19} {'p':>7}  better/worse/same queries  better seeds"
    lines += ["", f"{'recipe':13} {'from':9} {names}"]
    for recipe, test in tests.items():
        queries = f"{test['better']}/{test['worse']}/{test['same']}"
        lines.append(
            f"{recipe:13} {test['before']:9} {test['mean']:+10.4f} [{test['low']:+.4f}, {test['high']:+.4f}] "
            f"{test['p']:7.4f}  {queries:25}  {test['seeds_better']} of {len(seeds)}"
        )
    return lines


def run(args: argparse.Namespace) -> None:
    """Run all steps and print the tables."""
    found = Ablation(args).run()
    compared = tests(found)
    print("\n" + "\n".join(table(found, compared, args.seeds)))
    means = {recipe: values.mean(axis=1).tolist() for recipe, values in found.items()}
    print(json.dumps({"bench": "ablation", **vars(args), METRIC: means, "tests": compared}))


if __name__ == "__main__":
    sys.exit(exit_status(lambda: run(parsed())))
