"""What --plan says against what a run then takes: time, peak resident memory, disk; one program.

    python script/bench/plan.py do_dual_infer.py --data_dir D --pretrained_model_path M ... --output_dir O

All words go to the program; the output folder must be empty. Prints a table of estimate, truth and their
ratio, and last a JSON line.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
UNITS = {"h": 3600, "m": 60, "s": 1}


def seconds(text: str) -> float:
    """Return the seconds of `1h52m`, `3m07s` or `4.2s`."""
    return sum(float(number) * UNITS[unit] for number, unit in re.findall(r"([\d.]+)([hms])", text))


def estimated(words: list[str]) -> dict[str, float]:
    """Return what the plan says."""
    done = subprocess.run([sys.executable, *words, "--plan"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    print(done.stdout[done.stdout.index("plan of ") :])
    found = {"seconds": seconds(re.search(r"time in all +(\S+)", done.stdout)[1])}
    for name, label in (("memory_gb", "memory"), ("disk_gb", "disk")):
        found[name] = float(re.search(rf"^\S+ +{label} +([\d.]+) GB of", done.stdout, re.MULTILINE)[1])
    return found


def true(words: list[str], output: Path) -> dict[str, float]:
    """Run the program; return what it took. Disk: the folder's size at its end."""
    begun = time.monotonic()
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT)
    _, status, used = os.wait4(process.pid, 0)  # of this process alone, not of the probe before it
    if status:
        raise SystemExit(1)
    took, peak = time.monotonic() - begun, used.ru_maxrss * 1024 / 1e9
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file()) / 1e9
    return {"seconds": took, "memory_gb": peak, "disk_gb": size}


def main() -> None:
    words = sys.argv[1:]
    if not words or words[0].startswith("-"):
        print(__doc__)
        return
    output = Path(words[words.index("--output_dir") + 1])
    plan, truth = estimated(words), true(words, output)
    print(f"\n{'':12} {'estimate':>10} {'truth':>10} {'ratio':>7}")
    for name in plan:
        print(f"{name:12} {plan[name]:10.2f} {truth[name]:10.2f} {plan[name] / max(truth[name], 1e-9):7.2f}")
    print(json.dumps({"bench": "plan", "program": words[0], "estimate": plan, "truth": truth}))


if __name__ == "__main__":
    main()
