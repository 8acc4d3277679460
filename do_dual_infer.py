"""Encode queries and passages and search: output/dual_params.bin -> output/res.top50.

    CUDA_VISIBLE_DEVICES=0 nohup python3 do_dual_infer.py > process_do_dual_infer.log 2>&1 &
    python do_dual_infer.py --debug        # seconds on a CPU, after do_dual_train.py --debug

Settings: torch_src/inference_de_hparams.py, or `--name value`; `--help` lists them.
"""

import sys

from torch_src.hparams import parse
from torch_src.inference_de_hparams import InferenceDeHparams
from torch_src.runtime.program import exit_with


def enter(topk: int = 50, bs: int = 1000) -> int:
    """Keep topk passages per query, search bs queries at once; the options --topk and --bs win."""
    parse(InferenceDeHparams, sys.argv[1:])  # --help and errors come before the slow imports
    from torch_src import dual_infer

    return dual_infer.main(sys.argv[1:], topk=topk, bs=bs)


if __name__ == "__main__":
    exit_with(lambda: enter(topk=50, bs=1000))
