"""Millions of malformed files through every reader: a parsed value or one clear error.

    python tests/faults/bad_input.py --inputs 1000000 --seed 1

Each input is a well-formed file with one to four mutations: bytes flipped, deleted, doubled, truncated,
moved; inserted text that breaks parsers (control characters, U+2028, lone surrogates, byte order marks,
CRLF, NUL, deep nesting, huge numbers). Prints how many were parsed and refused; exit status 1 for anything
else.
"""

import argparse
import contextlib
import io
import json
import random
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":  # run by path: the root is not on it
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from metric import convert_recall_res_to_json, convert_rerank_res_to_json, evaluation
from script.lib.foreign_datasets import Conversion, read_passages
from script.lib.foreign_files import Counts, Source
from script.lib.foreign_rows import row_passages
from script.lib.official_layout import OfficialLayoutWriter
from script.lib.trec_files import read_grades, read_ranking
from torch_src.data.collection import PassageCollection
from torch_src.data.cross_training_set import CrossTrainingSet
from torch_src.data.dual_training_set import DualTrainingSet
from torch_src.data.formats import (
    read_candidates,
    read_dev,
    read_q2qid,
    read_queries,
    read_question_ids,
    read_run,
    read_scores,
)
from torch_src.data.mined_files import COLUMNS, SIDECAR, read_teacher
from torch_src.data.passage_ids import read_passage_ids
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import read_json
from torch_src.runtime.stamps import read_stamp
from torch_src.tools.data_check import DataCheck

QUERY, OTHER, TEXT = "蒸鱼去腥小妙招", "how to 拍 照", "清蒸鱼的腥味主要来自血水，“先焯水”。"
DEV = {
    "question_id": "q1",
    "question": QUERY,
    "answer_paragraphs": [{"paragraph_id": "p1", "paragraph_text": TEXT}],
}
FRAGMENTS = [
    b"\t", b"\n", b"\r\n", b"\x00", b"\xef\xbb\xbf", b"\xff", b"\xed\xa0\x80", b"\\ud800", b"\\udc00\\u0000",
    "\u2028\x85\x0b\x1c".encode(), b'"', b"\\", b"{", b"[" * 3000, b"}", b"]", b",", b":", b"null",
    b"-", b" ",
    b"1e999", b"nan", b"-1", b"9" * 5000, b"99999999999999999999", b"0x1F", b"1_0",
    "１".encode(), b"\x1a" * 9,
]  # fmt: skip
REFUSED = UserError


def text(*lines: str) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def collection(path: Path) -> list[str]:
    opened = PassageCollection(path.parent)
    return opened[0 : len(opened)]


def training(kind: Callable) -> Callable:
    """Return a reader that opens a training file and draws a batch of it."""

    def read(path: Path):
        data = kind(path)
        return data.file.read(list(range(data.rows)))

    return read


def rows(path: Path):
    """Return the passages of a file of rows."""
    layout = OfficialLayoutWriter(path.parent, 0, Counts())
    return list(row_passages(Conversion(Source(), layout, files=[(path, "train")], has_corpus=False)))


def checked(path: Path):
    """Return the faults that the data check finds in this training file."""
    return DataCheck(str(path.parent.parent)).run().faults


