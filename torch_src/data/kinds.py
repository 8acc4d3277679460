"""What a file is, judged by its first bytes, to name arguments in the wrong order."""

from torch_src.data.lines import FilePath
from torch_src.runtime.errors import UserError
from torch_src.runtime.outputs import RUN as RUN_HEAD
from torch_src.runtime.outputs import FileTest, begins

RUN = "a run (query, row, rank, score)"
RESULT = "a result ({qid: [pid, ...]})"
ANSWERS = "answers of dev queries (dev.json)"
PASSAGE_MAP = "row -> pid (passage2id.map.json)"
QUERY_MAP = "query text -> qid (q2qid.dev.json)"
QUERIES = "queries (dev.q.format)"
ID_MAP = "an id map (qid, pid)"
SCORES = "scores (one number a line)"

# The first pattern that matches decides. A map with a number as its first key may be either: unknown.
HEADS: dict[str, FileTest] = {
    RUN: RUN_HEAD,
    ANSWERS: begins(rb'\{[^\n]*?"(?:answer_paragraphs|question_id)"'),
    RESULT: begins(rb'\{\s*"[^\n]*": *\['),
    PASSAGE_MAP: begins(rb'\{\s*"0"\s*:\s*"'),
    QUERY_MAP: begins(rb'\{\s*"(?=[^"\n]*[^0-9"\n])(?:[^"\\\n]|\\.)*"\s*:\s*"'),
    QUERIES: begins(rb"[^\t\n]+\t-\t-\t[0-9]+\r?\n"),
    SCORES: begins(rb"[-+]?[0-9.][-+.0-9e]*\n"),
    ID_MAP: begins(rb"[^\t\n]+\t[^\t\n]+\n"),
}


def kind_of(path: FilePath) -> str:
    """Return the kind of a file, one of HEADS; empty when it is unknown, missing or packed."""
    return next((kind for kind, is_kind in HEADS.items() if is_kind(path)), "")


def check_kinds(*expected: tuple[FilePath, str]) -> None:
    """UserError when a file is clearly of another kind than its pair (path, kind) says; unknown ones pass."""
    for path, kind in expected:
        found = kind_of(path)
        if found not in ("", kind):
            raise UserError(f"{path}: {found} (expected {kind}); check the order of the arguments")
