"""Re-rank: output/res.top50 + output/cross_params.bin -> output/res.rerank50, output/cross_res.json.

    CUDA_VISIBLE_DEVICES=0 nohup python3 do_cross_infer.py > process_do_cross_infer.log 2>&1 &
    python do_cross_infer.py --debug        # seconds on a CPU, after do_cross_train.py --debug

Settings: torch_src/inference_cross_hparams.py, or `--name value`; `--help` lists them.
"""

import sys

from torch_src.hparams import parse
from torch_src.inference_cross_hparams import InferenceCrossHparams
from torch_src.runtime.program import exit_with


def enter() -> int:
    parse(InferenceCrossHparams, sys.argv[1:])  # --help and errors come before the slow imports
    from torch_src import cross_infer

    return cross_infer.main(sys.argv[1:])


if __name__ == "__main__":
    exit_with(enter)
