"""Run the stages in order and print one table. A stage that is up to date is skipped within seconds.

    sh script/run_all.sh                                   all stages, settings as in torch_src/*_hparams.py
    sh script/run_all.sh --debug                           the sample collection on a CPU
    sh script/run_all.sh --from cross_train                start at this stage
    sh script/run_all.sh --data_dir D --dual_train.epoch 3
    sh script/run_all.sh --plan                            print time, memory and disk, then exit

An option goes to every program that has it, `--STAGE.option` to that program alone. Stages: check,
dual_train, dual_infer, convert, cross_train, cross_infer. `python do_dual_train.py --help` etc. list the
options.

Needs the packages of script/quickstart.sh; without --debug also the data and the model that
script/download.sh gets, and a GPU. --debug takes some minutes on a CPU, --plan names the hours of your
machine. Writes to output/ (output/debug with --debug); the same command resumes after a kill.
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
from torch_src import hparams
from torch_src.cross_hparams import CrossHparams
from torch_src.data.collection import PassageCollection
from torch_src.data.formats import read_dev
from torch_src.data.passage_ids import check_length, read_passage_ids
from torch_src.dual_hparams import DualHparams
from torch_src.inference_cross_hparams import InferenceCrossHparams
from torch_src.inference_de_hparams import InferenceDeHparams
from torch_src.inputs import check_inputs
from torch_src.query_ids import read_query_ids
from torch_src.runtime.commands import command
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import read_json, require, write_json
from torch_src.runtime.log import duration, log
from torch_src.runtime.outputs import TIMES, Output, check_outputs
from torch_src.runtime.program import exit_status

ROOT = Path(__file__).resolve().parents[1]
Programs = dict[str, type[hparams.Hparams]]
PROGRAMS: Programs = {
    "dual_train": DualHparams,
    "dual_infer": InferenceDeHparams,
    "cross_train": CrossHparams,
    "cross_infer": InferenceCrossHparams,
}
STAGES = ["check", "dual_train", "dual_infer", "convert", "cross_train", "cross_infer"]
TOPK = 50  # the value of enter() in do_dual_infer.py; --dual_infer.topk wins


def split_options(argv: list[str], programs: Programs = PROGRAMS) -> dict[str, list[str]]:
    """Return each program's options; UserError for an option that no program has."""
    options: dict[str, list[str]] = {name: [] for name in programs}
    takers: list[str] = []
    for at, word in enumerate(argv):
        if at and not word.startswith("--"):
            for name in takers:
                options[name].append(word)
            continue
        stage, _, knob = word.removeprefix("--").rpartition(".")
        takers = [n for n, settings in programs.items() if stage in ("", n) and has_knob(settings, knob)]
        if not takers or not word.startswith("--"):
            raise UserError(
                f"{word}: no program has this option; see `{command('do_dual_train.py', '--help')}` etc."
            )
        for name in takers:
            options[name].append(f"--{knob}")
    return options


def has_knob(settings: type[hparams.Hparams], knob: str) -> bool:
    return knob.removeprefix("no_") in {field.name for field in dataclasses.fields(settings)}


def check_starts(argv: list[str], first: str) -> None:
    """UserError for a start of cross_train that would also replace a model that these stages train."""
    for kind in ("dual", "cross"):
        if f"--{kind}_params" in argv and STAGES.index(first) <= STAGES.index(f"{kind}_train"):
            raise UserError(
                f"--{kind}_params: {kind}_infer would not use the model that {kind}_train trains; pass "
                f"--cross_train.{kind}_params for the start of the re-ranker, or --from {kind}_infer"
            )


def check_data(train_sets: list[str], hp: InferenceDeHparams, dev_set: str) -> None:
    """UserError unless the input files exist and their ids fit together; check_data.py checks every line."""
    check_inputs(hp, None, passage_dir_path="passages", dev_q_path="queries")
    for path in train_sets:
        require(path, "training rows")
    queries = read_query_ids(hp)
    cache = str(Path(hp.output_dir) / "cache")
    passages = len(PassageCollection(hp.passage_dir_path, cache))
    check_length(hp.passage_ids_path, len(read_passage_ids(hp.passage_ids_path, cache)), passages)
    answered = len(read_dev(dev_set)) if os.path.exists(dev_set) else 0
    log(f"{passages:,} passages, {len(queries):,} dev queries, {answered:,} of them with answers")


def conversion(hp: InferenceDeHparams, run_path: Path, topk: int) -> list[str]:
    """Return the command of metric/convert_recall_res_to_json.py as in the README."""
    files = [hp.dev_q2qid_path, hp.passage_ids_path, str(run_path), str(topk)]
    return ["metric/convert_recall_res_to_json.py", *files]


