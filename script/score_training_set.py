"""Score the rows of a training file with a re-ranker, which then teaches the retriever (distillation).

    python script/score_training_set.py --train_set T/dual.train.tsv --cross_params C/cross_params.bin \\
        --output a.tsv
    python do_dual_train.py --train_set T/dual.train.tsv --teacher a.tsv --distill_loss kl --hard_negatives 4

The training file is any in the format of dual.train.tsv, the re-ranker any that do_cross_train.py trained;
`--cross_params none --pretrained_model_path M` takes a folder or hub name. Several files, one of each
re-ranker, are averaged: `--teacher a.tsv b.tsv`. The output has a header, then the logits of the positive and
of the negative of each row. Each distinct (query, passage) pair is scored once; the same command resumes
after a kill, and does nothing when the output is up to date.
"""

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

from torch_src.hparams import NONE, PRECISIONS
from torch_src.inference_cross_hparams import InferenceCrossHparams
from torch_src.runtime.options import OptionParser, integer
from torch_src.runtime.program import exit_status

STAGE = "score_training_set"


def run(args: argparse.Namespace) -> None:
    """Score the pairs and write the file, unless it is up to date."""
    from torch_src.cross_infer import score_candidates  # here: --help takes no second
    from torch_src.data.candidates import training_pairs
    from torch_src.data.dual_training_set import DualTrainingSet
    from torch_src.data.mined_files import LOGITS, TRAIN_ROWS, format_logits
    from torch_src.inference import load_cross_model
    from torch_src.inference_plan import plan_reranking
    from torch_src.reranker import Reranker
    from torch_src.runtime.files import atomic_write, require
    from torch_src.runtime.locks import folder_lock
    from torch_src.runtime.log import log
    from torch_src.runtime.outputs import Output, check_outputs, never
    from torch_src.runtime.stamps import checksum_files, clear_stamp, up_to_date, write_stamp

    require(args.train_set, "training rows")
    inputs = [args.train_set, *(path for path in (args.cross_params,) if path != NONE)]
    check_outputs([Output(args.output, never, (STAGE,))], inputs)
    options = {name: value for name, value in vars(args).items() if name not in ("train_set", "output")}
    job = Reranker(InferenceCrossHparams(**options))
    stamp = {"stage": STAGE, **job.stamp(), TRAIN_ROWS: checksum_files([args.train_set])}
    if not (args.force or args.plan) and up_to_date(args.output, stamp, log):
        return log(f"{args.output}: up to date")
    data = DualTrainingSet(args.train_set)
    pairs, pair_of = training_pairs(data)
    log(f"{data.rows:,} training rows, {data.queries:,} distinct queries, {len(pairs):,} distinct pairs")
    if args.plan:
        plan = plan_reranking(job.scorer(load_cross_model(job.source, trained=False)), pairs, len(pairs))
        plan.program = Path(__file__).name
        return plan.report(str(Path(args.output).parent), job.device)
    scores = Path(f"{args.output}.scores")
    with folder_lock(scores, name="scoring.lock"):
        logits = score_candidates(job, pairs, scores, stamp)
        clear_stamp(args.output)
        with atomic_write(args.output) as file:
            file.write("\t".join(LOGITS) + "\n")
            file.writelines(format_logits(*row) for row in logits[pair_of].tolist())
        write_stamp(args.output, stamp)
        shutil.rmtree(scores)
    log(f"wrote {args.output}: logits from {logits.min():.2f} to {logits.max():.2f}")


def main(argv: list[str]) -> int:
    """Return the exit status."""
    parser = OptionParser(__doc__)
    add = parser.add_argument
    add("--train_set", required=True, help="training rows, in the format of dual.train.tsv")
    add("--cross_params", required=True, help="trained weights; none: those of --pretrained_model_path")
    add("--output", required=True, help="file to write")
    add("--pretrained_model_path", help="folder or hub name; unset: as trained")
    add("--passage_windows", type=integer(1, 10**4), default=1, help="as of do_cross_infer.py")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--precision", choices=PRECISIONS, default="auto", help="of the model")
    add("--threads", type=integer(0, 4096), default=0, help="CPU threads; 0: torch's default")
    add("--plan", action="store_true", help="print time, memory and disk from a short probe, then exit")
    add("--force", action="store_true", help="score again even if the output is up to date")
    args = parser.parse_args(argv)
    return exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
