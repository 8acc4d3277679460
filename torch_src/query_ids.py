"""The queries of a data folder and their qids; needs no torch."""

from torch_src.common_hparams import QueryIds
from torch_src.data.formats import has_query_ids, read_q2qid, read_queries, read_question_ids
from torch_src.hparams import NONE
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import require
from torch_src.runtime.log import warn


def read_query_ids(hp: QueryIds) -> dict[str, list[str] | None]:
    """Return {query text: its qids} in file order; with `--dev_q2qid none` the qids are None.

    dev_q is dev.q.format with q2qid.dev.json beside it, or a file with ids: JSON lines (test1.json, dev.json,
    queries.jsonl) or `qid TAB query`. UserError when a query has no qid.
    """
    if has_query_ids(hp.dev_q_path):
        if hp.dev_q2qid not in ("", NONE):
            warn(f"--dev_q2qid {hp.dev_q2qid}: not read, because {hp.dev_q_path} has ids")
        return dict(read_question_ids(hp.dev_q_path))
    queries = read_queries(hp.dev_q_path)
    if hp.dev_q2qid == NONE:
        return dict.fromkeys(queries)
    path = require(hp.dev_q2qid_path, "query text -> qid", "pass --dev_q2qid none to omit qids")
    q2qid = read_q2qid(path)
    missing = [query for query in queries if query not in q2qid]
    if missing:
        raise UserError(f"{path}: lacks {len(missing)} queries of {hp.dev_q_path}, e.g. {missing[0][:60]!r}")
    if len(q2qid) > len(queries):
        warn(f"{path} has {len(q2qid)} queries, {hp.dev_q_path} only {len(queries)}: the rest get no result")
    return {query: [q2qid[query]] for query in queries}
