"""Distill a small encoder for both stages: fewer layers, fewer neurons, a smaller vocabulary.

    python script/distill_encoder.py --teacher intfloat/multilingual-e5-small --pooling mean --normalize \\
        --query_prefix "query: " --passage_prefix "passage: " --data_dir D1 D2 --to output/small_encoder

The teacher is any BERT-like encoder that the programs load, by folder or hub name. The data folders have the
official layout: their passages are the texts, their training questions (train/dual.train.tsv, where there is
one) teach it to rank. Dev queries are not read. The result is a model folder for do_dual_train.py,
do_dual_infer.py, do_cross_train.py and do_cross_infer.py, and for sentence-transformers: a retriever (mean
pooling, vectors of length 1, the teacher's prefixes) and, with questions, a re-ranker (a head of one logit).

--student continues from an earlier result. The teacher's vectors and checkpoints are kept in TO.work: the
same command resumes. Delete that folder when the result is good.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

from torch_src.hparams import POOLINGS
from torch_src.runtime.options import OptionParser, integer, number, positive_int, seed
from torch_src.runtime.program import exit_status


def layer_numbers(text: str) -> list[int]:
    """Return the numbers of `0,5,11`."""
    return [integer(0)(number) for number in text.split(",")]


def run(args: argparse.Namespace) -> None:
    """Distill and write the folder."""
    from script.lib.distill import distill  # here: --help takes no second

    distill(args)


def main(argv: list[str]) -> int:
    """Return the exit status."""
    parser = OptionParser(__doc__)
    add = parser.add_argument
    add("--teacher", required=True, help="folder or hub name")
    add("--data_dir", required=True, nargs="+", help="data folders of the official layout")
    add("--to", type=Path, required=True, help="folder of the result")
    add(
        "--student",
        default="",
        help="continue from this folder; --layers, --neurons and --vocab_size are its own",
    )
    add("--layers", type=layer_numbers, default=[0, 5, 11], help="of the teacher, from 0: 0,5,11")
    add("--neurons", type=positive_int, default=512, help="in the feed-forward network of a layer")
    add("--vocab_size", type=integer(0), default=7500, help="tokens; 0: the teacher's vocabulary")
    add(
        "--fold_characters",
        default="",
        help="file `character TAB replacement`, such as OpenCC's",
    )
    add("--pooling", choices=POOLINGS, help="of the teacher, where its folder does not state it")
    add("--normalize", action="store_true", default=None, help="the teacher's vectors have length 1")
    add("--query_prefix", help="of teacher and student")
    add("--passage_prefix", help="of teacher and student")
    add("--max_seq_len", type=positive_int, default=192, help="tokens of a text, and of a pair")
    add("--passages", type=integer(0), default=0, help="random passages of each data folder; 0: all")
    add("--steps", type=positive_int, default=700, help="updates")
    add("--lr", type=number(1e-9), default=5e-4, help="peak learning rate; the head has twice as much")
    add(
        "--documents",
        type=positive_int,
        default=40,
        help="passages in an update, with their clauses and spans",
    )
    add("--questions", type=integer(0), default=16, help="questions in an update; 0: vectors only")
    add(
        "--group_size",
        type=integer(2),
        default=4,
        help="passages of a question: a positive, the rest negatives",
    )
    add("--window", type=positive_int, default=160, help="characters of a ranked passage")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--threads", type=integer(0, 4096), default=0, help="CPU threads; 0: torch's default")
    add("--seed", type=seed, default=42, help="of the draws")
    args = parser.parse_args(argv)
    return exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
