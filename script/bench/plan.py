"""Estimates of --plan against the time, peak resident memory and disk space that a program then uses.

    python script/bench/plan.py do_dual_infer.py --data_dir D --pretrained_model_path M ... --output_dir O

All arguments go to the program; the output folder must be empty. Prints a table of estimate, measurement and
ratio, then a JSON line.
"""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root

import torch_src  # noqa: F401 (first: it reports missing packages)

# isort: split

from script.bench.common import run_program

UNITS = {"h": 3600, "m": 60, "s": 1}


def seconds(text: str) -> float:
    """Return the seconds of `1h52m`, `3m07s` or `4.2s`."""
    return sum(float(number) * UNITS[unit] for number, unit in re.findall(r"([\d.]+)([hms])", text))


def estimate(words: list[str]) -> dict[str, float]:
    """Return the figures of the plan."""
    _, _, output = run_program(*words, "--plan")
    print(output[output.index("plan of ") :])

    def value(pattern: str) -> str:
        match = re.search(pattern, output, re.MULTILINE)
        if match is None:
            raise SystemExit(f"no line like {pattern} in the plan")
        return match[1]

    return {
        "seconds": seconds(value(r"total time +(\S+)")),
        "memory_gb": float(value(r"^\S+ +memory +([\d.]+) GB of")),
        "disk_gb": float(value(r"^\S+ +disk +([\d.]+) GB of")),
    }


def measurement(words: list[str], output: Path) -> dict[str, float]:
    """Run the program; return what it used. Disk: the size of its output folder at the end."""
    took, peak, _ = run_program(*words, stdout=None)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file()) / 1e9
    return {"seconds": took, "memory_gb": peak, "disk_gb": size}


def main() -> None:
    words = sys.argv[1:]
    if not words or words[0].startswith("-"):
        print(__doc__)
        return
    plan = estimate(words)
    used = measurement(words, Path(words[words.index("--output_dir") + 1]))
    print(f"\n{'':12} {'estimate':>10} {'measured':>10} {'ratio':>7}")
    for name in plan:
        print(f"{name:12} {plan[name]:10.2f} {used[name]:10.2f} {plan[name] / max(used[name], 1e-9):7.2f}")
    print(json.dumps({"bench": "plan", "program": words[0], "estimate": plan, "measured": used}))


if __name__ == "__main__":
    main()
