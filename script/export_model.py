"""Export trained models as folders for transformers and sentence-transformers.

    python -m pip install -r requirements-tools.txt
    python script/export_model.py dual --output_dir output --to output/export/dual
    python script/export_model.py cross --output_dir output --to output/export/cross

`dual` writes a SentenceTransformer with pooling, normalization, lengths, and the prefixes as prompts
(encode_query, encode_document); two towers become a Router. `cross` writes a CrossEncoder whose predict()
returns logits. Both include a model card with the settings and, with --results, metrics. remove_spaces cannot
be exported: a warning reports it. sentence-transformers truncates the longer text of a pair, this project
always truncates the passage: scores differ for queries longer than half of max_seq_len.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

from torch_src.hparams import OUTPUT
from torch_src.runtime.files import from_root
from torch_src.runtime.options import OptionParser
from torch_src.runtime.program import exit_status


def run(args: argparse.Namespace) -> None:
    """Export the model and write its card."""
    from script.lib.export import export  # here: --help takes no second

    export(args)


def main(argv: list[str]) -> int:
    """Return the exit status."""
    parser = OptionParser(__doc__)
    parser.add_argument("kind", choices=["dual", "cross"])
    parser.add_argument("--output_dir", default=from_root(OUTPUT), help="folder of the trained model")
    parser.add_argument("--to", type=Path, required=True, help="folder to write")
    parser.add_argument("--results", default="", help="dual_res.json or cross_res.json, for the model card")
    parser.add_argument("--reference", default="", help="dev.json, to score --results")
    args = parser.parse_args(argv)
    return exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
