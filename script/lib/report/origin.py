"""Where a run comes from: models, settings and commit, from the files beside it."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from script.lib.report.data import RERANKER, Report
from script.lib.report.hparams import ReportHparams
from script.lib.report.words import Both, same
from torch_src import hparams
from torch_src.cross_hparams import CrossHparams
from torch_src.dual_hparams import DualHparams
from torch_src.inference_cross_hparams import InferenceCrossHparams
from torch_src.inference_de_hparams import InferenceDeHparams
from torch_src.runtime.errors import UserError
from torch_src.saved_settings import read_saved

Saved = dict[str, Any]
HIDDEN = {"output_dir", "debug"}  # settings that say nothing about the result
ENTER = {"topk": 50, "bs": 1000}  # what enter() of do_dual_infer.py sets where the settings leave it open


@dataclass(frozen=True)
class Origin:
    """The header of the report: facts by name, and the settings that differ from the defaults."""

    facts: list[tuple[Both, Both]]
    files: list[tuple[Both, Path]]  # of the runs
    settings: list[list[str]]  # program, setting, value, default


def saved_beside(path: Path, name: str) -> Saved:
    """Return the settings that a program saved in the folder of `path`; empty without a readable file."""
    try:
        return read_saved(str(path.parent), name)
    except UserError:
        return {}


def read_origin(hp: ReportHparams, report: Report) -> Origin:
    """Return the header. What is not saved beside the runs is missing from it."""
    facts, settings, commits = [], [], []
    models = (
        (report.stages[0], "dual", DualHparams, InferenceDeHparams),
        (report.stage(RERANKER), "cross", CrossHparams, InferenceCrossHparams),
    )
    for stage, model, training, inference in models:
        if stage is None:
            continue
        used = saved_beside(stage.path, f"{model}_infer_hparams.json")
        trained = {}
        if used.get(f"{model}_params") != hparams.NONE:
            params = Path(str(used.get(f"{model}_params") or stage.path))
            trained = saved_beside(params, f"{model}_hparams.json")
        if used or trained:
            facts.append((stage.name, model_of(used, trained, training)))
        settings += changed(f"do_{model}_train.py", trained, training)
        settings += changed(f"do_{model}_infer.py", used, inference)
        commits.append(str(used.get("commit") or ""))
    sizes = (f"{len(report.qids):,}", f"{len(report.collection):,}")
    facts.append(
        (
            Both("data", "数据"),
            Both(
                f"{hp.data_dir}: {sizes[0]} queries, {sizes[1]} passages",
                f"{hp.data_dir}：{sizes[0]} 个问题，{sizes[1]} 个段落",
            ),
        )
    )
    made = max(stage.path.stat().st_mtime for stage in report.stages)
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(made))
    facts.append((Both("date of the runs", "结果时间"), same(when)))
    if commit := " / ".join(dict.fromkeys(filter(None, commits))):
        facts.append((Both("commit of the runs", "结果的版本"), same(commit)))
    elif commit := hparams.commit():
        facts.append((Both("commit of this checkout", "当前代码版本"), same(commit)))
    return Origin(facts, [(stage.name, stage.path) for stage in report.stages], settings)


def model_of(used: Saved, trained: Saved, training: type[DualHparams] | type[CrossHparams]) -> Both:
    """Return the model of a stage and whether it was fine-tuned."""
    start = trained.get("pretrained_model_path") or used.get("pretrained_model_path")
    path = str(start or training().pretrained_model_path)
    if not trained:
        return Both(f"{path}, not fine-tuned", f"{path}，未微调") if used else same(path)
    epochs = trained.get("epoch")
    return Both(f"{path}, fine-tuned ({epochs} epochs)", f"{path}，微调 {epochs} 轮")


def changed(program: str, saved: Saved, settings: type[hparams.Hparams]) -> list[list[str]]:
    """Return [program, setting, value, default] of the saved settings that differ from the defaults."""
    plain = vars(settings.defaults(saved.get("debug") is True))
    defaults = {name: ENTER.get(name) if value is None else value for name, value in plain.items()}
    return [
        [program, name, repr(saved[name]), repr(default)]
        for name, default in defaults.items()
        if name in saved and name not in HIDDEN and saved[name] != default
    ]