def call(command: list[str]) -> None:
    """Run a program to its end. It gets the stop signals of this process and saves before it ends."""
    # In a session of its own: otherwise Ctrl-C in a terminal would reach the program twice.
    words = [str(ROOT / command[0]), *command[1:]]
    process = subprocess.Popen([sys.executable, *words], start_new_session=True)
    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            before[number] = signal.signal(number, lambda number, _: process.send_signal(number))
    except ValueError:
        pass  # only the main thread may set handlers
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if status:
        raise UserError(
            f"{command[0]} ended with status {status}; the same command resumes once the cause is fixed"
        )


def table(times: dict[str, float], dev: str, output: Path) -> list[str]:
    """Return the lines of the closing table, with metrics in the row of the stage that wrote the result."""
    results = {"convert": output / "dual_res.json", "cross_infer": output / "cross_res.json"}
    lines = [f"{'stage':12} {'time':>8}  " + "  ".join(f"{name:>9}" for name in MEASURES)]
    for stage in STAGES:
        took = duration(times[stage]) if stage in times else "-"
        figures = figures_of(dev, results[stage]) if stage in results else ""
        lines.append(f"{stage:12} {took:>8}  {figures}".rstrip())
    return lines


def figures_of(dev: str, result: Path) -> str:
    """Return the metrics of a result as a line of the table; empty without the result."""
    if not result.exists() or not os.path.exists(dev):
        return ""
    metrics = compute_metrics(load_reference(dev), load_result(result))
    return "  ".join(f"{metrics[name]:9.4f}" for name in MEASURES)


def recorded_seconds(path: Path) -> dict[str, float]:
    """Return the seconds of each stage in run_all.json; empty without a readable one."""
    try:
        seconds = read_json(path).get("seconds")
    except UserError:
        return {}
    return {name: seconds[name] for name in STAGES if name in seconds} if isinstance(seconds, dict) else {}


def modified(path: Path) -> int:
    """Return when a file was written, in nanoseconds; 0 without it."""
    return path.stat().st_mtime_ns if path.exists() else 0


def run(argv: list[str], start_program: Callable[[list[str]], None] | None = None) -> None:
    """Run the stages from `--from` on; `start_program` runs one to its end, by default as `call` does."""
    start_program = start_program or call
    first = STAGES[0]
    if "--from" in argv:
        at = argv.index("--from")
        first, argv = (argv[at + 1 : at + 2] or ["nothing"])[0], argv[:at] + argv[at + 2 :]
        if first not in STAGES:
            raise UserError(f"--from {first}: expected one of {', '.join(STAGES)}")
    options = split_options(argv)
    check_starts(argv, first)
    dual = hparams.parse(DualHparams, options["dual_train"])
    infer = hparams.parse(InferenceDeHparams, options["dual_infer"])
    cross = hparams.parse(CrossHparams, options["cross_train"])
    rerank = hparams.parse(InferenceCrossHparams, options["cross_infer"])
    if infer.topk and not rerank.retrieval_result:
        options["cross_infer"] += ["--retrieval_result", str(Path(infer.output_dir) / f"res.top{infer.topk}")]
    if infer.plan:
        for stage in PROGRAMS:
            start_program([f"do_{stage}.py", *options[stage]])
        return
    output, topk = Path(infer.output_dir), infer.topk or TOPK
    results = {
        "dual_train": "dual_params.bin", "dual_infer": f"res.top{topk}", "convert": "dual_res.json",
        "cross_train": "cross_params.bin", "cross_infer": f"res.rerank{rerank.topk}",
    }  # fmt: skip
    check_outputs([Output(output / "run_all.json", TIMES)], infer.inputs)
    times: dict[str, float] = {}
    seconds = recorded_seconds(output / "run_all.json")
    for stage in STAGES[STAGES.index(first) :]:
        log(f"== {stage}")
        begun, result = time.monotonic(), output / results.get(stage, "")
        before = modified(result)
        if stage == "check":
            check_data([dual.train_set_path, cross.train_set_path], infer, rerank.dev_set_path)
        elif stage == "convert":
            start_program(conversion(infer, output / f"res.top{topk}", topk))
        else:
            start_program([f"do_{stage}.py", *options[stage]])
        times[stage] = time.monotonic() - begun
        was_up_to_date = stage in results and modified(result) == before
        if not was_up_to_date or stage not in seconds:
            seconds[stage] = round(times[stage], 1)
    lines = table(times, rerank.dev_set_path, output)
    print("\n" + "\n".join(lines), flush=True)
    write_json(output / "run_all.json", {"seconds": seconds})


def start(program: Callable[[list[str]], None], doc: str, argv: list[str]) -> int:
    """Run program(argv), or print `doc` for --help; return the exit status."""
    if "--help" in argv or "-h" in argv:
        return exit_status(lambda: print(doc))
    return exit_status(lambda: program(argv))


def main(argv: list[str]) -> int:
    """Return the exit status."""
    return start(run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
