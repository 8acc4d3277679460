"""do_dual_infer.py and the metric at full size, with random vectors in place of the encoder's.

    python script/bench/end_to_end.py --rows 8096668 --queries 2000 --folder F       # about 13 GB in F

Writes a collection of --rows short passages with its id map and a one-layer model 768 wide, and fills
para_emb with random vectors under the manifest of this model. Then runs, as a user would: do_dual_infer.py
(which finds the vectors up to date, opens the collection, checks the ids, encodes the queries, searches and
writes res.top50), metric/convert_recall_res_to_json.py and metric/evaluation.py. The reference has the
answer of query i at rank i mod 60 + 1 (beyond rank 50: a passage that is not found), so that the expected
metrics are known. Prints time and peak resident memory of each program, then a JSON line.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root

import torch_src  # noqa: F401 (first: it reports missing packages)

# isort: split

from script.bench.common import run_program
from script.bench.synthetic import fill_random, open_store, write_id_map, write_model
from torch_src.data.formats import format_passage, format_query, read_run

HIDDEN, TOPK, RANKS = 768, 50, 60


def write_data(folder: Path, rows: int, queries: int) -> None:
    """Write the collection, the id map, the queries and the model."""
    passages, dev = folder / "data/passage-collection", folder / "data/dev"
    passages.mkdir(parents=True)
    dev.mkdir()
    with open(passages / "part-00", "w", encoding="utf-8") as file:
        file.writelines(format_passage(f"第{row}篇") for row in range(rows))
    write_id_map(passages, rows)
    texts = [f"第{at}个问题是什么" for at in range(queries)]
    (dev / "dev.q.format").write_text("".join(map(format_query, texts)), encoding="utf-8")
    (dev / "q2qid.dev.json").write_text(json.dumps({text: f"q{at}" for at, text in enumerate(texts)}))
    write_model(
        folder / "model",
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=12,
        intermediate_size=768,
    )


def settings(folder: Path) -> dict[str, Any]:
    """Return the options of do_dual_infer.py."""
    return {
        "dual_params": "none",
        "pretrained_model_path": str(folder / "model"),
        "data_dir": str(folder / "data"),
        "output_dir": str(folder / "output"),
        "precision": "fp32",
        "search_memory_gb": 1.0,
    }


def fill_vectors(folder: Path) -> None:
    """Write random vectors to the place of the model's.

    Runs in its own process, which imports torch: the peak memory of a program, as the system reports it,
    includes that of the process that started it.
    """
    from torch_src.dual_infer import DualInference
    from torch_src.inference_de_hparams import InferenceDeHparams

    hp = InferenceDeHparams(**settings(folder))
    inference = DualInference(hp, TOPK, 1000)
    stamp = inference.passage_stamp()
    rows = len(inference.collection)
    fill_random(open_store(Path(hp.para_emb_path), stamp, rows, HIDDEN, hp.block_rows))


def write_reference(folder: Path) -> dict[str, float]:
    """Write dev.json with the answer of query i at rank i mod 60 + 1; return the expected metrics."""
    ranks: list[int] = []
    query = None
    with open(folder / "data/dev/dev.json", "w", encoding="utf-8") as file:
        for row in read_run(folder / f"output/res.top{TOPK}"):
            if row.query != query:
                query = row.query
                ranks.append(len(ranks) % RANKS + 1)
                if ranks[-1] > TOPK:
                    file.write(dev_line(len(ranks) - 1, query, "nowhere"))
            if row.rank == ranks[-1]:
                file.write(dev_line(len(ranks) - 1, query, f"{row.row:032x}"))
    return {
        "MRR@10": sum(1 / rank for rank in ranks if rank <= 10) / len(ranks),
        "recall@1": sum(rank == 1 for rank in ranks) / len(ranks),
        "recall@50": sum(rank <= 50 for rank in ranks) / len(ranks),
    }


def dev_line(number: int, query: str, pid: str) -> str:
    answers = [{"paragraph_id": pid, "paragraph_text": "-"}]
    entry = {"question_id": f"q{number}", "question": query, "answer_paragraphs": answers}
    return json.dumps(entry, ensure_ascii=False) + "\n"


def run(name: str, *words: object) -> tuple[dict[str, float], str]:
    """Run a program; return (its time and peak resident memory, its output)."""
    seconds, peak, output = run_program(name, *words)
    print(f"{name:42} {seconds:8.1f} s  {peak:5.2f} GB", flush=True)
    return {"seconds": round(seconds, 1), "peak_gb": round(peak, 2)}, output


def measure(folder: Path) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Run the three programs; return ({program: figures}, metrics)."""
    options = [word for name, value in settings(folder).items() for word in (f"--{name}", value)]
    data, result = folder / "data", folder / f"output/res.top{TOPK}"
    figures = {}
    result.with_name(f"{result.name}.stamp.json").unlink(missing_ok=True)  # search again with these vectors
    figures["do_dual_infer"], output = run("do_dual_infer.py", *options)
    print("  " + "\n  ".join(line for line in output.splitlines() if " search" in line))
    expected = write_reference(folder)
    maps = (data / "dev/q2qid.dev.json", data / "passage-collection/passage2id.map.json")
    figures["convert"], _ = run("metric/convert_recall_res_to_json.py", *maps, result, TOPK)
    files = (data / "dev/dev.json", folder / "output/dual_res.json")
    figures["evaluation"], output = run("metric/evaluation.py", *files)
    metrics = json.loads(output)
    assert all(abs(metrics[name] - value) < 1e-4 for name, value in expected.items()), (metrics, expected)
    return figures, metrics


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--folder", type=Path, help="folder for all files; default: a temporary folder")
    parser.add_argument("--fill", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.fill:
        return fill_vectors(args.folder)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        size_file, size = folder / "size", f"{args.rows} {args.queries}"
        if not size_file.exists():
            write_data(folder, args.rows, args.queries)
            size_file.write_text(size)
        elif size_file.read_text() != size:
            raise SystemExit(f"{folder}: has another number of rows or queries; name another folder")
        subprocess.run([sys.executable, __file__, "--fill", "--folder", folder], check=True)
        figures, metrics = measure(folder)
    total = round(sum(part["seconds"] for part in figures.values()), 1)
    peak = max(part["peak_gb"] for part in figures.values())
    line = {"bench": "end_to_end", "rows": args.rows, "queries": args.queries, "seconds": total}
    print(json.dumps({**line, "peak_gb": peak, "metrics": metrics, **figures}))


if __name__ == "__main__":
    main()
