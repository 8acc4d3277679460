"""Run the stages in order and print one table. A stage that is up to date says so and costs seconds.

    sh script/run_all.sh                                   all stages, settings as in torch_src/*_hparams.py
    sh script/run_all.sh --debug                           the sample collection on a CPU
    sh script/run_all.sh --from cross_train                start later
    sh script/run_all.sh --data_dir D --dual_train.epoch 3
    sh script/run_all.sh --plan                            what it would take: time, memory, disk

A knob goes to every program that has it; `--STAGE.knob` goes to that one alone. Stages: check, dual_train,
dual_infer, convert, cross_train, cross_infer.
"""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: the root is not on it

from metric.evaluation import MEASURES, compute_metrics, load_reference, load_result
from torch_src import cross_hparams, dual_hparams, hparams, inference_cross_hparams, inference_de_hparams
from torch_src.data.collection import PassageCollection
from torch_src.data.formats import read_dev
from torch_src.data.passage_ids import check_length, read_passage_ids
from torch_src.inference_stage import read_query_ids
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import require, write_json
from torch_src.runtime.log import duration, log
from torch_src.runtime.program import exit_status

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = {
    "dual_train": (dual_hparams.DualHparams, dual_hparams.DEBUG),
    "dual_infer": (inference_de_hparams.InferenceDeHparams, inference_de_hparams.DEBUG),
    "cross_train": (cross_hparams.CrossHparams, cross_hparams.DEBUG),
    "cross_infer": (inference_cross_hparams.InferenceCrossHparams, inference_cross_hparams.DEBUG),
}
STAGES = ["check", "dual_train", "dual_infer", "convert", "cross_train", "cross_infer"]
TOPK = 50  # what enter() in do_dual_infer.py says; --dual_infer.topk wins


def split_options(argv: list[str], programs: dict = PROGRAMS) -> dict[str, list[str]]:
    """Return each program's options; UserError for a knob that no program has."""
    options: dict[str, list[str]] = {name: [] for name in programs}
    groups, at = [], 0
    while at < len(argv):
        end = at + 1
        while end < len(argv) and not argv[end].startswith("--"):
            end += 1
        groups.append(argv[at:end])
        at = end
    for words in groups:
        stage, _, knob = words[0].removeprefix("--").rpartition(".")
        takers = [n for n, pair in programs.items() if (not stage or n == stage) and has_knob(pair[0], knob)]
        if not takers or not words[0].startswith("--"):
            raise UserError(f"{words[0]}: no program has such a knob; see `sh script/run_all.sh --help`")
        for name in takers:
            options[name] += [f"--{knob}", *words[1:]]
    return options


def has_knob(settings: type, knob: str) -> bool:
    return knob.removeprefix("no_") in {field.name for field in dataclasses.fields(settings)}


def check_data(parsed: dict) -> None:
    """UserError unless the files of both stages are there and their ids fit together; check_data.py looks at
    every line of them.
    """
    hp = parsed["dual_infer"]
    for stage in ("dual_train", "cross_train"):
        require(
            parsed[stage].train_set_path, f"training rows of {stage}", "get it with `sh script/download.sh`"
        )
    queries = read_query_ids(hp)
    passages = len(PassageCollection(hp.passage_dir_path, str(Path(hp.output_dir) / "cache")))
    ids = read_passage_ids(hp.passage_ids_path, str(Path(hp.output_dir) / "cache"))
    check_length(hp.passage_ids_path, len(ids), passages)
    dev = parsed["cross_infer"].dev_set_path
    answered = len(read_dev(dev)) if os.path.exists(dev) else 0
    log(f"{passages:,} passages, {len(queries):,} dev queries, {answered:,} of them with answers")


def convert(hp, run_path: Path, topk: int) -> None:
    """Run metric/convert_recall_res_to_json.py as the README says."""
    files = [hp.dev_q2qid_path, hp.passage_ids_path, str(run_path), str(topk)]
    call(["metric/convert_recall_res_to_json.py", *files])


def call(command: list[str]) -> None:
    """Run a program to its end. A signal that asks us to stop is its to answer: it saves first, we wait."""
    # A session of its own: a terminal's Ctrl-C would reach it once by itself and once through us.
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, start_new_session=True)
    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            before[number] = signal.signal(number, lambda number, _: process.send_signal(number))
    except ValueError:
        pass  # not the main thread: who runs us there stops the program himself
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if status:
        raise UserError(
            f"{command[0]} ended with status {status}; the same command carries on after the mend"
        )


def table(times: dict[str, float], dev: str, output: Path) -> list[str]:
    """Return the lines of the closing table; metrics stand beside the stage whose result they are."""
    results = {"convert": output / "dual_res.json", "cross_infer": output / "cross_res.json"}
    lines = [f"{'stage':12} {'time':>8}  " + "  ".join(f"{name:>9}" for name in MEASURES)]
    for stage in STAGES:
        took = duration(times[stage]) if stage in times else "-"
        figures = figures_of(dev, results[stage]) if stage in results else ""
        lines.append(f"{stage:12} {took:>8}  {figures}".rstrip())
    return lines


def figures_of(dev: str, result: Path) -> str:
    """Return the metrics of a result as a line of the table; nothing where it is not there."""
    if not result.exists() or not os.path.exists(dev):
        return ""
    metrics = compute_metrics(load_reference(dev), load_result(result))
    return "  ".join(f"{metrics[name]:9.4f}" for name in MEASURES)


def run(argv: list[str]) -> None:
    """Run the stages from `--from` on."""
    first = STAGES[0]
    if "--from" in argv:
        at = argv.index("--from")
        first, argv = (argv[at + 1 : at + 2] or ["nothing"])[0], argv[:at] + argv[at + 2 :]
        if first not in STAGES:
            raise UserError(f"--from {first}: expected one of {', '.join(STAGES)}")
    options = split_options(argv)
    parsed = {name: hparams.parse(pair[0], options[name], pair[1]) for name, pair in PROGRAMS.items()}
    infer = parsed["dual_infer"]
    if infer.topk and not parsed["cross_infer"].retrieval_result:
        options["cross_infer"] += ["--retrieval_result", str(Path(infer.output_dir) / f"res.top{infer.topk}")]
    if infer.plan:
        for stage in PROGRAMS:
            call([f"do_{stage}.py", *options[stage]])
        return
    output, times = Path(infer.output_dir), {}
    for stage in STAGES[STAGES.index(first) :]:
        log(f"== {stage}")
        begun = time.monotonic()
        if stage == "check":
            check_data(parsed)
        elif stage == "convert":
            topk = infer.topk or TOPK
            convert(infer, output / f"res.top{topk}", topk)
        else:
            call([f"do_{stage}.py", *options[stage]])
        times[stage] = time.monotonic() - begun
    lines = table(times, parsed["cross_infer"].dev_set_path, output)
    print("\n" + "\n".join(lines), flush=True)
    write_json(output / "run_all.json", {"seconds": {name: round(took, 1) for name, took in times.items()}})


def start(program: Callable[[list[str]], None], doc: str, argv: list[str]) -> int:
    """Run program(argv), or print its help; return the exit status."""
    if "--help" in argv or "-h" in argv:
        print(doc)
        return 0
    return exit_status(lambda: program(argv))


def main(argv: list[str]) -> int:
    """Return the exit status."""
    return start(run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
