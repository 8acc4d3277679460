"""Train the cross-encoder: train/cross.train.tsv -> output/cross_params.bin.

    CUDA_VISIBLE_DEVICES=0 nohup python3 do_cross_train.py > process_do_cross_train.log 2>&1 &
    python do_cross_train.py --debug        # a few minutes on a CPU, no download

Settings: torch_src/cross_hparams.py, or `--name value`; `--help` lists them.
"""

import sys

from torch_src.cross_hparams import CrossHparams
from torch_src.hparams import parse
from torch_src.runtime.program import exit_with


def enter() -> int:
    parse(CrossHparams, sys.argv[1:])  # --help and errors come before the slow imports
    from torch_src import cross_train

    return cross_train.main(sys.argv[1:])


if __name__ == "__main__":
    exit_with(enter)
