"""Both stages on the sample collection and one table; `sh script/quickstart.sh` installs the packages first.

    python script/quickstart.py [--seed 42]

BM25, search with the sample's encoder before training, then the stages of `run_all.py --debug`, and the
fusion of both stages. The programs run one after the other in this process, so that torch is imported once.
Writes to output/debug.
"""

import runpy
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

from script import run_all
from torch_src import hparams
from torch_src.inference_de_hparams import InferenceDeHparams
from torch_src.runtime.commands import command
from torch_src.runtime.files import from_root
from torch_src.runtime.log import duration
from torch_src.runtime.options import OptionParser, seed
from torch_src.runtime.program import exit_status

# Of both stages in the fusion; chosen on 126 training queries set aside (504 to train): see dev/LOG.md.
WEIGHTS = ("1", "1")
TESTS = (("dual encoder", "re-ranked"), ("dual encoder", "fused"), ("re-ranked", "fused"))


def call(words: list[str]) -> None:
    """Run a program in this process; SystemExit if it fails."""
    sys.argv = [str(run_all.ROOT / words[0]), *words[1:]]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise


def section(title: str) -> None:
    print(f"\n== {title}", flush=True)


def run(training_seed: int) -> None:
    """Run all steps and print the table."""
    start = time.monotonic()
    hp = hparams.parse(InferenceDeHparams, ["--debug"])
    out = Path(hp.output_dir)
    bm25, zero_shot, fused = (out / name for name in ("bm25", "zero_shot", "fused"))
    section("1/4 BM25, for comparison")
    data = ["--data_dir", hp.data_dir, "--index", str(bm25)]
    call(["script/bm25.py", "index", *data])
    call(["script/bm25.py", "search", *data, "--run", str(bm25 / "res.top50")])
    call(run_all.conversion(hp, bm25 / "res.top50", run_all.TOPK))
    section("2/4 the encoder before training, for comparison")
    untrained = ["--dual_params", "none", "--pretrained_model_path", from_root(hparams.TINY_ENCODER)]
    call(["do_dual_infer.py", "--debug", *untrained, "--output_dir", str(zero_shot)])
    call(run_all.conversion(hp, zero_shot / "res.top50", run_all.TOPK))
    section("3/4 train the retriever, search, train the re-ranker, re-rank")
    run_all.run(["--debug", "--seed", str(training_seed)], call)
    section("4/4 fuse both stages: a weighted sum of their scores")
    runs = ["--runs", str(out / "res.top50"), str(out / "res.rerank50"), "--weights", *WEIGHTS]
    call(["script/bm25.py", "fuse", *runs, "--run", str(fused / "res.top50")])
    call(run_all.conversion(hp, fused / "res.top50", run_all.TOPK))
    print()
    results = {
        "BM25": bm25 / "dual_res.json",
        "encoder before training": zero_shot / "dual_res.json",
        "dual encoder": out / "dual_res.json",
        "re-ranked": out / "cross_res.json",
        "fused": fused / "dual_res.json",
    }
    tests = [word for pair in TESTS for word in ("--test", *pair)]
    table = [f"{name}={path}" for name, path in results.items()]
    call(["script/show_metrics.py", f"{hp.data_dir}/dev/dev.json", *table, *tests])
    print(f"\ndone in {duration(time.monotonic() - start)}")
    print(f"look at it:    {command('script/report.py', '--debug')}    writes {out}/report.html")
    print(f"ask it:        {command('script/demo.py', '--debug')}      serves http://127.0.0.1:7860")


def main(argv: list[str]) -> int:
    """Return the exit status."""
    parser = OptionParser(__doc__)
    parser.add_argument("--seed", type=seed, default=42, help="of training")
    args = parser.parse_args(argv)
    return exit_status(lambda: run(args.seed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
