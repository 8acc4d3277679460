"""Peak memory of do_dual_infer.py, once and with the passages repeated to N rows.

    python script/bench/memory.py --rows 1000000

The passages of --data_dir are repeated to --rows, encoded with a 2-layer, 64-wide model at 32 tokens, and
searched. Prints the peak resident memory of both runs as the operating system has it, last as a JSON line.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def make_model(folder: Path) -> None:
    """Write a 2-layer, 64-wide BERT over the sample's vocabulary; its weights are drawn from the seed."""
    tiny = ROOT / "script/sample_data/tiny_bert"
    folder.mkdir()
    config = json.loads((tiny / "config.json").read_text(encoding="utf-8"))
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    (folder / "config.json").write_text(json.dumps(config | small), encoding="utf-8")
    for name in ("vocab.txt", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny / name).read_bytes())


def repeat_collection(source: Path, target: Path, rows: int) -> None:
    """Write the passages of `source` again and again, `rows` lines in one part, and a map of made-up ids."""
    target.mkdir()
    lines = [line for part in sorted(source.glob("part-*")) for line in part.read_bytes().split(b"\n")[:-1]]
    with open(target / "part-00", "wb") as file:
        for row in range(rows):
            file.write(lines[row % len(lines)] + b"\n")
    with open(target / "passage2id.map.json", "w", encoding="ascii") as file:
        file.write("{")
        file.writelines(f'{", " if row else ""}"{row}": "{row:032x}"' for row in range(rows))
        file.write("}\n")


def peak_mb(data_dir: Path, passages: Path, model: Path, output: Path) -> float:
    """Run do_dual_infer.py and return the peak resident memory of its process in 10^6 bytes."""
    command = [sys.executable, "do_dual_infer.py", "--data_dir", data_dir, "--passage_dir", passages]
    command += ["--dual_params", "none", "--pretrained_model_path", model, "--output_dir", output]
    command += ["--p_max_seq_len", "32", "--batch_size", "512", "--precision", "fp32", "--force"]
    process = subprocess.Popen([str(word) for word in command], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"do_dual_infer.py ended with status {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_dir", type=Path, default=ROOT / "script/sample_data")
    parser.add_argument("--rows", type=int, default=1_000_000)
    given = parser.parse_args()
    data_dir = given.data_dir.resolve()
    source = data_dir / "passage-collection"
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_model(work / "model")
        small = peak_mb(data_dir, source, work / "model", work / "small")
        repeat_collection(source, work / "many", given.rows)
        large = peak_mb(data_dir, work / "many", work / "model", work / "large")
    print(f"peak resident memory: {small:.0f} MB once, {large:.0f} MB at {given.rows:,} rows")
    figures = {"rows": given.rows, "once_mb": small, "many_mb": large, "growth_mb": large - small}
    print(json.dumps({name: round(value) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
