"""do_dual_infer.py and the metric at full size, with generated vectors standing in for the encoder's.

    python script/bench/end_to_end.py --rows 8096668 --queries 2000 --folder F       # about 13 GB in F

Makes a collection of --rows short passages with its id map, a one-layer model 768 wide, and fills para_emb
with random vectors under the manifest that this model's own would have. Then runs, as a user would:
do_dual_infer.py (which finds the vectors up to date, opens the collection, checks the ids, encodes the
queries, searches and writes res.top50), metric/convert_recall_res_to_json.py, metric/evaluation.py. Query i's
answer is put at rank i mod 60 + 1 of the result (no answer found beyond 50), so that the metrics are known
beforehand. Prints time and peak resident memory of each program, last a JSON line.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run by path: the root is not on it

from torch_src.data.formats import read_run

ROOT = Path(__file__).resolve().parents[2]
HIDDEN, TOPK, PLACES = 768, 50, 60


def make_data(folder: Path, rows: int, queries: int) -> None:
    """Write the collection, the map, the queries and the model."""
    passages = folder / "data/passage-collection"
    passages.mkdir(parents=True)
    with open(passages / "part-00", "w", encoding="utf-8") as file:
        file.writelines(f"-\t\t第{row}篇\t0\n" for row in range(rows))
    with open(passages / "passage2id.map.json", "w", encoding="ascii") as file:
        file.write("{")
        file.writelines(f'{", " if row else ""}"{row}": "{row:032x}"' for row in range(rows))
        file.write("}\n")
    dev = folder / "data/dev"
    dev.mkdir()
    texts = [f"第{at}个问题是什么" for at in range(queries)]
    (dev / "dev.q.format").write_text("".join(f"{text}\t-\t-\t0\n" for text in texts), encoding="utf-8")
    (dev / "q2qid.dev.json").write_text(json.dumps({text: f"q{at}" for at, text in enumerate(texts)}))
    tiny, model = ROOT / "script/sample_data/tiny_bert", folder / "model"
    model.mkdir()
    config = json.loads((tiny / "config.json").read_text(encoding="utf-8"))
    small = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": 1,
        "num_attention_heads": 12,
        "intermediate_size": 768,
    }
    (model / "config.json").write_text(json.dumps(config | small), encoding="utf-8")
    for name in ("vocab.txt", "tokenizer_config.json"):
        shutil.copy(tiny / name, model / name)


def settings(folder: Path) -> dict[str, object]:
    """Return the options of do_dual_infer.py."""
    return {
        "dual_params": "none", "pretrained_model_path": str(folder / "model"),
        "data_dir": str(folder / "data"), "output_dir": str(folder / "output"), "precision": "fp32",
        "search_memory_gb": 1.0,
    }  # fmt: skip


def fill_vectors(folder: Path) -> None:
    """Write random vectors where do_dual_infer.py would write the model's.

    torch is imported here, in a process that does nothing else: the peak memory that the system keeps of a
    program includes that of the process which started it.
    """
    import torch

    from torch_src.dual_infer import DualInference
    from torch_src.inference_de_hparams import InferenceDeHparams
    from torch_src.retrieval.vectors import VectorStore

    hp = InferenceDeHparams(**settings(folder))
    inference = DualInference(hp, TOPK, 1000)
    stamp = {**inference.vector_stamp("passage"), "collection": inference.collection.checksum}
    rows = len(inference.collection)
    store = VectorStore.create_or_continue(hp.para_emb_path, stamp, rows, HIDDEN, hp.block_rows, print)
    for block in store.missing_blocks():
        first, last = store.block_range(block)
        draw = torch.Generator().manual_seed(block + 1)
        store.write_block(block, torch.randn(last - first, HIDDEN, generator=draw).half().numpy())


def write_answers(folder: Path) -> dict[str, float]:
    """Write dev.json with the answer of query i at rank i mod 60 + 1; return the metrics that follow."""
    places, query, number = [], None, -1
    with open(folder / "data/dev/dev.json", "w", encoding="utf-8") as file:
        for row in read_run(folder / f"output/res.top{TOPK}"):
            if row.query != query:
                query, number = row.query, number + 1
                places.append(number % PLACES + 1)
                if places[-1] > TOPK:
                    file.write(dev_line(number, query, "nowhere"))
            if row.rank == places[-1]:
                file.write(dev_line(number, query, f"{row.row:032x}"))
    count = len(places)
    return {
        "MRR@10": sum(1 / place for place in places if place <= 10) / count,
        "recall@1": sum(place == 1 for place in places) / count,
        "recall@50": sum(place <= 50 for place in places) / count,
    }


def dev_line(number: int, query: str, pid: str) -> str:
    answers = [{"paragraph_id": pid, "paragraph_text": "-"}]
    entry = {"question_id": f"q{number}", "question": query, "answer_paragraphs": answers}
    return json.dumps(entry, ensure_ascii=False) + "\n"


def run(name: str, *words) -> tuple[dict, str]:
    """Run a program; return its time and peak resident memory, and what it printed."""
    begun = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen([sys.executable, name, *map(str, words)], cwd=ROOT, stdout=out)
        _, status, usage = os.wait4(process.pid, 0)
        out.seek(0)
        text = out.read()
    if status:
        raise SystemExit(f"{name} ended with status {os.waitstatus_to_exitcode(status)}:\n{text}")
    figures = {
        "seconds": round(time.perf_counter() - begun, 1),
        "peak_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
    }
    print(f"{name:42} {figures['seconds']:8.1f} s  {figures['peak_gb']:5.2f} GB", flush=True)
    return figures, text


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--rows", type=int, default=200_000)
    options.add_argument("--queries", type=int, default=2000)
    options.add_argument("--folder", type=Path, help="where everything is kept; default: a temporary folder")
    options.add_argument("--fill", action="store_true", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.fill:
        return fill_vectors(given.folder)
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        size = f"{given.rows} {given.queries}"
        if not (folder / "size").exists():
            make_data(folder, given.rows, given.queries)
            (folder / "size").write_text(size)
        elif (folder / "size").read_text() != size:
            raise SystemExit(f"{folder}: holds another number of rows and queries; name another folder")
        subprocess.run([sys.executable, __file__, "--fill", "--folder", folder], check=True)
        words = [word for name, value in settings(folder).items() for word in (f"--{name}", value)]
        data, output = folder / "data", folder / "output"
        figures = {}
        (output / f"res.top{TOPK}.stamp.json").unlink(missing_ok=True)  # search again, on the vectors there
        figures["do_dual_infer"], text = run("do_dual_infer.py", *words)
        print("  " + "\n  ".join(line for line in text.splitlines() if " search" in line))
        expected = write_answers(folder)
        files = (
            data / "dev/q2qid.dev.json",
            data / "passage-collection/passage2id.map.json",
            output / f"res.top{TOPK}",
        )
        figures["convert"], _ = run("metric/convert_recall_res_to_json.py", *files, TOPK)
        figures["evaluation"], text = run(
            "metric/evaluation.py", data / "dev/dev.json", output / "dual_res.json"
        )
        found = json.loads(text)
        assert all(abs(found[name] - value) < 1e-4 for name, value in expected.items()), (found, expected)
        total = sum(part["seconds"] for part in figures.values())
        print(json.dumps({
            "bench": "end_to_end", "rows": given.rows, "queries": given.queries, "seconds": round(total, 1),
            "peak_gb": max(part["peak_gb"] for part in figures.values()), "metrics": found, **figures,
        }))  # fmt: skip


if __name__ == "__main__":
    main()
