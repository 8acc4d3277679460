"""Train the cross-encoder: train/cross.train.tsv -> output/cross_params.bin.

    CUDA_VISIBLE_DEVICES=0 nohup python3 do_cross_train.py > process_do_cross_train.log 2>&1 &
    python do_cross_train.py --debug        # a few minutes on a CPU, no download

Settings: torch_src/cross_hparams.py, or `--name value`; `--help` lists them.
"""

import sys

from torch_src.runtime.program import exit_with


def enter() -> int:
    from torch_src import cross_train  # imported here: Ctrl-C during the slow imports gives no traceback

    return cross_train.main(sys.argv[1:])


if __name__ == "__main__":
    exit_with(enter)
