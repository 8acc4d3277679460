"""Check a data folder of the official layout before a long job uses it.

    python script/check_data.py dureader-retrieval-baseline-dataset
    python script/check_data.py DIR --q_max_seq_len 32 --p_max_seq_len 384 --fix-report faults.tsv

Reads every file once, in bounded memory, and checks columns, encoding, row counts, ids, dev positives and
their texts, duplicates, queries that are in train and dev, lengths. Lengths are in characters, of which
Chinese vocabularies make about one token each. Prints a table, then every fault as file:line (the first 50;
--fix-report writes all). Exit status: 0 without faults, 1 with faults, 2 when the check cannot run.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

from torch_src.runtime.errors import UserError
from torch_src.runtime.files import atomic_write, require
from torch_src.runtime.options import OptionParser, integer
from torch_src.runtime.outputs import Output, begins, check_outputs
from torch_src.runtime.program import exit_status
from torch_src.tools.data_check import PERCENTILES, DataCheck, Findings

SHOWN = 50  # faults printed
MANY_CUT = 0.01  # share of cut passages that a note is about
COLUMNS = "file\tline\twhat\n"  # first line of --fix-report
FIX_REPORT = begins(COLUMNS.encode())


def table(found: Findings, limits: dict[str, int]) -> list[str]:
    """Return the lines of the table: rows of each file, then lengths of each kind of text."""
    lines = [f"{'file':56} {'rows':>12}"]
    lines += [f"{name:56} {count:>12,}" for name, count in found.rows.items()]
    head = " ".join(f"{f'p{p}' if p < 100 else 'max':>7}" for p in PERCENTILES)
    lines += ["", f"{'characters':32} {head} {'cut at':>7} {'cut':>7}"]
    for kind, lengths in sorted(found.lengths.items()):
        limit = limits["query" if "query" in kind else "passage"]
        figures = " ".join(f"{lengths.percentile(p):>7}" for p in PERCENTILES)
        lines.append(f"{kind:32} {figures} {limit:>7} {100 * lengths.share_above(limit):>6.1f}%")
    return lines


def run(given: argparse.Namespace) -> Findings:
    """Check the folder, print the findings and return them."""
    folder = require(given.folder, "the data folder")
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: is a file (expected the folder around passage-collection)")
    if given.fix_report:
        check_outputs([Output(given.fix_report, FIX_REPORT)], [Path(folder) / "passage-collection"])
        with atomic_write(given.fix_report) as file:
            file.write(COLUMNS)
            found = DataCheck(folder, lambda *fault: file.write("\t".join(map(str, fault)) + "\n")).run()
    else:
        found = DataCheck(folder).run()
    limits = {"query": given.q_max_seq_len - 2, "passage": given.p_max_seq_len - 2}  # [CLS] and [SEP]
    print("\n".join(table(found, limits)))
    for note in found.notes:
        print(f"note: {note}")
    long = max((each.share_above(limits["passage"]) for kind, each in found.lengths.items()
                if "query" not in kind), default=0)  # fmt: skip
    if long > MANY_CUT:
        print(
            f"note: {100 * long:.1f}% of the passages are cut: raise --p_max_seq_len, or search them in "
            "windows (do_dual_infer.py --passage_windows N)"
        )
    for path, line, what in found.faults[:SHOWN]:
        print(f"{path}:{line}: {what}")
    if found.fault_count > SHOWN:
        print(f"... and {found.fault_count - SHOWN:,} more; --fix-report FILE writes all of them")
    print(f"{found.fault_count:,} faults" if found.fault_count else "no faults")
    return found


def main(argv: list[str]) -> int:
    """Return the exit status."""
    parser = OptionParser(__doc__)
    parser.add_argument("folder", help="a data folder of the official layout")
    parser.add_argument("--q_max_seq_len", type=integer(3, 10**6), default=32, help="longest query in tokens")
    parser.add_argument(
        "--p_max_seq_len", type=integer(3, 10**6), default=384, help="longest passage in tokens"
    )
    parser.add_argument("--fix-report", dest="fix_report", help="write every fault to this file")
    given = parser.parse_args(argv)
    found: list[Findings] = []
    status = exit_status(lambda: found.append(run(given)))
    return status or int(found[0].fault_count > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
