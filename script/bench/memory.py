"""Peak memory of do_dual_infer.py for a small collection, and with its passages repeated to N rows.

    python script/bench/memory.py --rows 1000000

The passages of --data_dir are repeated to --rows, encoded with a 2-layer, 64-wide model at 32 tokens, and
searched. Prints the peak resident memory of both runs as the operating system reports it, then a JSON line.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root

import torch_src  # noqa: F401 (first: it reports missing packages)

# isort: split

from script.bench.common import ROOT, run_program
from script.bench.synthetic import repeat_collection, write_small_model


def peak_mb(data_dir: Path, passages: Path, model: Path, output: Path) -> float:
    """Run do_dual_infer.py and return its peak resident memory in 10^6 bytes."""
    command = ["do_dual_infer.py", "--data_dir", data_dir, "--passage_dir", passages]
    command += ["--dual_params", "none", "--pretrained_model_path", model, "--output_dir", output]
    command += ["--p_max_seq_len", "32", "--batch_size", "512", "--precision", "fp32", "--force"]
    return 1000 * run_program(*command, stdout=subprocess.DEVNULL)[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_dir", type=Path, default=ROOT / "script/sample_data")
    parser.add_argument("--rows", type=int, default=1_000_000)
    args = parser.parse_args()
    data_dir = args.data_dir.resolve()
    source = data_dir / "passage-collection"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_small_model(folder / "model")
        small = peak_mb(data_dir, source, folder / "model", folder / "small")
        repeat_collection(source, folder / "many", args.rows)
        large = peak_mb(data_dir, folder / "many", folder / "model", folder / "large")
    print(f"peak resident memory: {small:.0f} MB once, {large:.0f} MB at {args.rows:,} rows")
    figures = {"rows": args.rows, "once_mb": small, "many_mb": large, "growth_mb": large - small}
    print(json.dumps({name: round(value) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
