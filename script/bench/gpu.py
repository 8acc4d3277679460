"""What one GPU does with the pipeline, against its ceilings and against other libraries, in a few minutes.

    python3 script/bench/gpu.py                                      # all sections, about 6 minutes
    python3 script/bench/gpu.py --sections search ivf --minutes 4
    python3 script/bench/gpu.py --sections train --profile train     # and where its time goes
    python3 script/bench/gpu.py --tiny --device cpu                  # toy sizes: does it run?

Sections: ceilings (matrix product, copies), train (an update of the official recipe: 512 queries, each with a
positive and a hard negative, BERT-base; against CachedMultipleNegativesRankingLoss), encode (against
SentenceTransformer.encode), rerank (against CrossEncoder.predict), search (exact, 8,096,668 x 768; against
blockwise torch and a flat faiss index on the GPU), ivf (faiss on the GPU against the CPU). Weights are
random, texts are cut from the sample data to the lengths of DuReader's.

Each section runs in a process of its own, within its part of the time, and ends with a table and a JSON line.
What does not fit into the time is reported as skipped. `ceiling` is the share of the measured rate of a
16-bit matrix product, operations counted on real tokens; `busy` needs the package nvidia-ml-py. The search
needs no store on disk; without faiss for GPUs its rows are skipped. --profile needs up to a minute more.
"""

import argparse
import os
import sys
import time
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path

STARTED = time.monotonic()  # importing the libraries counts as well
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root

import torch_src  # noqa: E402, F401 (first: it reports missing packages)

# before torch is imported: the sections fork, so this process must not use the GPU, and needs no network
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from script.bench import gpu_models, gpu_search  # noqa: E402
from script.bench.gpu_runs import TINY, Section, Sizes, run_sections  # noqa: E402

SECTIONS = {
    "ceilings": Section(gpu_models.ceilings, weight=6, least_seconds=5),
    "train": Section(gpu_models.train, weight=25, least_seconds=30),
    "encode": Section(gpu_models.encode, weight=16, least_seconds=20),
    "rerank": Section(gpu_models.rerank, weight=12, least_seconds=15),
    "search": Section(gpu_search.exact_search, weight=28, least_seconds=30),
    "ivf": Section(gpu_search.inverted_file, weight=20, least_seconds=30),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=6.0, help="for all of it")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument(
        "--profile", nargs="+", choices=list(SECTIONS), default=[], help="sections to profile"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, for a test of this program")
    parser.add_argument("--rows", type=int, help="vectors to search")
    parser.add_argument("--queries", type=int, nargs="+", help="numbers of queries to search")
    args = parser.parse_args()
    sizes = TINY if args.tiny else Sizes()
    changed = {"rows": args.rows, "queries": tuple(args.queries) if args.queries else None}
    sizes = replace(sizes, **{name: value for name, value in changed.items() if value})
    sections = {name: SECTIONS[name] for name in SECTIONS if name in args.sections}
    if args.tiny:
        sections = {name: replace(section, least_seconds=0) for name, section in sections.items()}
    if {"train", "encode", "rerank"} & set(sections):
        with suppress(ImportError):  # the peers are then reported as failed
            import_module("sentence_transformers")  # once for all sections, which fork from this process
    outcomes = run_sections(sections, sizes, args.device, STARTED + 60 * args.minutes, args.profile)
    print("\nours / best peer")
    for outcome in outcomes:
        for work, ratio in outcome.ratios().items():
            print(f"{outcome.section:10} {work:20} {ratio:8.3f}")
    failed = [outcome.section for outcome in outcomes if outcome.error]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
