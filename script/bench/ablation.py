"""The ladder of training, rung by rung: what a larger batch, mined and denoised negatives, distillation add.

    python script/bench/ablation.py --data_dir D --model M --cross_params C --folder F --seeds 1 2 3
    python script/bench/ablation.py ... --queries 1000 --dev_queries 300      a part of the data set, drawn
    python script/bench/ablation.py ... --queries 400 --whole_collection      fewer queries, every passage

Every rung keeps what the one before added, and has the same number of updates and the same seeds:

    base       --batch queries an update, the data set's own negatives
    batch      --large queries an update, in chunks (GradCache)
    mined      negatives found by the retriever of rung `batch` (its first seed), drawn from its first --topk
    denoised   without those that the re-ranker gives --max_score or more
    distilled  the re-ranker's scores are learnt beside (KL)

The programs are those of the README; a run that is there already is not made again. Prints dev MRR@10 over
the whole collection (of the part), mean and standard deviation of each rung, and last a JSON line.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run by path: the root is not on it

import numpy as np

from metric.evaluation import compute_metrics, load_reference, load_result
from script.lib.official_layout import OfficialLayoutWriter, Query
from script.run_all import call, convert
from torch_src.data.collection import PassageCollection
from torch_src.data.formats import parse_dual_row
from torch_src.data.lines import read_lines
from torch_src.hparams import parse
from torch_src.inference_de_hparams import InferenceDeHparams
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import read_json, write_json
from torch_src.runtime.program import exit_status

RUNGS = ("base", "batch", "mined", "denoised", "distilled")


def make_part(source: Path, folder: Path, queries: int, dev_queries: int, whole: bool) -> None:
    """Write a part of a data set: so many training and dev queries, and the passages that they name (`whole`:
    every passage).
    """
    path, draw = source / "train/dual.train.tsv", np.random.default_rng(0)
    rows = [parse_dual_row(text, path, line) for line, text in read_lines(path)]
    texts = list(dict.fromkeys(row.query for row in rows))
    if queries > len(texts):
        raise UserError(f"--queries {queries}: {path} has {len(texts):,}")
    chosen = {texts[at] for at in draw.choice(len(texts), queries, replace=False)}
    dev = [json.loads(text) for _, text in read_lines(source / "dev/dev.json")][:dev_queries]
    pids: dict[str, str] = {}
    if whole:
        collection = PassageCollection(source / "passage-collection")
        pids = {text: f"p{row}" for row, text in enumerate(dict.fromkeys(collection[:]))}
    found: dict[str, Query] = {}
    for row in rows:
        if row.query in chosen:
            query = found.setdefault(row.query, Query(f"q{len(found)}", row.query))
            for text, listed in ((row.positive, query.positives), (row.negative, query.negatives)):
                pid = pids.setdefault(text, f"p{len(pids)}")
                if pid not in listed:
                    listed.append(pid)
    asked = []
    for entry in dev:
        answers = [paragraph["paragraph_text"] for paragraph in entry["answer_paragraphs"]]
        own = [pids.setdefault(text, f"p{len(pids)}") for text in answers]
        asked.append(Query(entry["question_id"], entry["question"], own, split="dev"))
    layout = OfficialLayoutWriter(folder, seed=0)
    layout.write_collection((pid, "", text) for text, pid in pids.items())
    layout.write_queries([*found.values(), *asked])
    layout.finish()


class Ladder:
    """The runs of all rungs and seeds, each in a folder of its own."""

    def __init__(self, given):
        self.given, self.folder = given, Path(given.folder).resolve()
        self.data = Path(given.data_dir).resolve()
        if given.queries:
            part, names = self.folder / "data", ("data_dir", "queries", "dev_queries", "whole_collection")
            wanted = {name: getattr(given, name) for name in names}
            if not part.exists():
                make_part(self.data, part, given.queries, given.dev_queries, given.whole_collection)
                write_json(self.folder / "part.json", wanted)
            elif read_json(self.folder / "part.json") != wanted:
                raise UserError(f"{part}: another part than the one asked for; name another --folder")
            self.data = part
        self.files = ["--data_dir", str(self.data), "--threads", str(given.threads)]

    def output(self, rung: str, seed: int) -> Path:
        return self.folder / f"{rung}-{seed}"

    def options(self, rung: str) -> list[str]:
        """Return the knobs of a rung."""
        given, at = self.given, RUNGS.index(rung)
        words = ["--batch_size", str(given.large if at else given.batch)]
        words += ["--hard_negatives", str(given.hard_negatives)]
        if at:
            words += ["--grad_cache_chunk", str(given.chunk)]
        if at >= 2:
            words += [
                "--train_set",
                str(self.folder / ("mined" if at == 2 else "denoised") / "dual.train.tsv"),
            ]
        return words + (["--distill_loss", "kl"] if rung == "distilled" else [])

    def train(self, rung: str, seed: int) -> float:
        """Train, search, score; return dev MRR@10."""
        given, output = self.given, self.output(rung, seed)
        call([
            "do_dual_train.py", *self.files, "--output_dir", str(output),
            "--pretrained_model_path", given.model,
            "--seed", str(seed), "--max_steps", str(given.steps), "--epoch", "1000", "--lr", str(given.lr),
            "--pooling", "mean", "--normalize", "--temperature", "0.02", "--share_encoder", "--dropout", "0",
            "--query_prefix", "query: ", "--passage_prefix", "passage: ", "--q_max_seq_len", "40",
            "--p_max_seq_len", str(given.p_max_seq_len), "--eval_every", "-1", *self.options(rung),
        ])  # fmt: skip
        words = [*self.files, "--output_dir", str(output), "--topk", "50"]
        call(["do_dual_infer.py", *words])
        convert(parse(InferenceDeHparams, words), output / "res.top50", 50)
        reference = load_reference(str(self.data / "dev/dev.json"))
        return compute_metrics(reference, load_result(str(output / "dual_res.json")))["MRR@10"]

    def mine(self, rung: str) -> None:
        """Mine what the rung trains on, by the retriever of rung `batch` and its first seed."""
        given = self.given
        more = ["--cross_params", given.cross_params, "--max_score", str(given.max_score)]
        call([
            "script/mine_negatives.py", *self.files,
            "--output_dir", str(self.output("batch", given.seeds[0])),
            "--mined_dir", str(self.folder / rung), "--topk", str(given.topk), "--negatives", "4",
            "--select", "sample", *(more if rung == "denoised" else []),
        ])  # fmt: skip

    def run(self) -> dict[str, list[float]]:
        """Return {rung: dev MRR@10 of each seed}."""
        found: dict[str, list[float]] = {}
        for rung in RUNGS:
            if rung in ("mined", "denoised"):
                self.mine(rung)
            found[rung] = [self.train(rung, seed) for seed in self.given.seeds]
            print(f"{rung}: {found[rung]}", flush=True)
        return found


def parsed() -> argparse.Namespace:
    """Return the options."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("data_dir", "model", "cross_params", "folder"):
        options.add_argument(f"--{name}", required=True)
    options.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    for name, default in (
        ("steps", 40), ("batch", 4), ("large", 16), ("chunk", 8), ("topk", 30), ("queries", 0),
        ("dev_queries", 300), ("p_max_seq_len", 96), ("threads", 0), ("hard_negatives", 1),
    ):  # fmt: skip
        options.add_argument(f"--{name}", type=int, default=default)
    options.add_argument("--whole_collection", action="store_true")
    options.add_argument("--lr", type=float, default=5e-5)
    options.add_argument("--max_score", type=float, default=0.1)
    return options.parse_args()


def run(given: argparse.Namespace) -> None:
    """Run the ladder and print its table."""
    found = Ladder(given).run()
    print(f"\n{'rung':10} {'mean':>8} {'deviation':>10}   dev MRR@10 of seeds {given.seeds}")
    for rung, values in found.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        each = "  ".join(f"{value:.4f}" for value in values)
        print(f"{rung:10} {statistics.mean(values):8.4f} {spread:10.4f}   {each}")
    print(json.dumps({"bench": "ablation", **vars(given), "MRR@10": found}))


if __name__ == "__main__":
    sys.exit(exit_status(lambda: run(parsed())))