# name: (file name, well-formed bytes, reader of the path, files beside it)
READERS: dict[str, tuple[str, bytes, Callable, dict[str, bytes]]] = {
    "dual training rows": (
        "dual.train.tsv", text(f"{QUERY}\t\t{TEXT}\tnull\t好\t0", f"{OTHER}\t\t{TEXT}\t\t坏\t0"),
        training(DualTrainingSet), {},
    ),
    "cross training rows": (
        "cross.train.tsv", text(f"{QUERY}\t\t{TEXT}\t1", f"{QUERY}\t\t坏\t0"), training(CrossTrainingSet), {},
    ),
    "queries": ("dev.q.format", text(f"{QUERY}\t-\t-\t0", f"{OTHER}\t-\t-\t0"), read_queries, {}),
    "test queries": (
        "test1.json", text(json.dumps({"question_id": "q1", "question": QUERY}, ensure_ascii=False)),
        read_question_ids, {},
    ),
    "queries with ids": ("queries.tsv", text(f"q1\t{QUERY}", f"q2\t{OTHER}"), read_question_ids, {}),
    "query ids": ("q2qid.dev.json", json.dumps({QUERY: "q1", OTHER: "q2"}).encode(), read_q2qid, {}),
    "reference": ("dev.json", text(json.dumps(DEV, ensure_ascii=False)), read_dev, {}),
    "passages": ("part-00", text(f"-\t\t{TEXT}\t0", "-\t\t\t0"), collection, {}),
    "passage ids": ("passage2id.map.json", b'{"0": "p1", "1": "p2"}', read_passage_ids, {}),
    "run": (
        "res.top50", text(f"{QUERY}\t0\t1\t0.5", f"{QUERY}\t1\t2\t-1e-3"),
        lambda path: list(read_run(path)), {},
    ),
    "candidates": (
        "a.res.tsv", text(f"{QUERY}\tnull\t{TEXT}\t0"),
        lambda path: list(read_candidates(path, path.with_name("a.ids"))), {"a.ids": b"q1\tp1\n"},
    ),
    "candidate ids": (
        "a.ids", b"q1\tp1\n", lambda path: list(read_candidates(path.with_name("a.res.tsv"), path)),
        {"a.res.tsv": text(f"{QUERY}\tnull\t{TEXT}\t0")},
    ),
    "scores": ("cross_scores.txt", b"3.14159203\n-1e-05\n", lambda path: list(read_scores(path)), {}),
    "teacher": (
        SIDECAR, text("\t".join(COLUMNS), "3\tp3\t\t\t4\t5\tp5\t1\t8\t-5"),
        lambda path: read_teacher(path.with_name("dual.train.tsv"), path), {},
    ),
    "settings": ("dual_hparams.json", b'{"epoch": 3, "prefix": "\xe9\x97\xae"}', read_json, {}),
    "stamp": (
        "res.top50.stamp.json", b'{"weights": "0123", "topk": 50}',
        lambda path: read_stamp(path.with_name("res.top50")), {"res.top50": b"x"},
    ),
    "metric: reference": (
        "dev.json", text(json.dumps(DEV, ensure_ascii=False)), evaluation.load_reference, {},
    ),
    "metric: result": ("dual_res.json", b'{"q1": ["p1", "p2"],\n "q2": []}', evaluation.load_result, {}),
    "metric: run": (
        "res.top50", text(f"{QUERY}\t0\t1\t0.5", f"{QUERY}\t1\t2\t0.25"),
        lambda path: convert_recall_res_to_json.convert(
            str(path.with_name("q2qid")), str(path.with_name("ids")), str(path), 50, str(path.with_name("o"))
        ),
        {"q2qid": json.dumps({QUERY: "q1"}).encode(), "ids": b'{"0": "p1", "1": "p2"}'},
    ),
    "metric: scores": (
        "cross_scores.txt", b"3.14159203\n-1e-05\n",
        lambda path: convert_rerank_res_to_json.convert(
            str(path), str(path.with_name("ids")), str(path.with_name("o"))
        ),
        {"ids": b"q1\tp1\nq1\tp2\n"},
    ),
    "foreign passages": (
        "corpus.tsv", text("id\ttext\ttitle", f'1\t"{TEXT} ""鱼"""\t菜', f"2\t{TEXT}\t"),
        lambda path: list(read_passages(path, Source())), {},
    ),
    "foreign CSV": (
        "corpus.csv", text("id,text", f'1,"{TEXT}\n"', f"2,{TEXT}"),
        lambda path: list(read_passages(path, Source())), {},
    ),
    "foreign rows": (
        "rows.jsonl", text(json.dumps({"query": QUERY, "pos": [TEXT], "neg": ["坏"], "pos_scores": [1.5]})),
        rows, {},
    ),
    "foreign array": (
        "dpr.json", text(json.dumps([{"question": QUERY, "positive_ctxs": [{"psg_id": 1, "text": TEXT}]}])),
        rows, {},
    ),
    "qrels": ("qrels.tsv", text("query-id\tcorpus-id\tscore", "q1\tp1\t2", "q1\tp2\t0"), read_grades, {}),
    "TREC run": ("run.txt", text("q1 Q0 p1 1 0.5 x", "q1 Q0 p2 2 0.25 x"), read_ranking, {}),
    "scores by pid": ("run.json", b'{"q1": {"p1": 0.5, "p2": 1}}', read_ranking, {}),
    "data check": (
        "train/cross.train.tsv", text(f"{QUERY}\t\t{TEXT}\t1", f"{QUERY}\t\t坏\t0"), checked, {},
    ),
}  # fmt: skip


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Return the bytes with one to four mutations."""
    for _ in range(draw.randint(1, 4)):
        at, end = sorted((draw.randint(0, len(data)), draw.randint(0, len(data))))
        kind = draw.randrange(7)
        if kind == 0 and data:
            at = min(at, len(data) - 1)
            data = data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + data[end:]
        elif kind == 2:
            data = data[:end] + data[at:end] + data[end:]
        elif kind == 3:
            data = data[:at]
        elif kind == 4:
            data = data[end:] + data[at:end] + data[:at]
        else:
            data = data[:at] + draw.choice(FRAGMENTS) + data[at:]
    return data


def look(read: Callable, path: Path) -> str:
    """Return `parsed`, `refused`, or a traceback."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            value = read(path)
        repr(value).encode("utf-8", "backslashreplace")
        return "parsed"
    except REFUSED as error:
        message = str(error)
        if str(path.parent) not in message or "\n" in message:
            return f"an error that names no file, or is not one line: {message!r}"
        return "refused"
    except Exception:
        return traceback.format_exc()


def run(folder: Path, names: list[str], inputs: int, seed: int) -> tuple[Counter, list[str]]:
    """Read `inputs` mutated files in turn; return (counts, failures)."""
    draw, counts, failures = random.Random(seed), Counter(), []
    for name in names:
        place = folder / name.replace(": ", "-").replace(" ", "-")
        file, _, _, beside = READERS[name]
        (place / file).parent.mkdir(parents=True)
        for other, data in beside.items():
            (place / other).write_bytes(data)
    for at in range(inputs):
        name = names[at % len(names)]
        file, whole, read, _ = READERS[name]
        path = folder / name.replace(": ", "-").replace(" ", "-") / file
        data = mutated(whole, draw)
        path.write_bytes(data)
        found = look(read, path)
        if found not in ("parsed", "refused"):
            failures.append(f"{name}: {data[:300]!r}\n{found}")
            found = "FAILED"
        counts[found] += 1
    return counts, failures


def main() -> int:
    plain = argparse.RawDescriptionHelpFormatter
    options = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    options.add_argument("--inputs", type=int, default=1_000_000)
    options.add_argument("--seed", type=int, default=1)
    given = options.parse_args()
    memory = Path("/dev/shm")  # files that never reach a disk
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        counts, failures = run(Path(folder), list(READERS), given.inputs, given.seed)
    for failure in failures[:20]:
        print(failure)
    print(
        f"{given.inputs:,} inputs, seed {given.seed}: "
        + ", ".join(f"{n:,} {what}" for what, n in counts.items())
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
