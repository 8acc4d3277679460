"""Train the dual encoder: train/dual.train.tsv -> output/dual_params.bin.

    CUDA_VISIBLE_DEVICES=0 nohup python3 do_dual_train.py > process_do_dual_train.log 2>&1 &
    python do_dual_train.py --debug        # a few minutes on a CPU, no download

Settings: torch_src/dual_hparams.py, or `--name value`; `--help` lists them.
"""

import sys

from torch_src.dual_hparams import DualHparams
from torch_src.hparams import parse
from torch_src.runtime.program import exit_with


def enter() -> int:
    parse(DualHparams, sys.argv[1:])  # --help and errors come before the slow imports
    from torch_src import dual_train

    return dual_train.main(sys.argv[1:])


if __name__ == "__main__":
    exit_with(enter)
