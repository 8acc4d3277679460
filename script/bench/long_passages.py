"""Retrieval from long passages with and without windows: CMRC 2018's pieces joined to long documents.

    python script/bench/long_passages.py --data_dir D --model M --work /tmp/long
    python script/bench/long_passages.py --data_dir D --model M --work /tmp/long --index HNSW32 --queries 500
    python script/bench/long_passages.py --data_dir D --model M --work /tmp/long --reranker R --depth 10

D is in the official layout, its passages `title：text`. Pieces of one title are joined in the order of their
rows, then articles to documents of at least --characters; the answer of a question is the document with its
piece. Prints recall@50 and MRR@10 of do_dual_infer.py (--dual_params none) without windows and with
--windows, the time of encoding and the disk space of the vectors; with --reranker also those of
do_cross_infer.py (--cross_params none) on the candidates with windows. Further options, such as --pooling,
are passed to do_dual_infer.py.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root

import torch_src  # noqa: F401 (first: it reports missing packages)

# isort: split

from metric.evaluation import compute_metrics
from torch_src.data.collection import PassageCollection
from torch_src.data.formats import format_passage, read_dev, run_by_query
from torch_src.data.passage_ids import read_passage_ids

ROOT = Path(__file__).resolve().parents[2]


def documents(texts: list[str], characters: int) -> list[list[int]]:
    """Return the rows of each document: whole articles, of at least so many characters."""
    articles: dict[str, list[int]] = {}
    for row, text in enumerate(texts):
        articles.setdefault(text.partition("：")[0], []).append(row)
    found: list[list[int]] = [[]]
    for rows in articles.values():
        if sum(len(texts[row]) for row in found[-1]) >= characters:
            found.append([])
        found[-1] += rows
    return found


def join(texts: list[str], rows: list[int]) -> str:
    """Return the text of a document: each title once."""
    parts, titles = [], set()
    for row in rows:
        title, _, rest = texts[row].partition("：")
        parts.append(rest if title in titles else texts[row])
        titles.add(title)
    return "".join(parts)


def make_data(source: Path, target: Path, characters: int, queries: int) -> None:
    """Write the documents, and `queries` of the dev questions (0: all), in the official layout."""
    shutil.rmtree(target, ignore_errors=True)
    folders = [target / name for name in ("passage-collection", "dev")]
    for folder in folders:
        folder.mkdir(parents=True)
    collection = PassageCollection(source / "passage-collection")
    texts = collection[0 : len(collection)]
    pids = read_passage_ids(str(source / "passage-collection" / "passage2id.map.json"), None).tolist()
    document_of: dict[str, str] = {}
    with open(folders[0] / "part-00", "w", encoding="utf-8") as file:
        for number, rows in enumerate(found := documents(texts, characters)):
            document_of |= {pids[row].decode(): f"d{number}" for row in rows}
            file.write(format_passage(join(texts, rows)))
    ids = {str(number): f"d{number}" for number in range(len(found))}
    (folders[0] / "passage2id.map.json").write_text(json.dumps(ids), encoding="utf-8")
    with open(source / "dev" / "dev.json", encoding="utf-8") as file:
        questions = [json.loads(line) for line in file]
    questions = questions[:: max(1, len(questions) // queries)] if queries else questions
    for question in questions:
        for answer in question["answer_paragraphs"]:
            answer["paragraph_id"] = document_of[answer["paragraph_id"]]
    lines = {
        "dev.json": "".join(json.dumps(question, ensure_ascii=False) + "\n" for question in questions),
        "dev.q.format": "".join(f"{question['question']}\t\t\t0\n" for question in questions),
        "q2qid.dev.json": json.dumps(
            {each["question"]: each["question_id"] for each in questions}, ensure_ascii=False
        ),
    }
    for name, text in lines.items():
        (folders[1] / name).write_text(text, encoding="utf-8")
    lengths = sorted(len(join(texts, rows)) for rows in found)
    print(f"{len(found):,} documents of {lengths[0]:,} to {lengths[-1]:,} characters (median "
          f"{lengths[len(lengths) // 2]:,}), {len(questions):,} questions")  # fmt: skip


def call(program: str, data: Path, output: Path, *options: str) -> float:
    """Run a program; return its seconds."""
    started = time.monotonic()
    words = [sys.executable, program, "--data_dir", str(data), "--output_dir", str(output), *options]
    with open(output.with_suffix(".log"), "a", encoding="utf-8") as log:
        subprocess.run(words, cwd=ROOT, check=True, stdout=log, stderr=log)
    return time.monotonic() - started


def measured(data: Path, run: Path) -> str:
    """Return the metrics of a run."""
    reference = {query.qid: set(query.answers) for query in read_dev(str(data / "dev" / "dev.json"))}
    qids = json.loads((data / "dev" / "q2qid.dev.json").read_text(encoding="utf-8"))
    lists = {qids[query]: [f"d{row.row}" for row in rows] for query, rows in run_by_query(run)}
    metrics = compute_metrics(reference, lists)
    return "  ".join(f"{name} {metrics[name]:.4f}" for name in ("MRR@10", "recall@1", "recall@50"))


def vector_bytes(output: Path) -> int:
    return sum(path.stat().st_size for path in (output / "para_emb").glob("block-*"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="official layout")
    parser.add_argument("--model", required=True, help="folder of a retriever")
    parser.add_argument("--work", required=True, help="folder for the documents and results")
    parser.add_argument("--characters", type=int, default=1500, help="least length of a document")
    parser.add_argument("--queries", type=int, default=0, help="about so many of the questions; 0: all")
    parser.add_argument("--windows", type=int, default=6, help="--passage_windows of the second run")
    parser.add_argument("--p_max_seq_len", type=int, default=384)
    parser.add_argument("--index", default="", help="a faiss index, measured on the vectors of windows")
    parser.add_argument("--reranker", default="", help="folder of a re-ranker")
    parser.add_argument("--depth", type=int, default=10, help="candidates that the re-ranker scores")
    args, options_of_model = parser.parse_known_args()
    work = Path(args.work)
    data, limit = work / "data", ("--p_max_seq_len", str(args.p_max_seq_len))
    make_data(Path(args.data_dir), data, args.characters, args.queries)
    retriever = ("--dual_params", "none", "--pretrained_model_path", args.model, *limit, *options_of_model)
    for windows in (1, args.windows):
        output, more = work / f"windows{windows}", ("--passage_windows", str(windows))
        seconds = call("do_dual_infer.py", data, output, *retriever, *more)
        disk = vector_bytes(output) / 1e6
        scores = measured(data, output / "res.top50")
        print(f"retriever, {windows} windows: {scores}  {seconds:.0f} s  {disk:.2f} MB", flush=True)
    if args.index:
        exact = (output / "res.top50").read_bytes()
        call("do_dual_infer.py", data, output, *retriever, *more, "--index", args.index)
        print(f"{args.index}: {measured(data, output / 'res.top50')}", flush=True)
        (output / "res.top50").write_bytes(exact)
    if args.reranker:
        reranker = ("--cross_params", "none", "--pretrained_model_path", args.reranker)
        for windows in (1, args.windows):
            target = work / f"reranked{windows}"
            target.mkdir(exist_ok=True)
            options = ("--retrieval_result", str(output / "res.top50"), "--depth", str(args.depth))
            more = ("--passage_windows", str(windows))
            seconds = call("do_cross_infer.py", data, target, *reranker, *options, *more)
            print(f"re-ranker, {windows} windows: {measured(data, target / 'res.rerank50')}  {seconds:.0f} s")


if __name__ == "__main__":
    main()
