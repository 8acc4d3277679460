"""Settings of script/demo.py. Edit a default here, or pass `--name value`."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from torch_src.common_hparams import Queries, Run
from torch_src.dual_hparams import MODEL_SETTINGS
from torch_src.hparams import NONE, under
from torch_src.inference_cross_hparams import InferenceCrossHparams
from torch_src.inference_de_hparams import InferenceDeHparams, RetrieverHparams
from torch_src.inputs import LATER, check_data, check_named
from torch_src.runtime.commands import command
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import read_json
from torch_src.runtime.options import FROM_0
from torch_src.saved_settings import RERANKER, SAVED, WINDOWS, read_saved, saved_search

# Other values of these than the saved ones do not fit the vectors.
FIXED = ("data_dir", "passage_dir", "dual_params", "para_emb", "pretrained_model_path", *MODEL_SETTINGS)


@dataclass(frozen=True)
class DemoHparams(RetrieverHparams, Queries, Run):
    """Search page on this machine: what the programs wrote to output_dir -> a page at http://127.0.0.1:7860."""

    # main options
    topk: int = 50  # passages retrieved for a question, and re-ranked
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0: other machines can send queries
    port: int = 7860  # port to listen on; 0: any free one
    cross_params: str = ""  # trained re-ranker; empty: output_dir/cross_params.bin; none: no re-ranker
    reranker: str = ""  # folder or hub name of one that was not trained here; empty: cross_params; none: none

    # search
    bm25: str = ""  # folder of bm25.py; empty: output_dir/bm25, else output_dir/cache/bm25; none: no BM25
    fuse_retriever_weight: float | None = None  # as for do_cross_infer.py; unset: as saved there, else 2

    RANGES = {
        "topk": (1, 1000), "port": (0, 65535), "search_memory_gb": (0,), "fuse_retriever_weight": FROM_0,
    }  # fmt: skip

    @property
    def cross_params_path(self) -> str:
        return under(self.output_dir, self.cross_params, "cross_params.bin")


Settings = TypeVar("Settings", bound=DemoHparams)


def demo_settings(options: Mapping[str, Any]) -> DemoHparams:
    """Return the settings of the page: options, else those saved in output_dir, else the defaults."""
    return search_settings(DemoHparams, options)


def search_settings(settings: type[Settings], options: Mapping[str, Any]) -> Settings:
    """Return the settings: options, else what the programs saved in output_dir, else the defaults."""
    plain = settings.defaults(options.get("debug", False))
    folder = options.get("output_dir", plain.output_dir)
    found = saved_search(folder, settings)
    if rerank := read_saved(folder, "cross_infer_hparams.json"):
        found["fuse_retriever_weight"] = rerank["fuse_retriever_weight"]
        if rerank["cross_params"] != NONE:
            found["cross_params"] = rerank["cross_params"]
        elif "cross_params" not in options:
            found["reranker"] = rerank["pretrained_model_path"] or ""
    hp = replace(plain, **{**found, **options})
    hp.check()
    if hp.search_params and not hp.index:
        raise UserError("--search_params is for an approximate --index")
    return hp


def check_folders(hp: DemoHparams, options: Mapping[str, Any], fix: str) -> None:
    """UserError for a missing path of an option, and for an output folder without passages (`fix`)."""
    check_named(hp, {*LATER, *(vars(hp).keys() - options.keys())})
    is_known = any(read_saved(hp.output_dir, name) for name in SAVED)
    if "output_dir" in options and not is_known and not Path(hp.passage_dir_path).is_dir():
        exists = Path(hp.output_dir).is_dir()
        what = "no settings of do_dual_infer.py in this folder" if exists else "no such folder"
        raise UserError(f"--output_dir {hp.output_dir}: {what}; {fix}")
    check_data(hp, passage_dir_path="passages")


def reranker_hparams(hp: DemoHparams) -> InferenceCrossHparams | None:
    """Return the settings of do_cross_infer.py for the re-ranker; None without one."""
    saved = read_saved(hp.output_dir, "cross_infer_hparams.json")
    common = {name: getattr(hp, name) for name in ("seed", "debug", "device", "precision", "threads")}
    common |= {name: saved[name] for name in WINDOWS if name in saved}
    if hp.reranker == NONE:
        return None
    if folder := hp.reranker or second_stage(hp):
        same = {name: saved[name] for name in RERANKER if name in saved and saved["cross_params"] == NONE}
        more = same if same.get("pretrained_model_path") == folder else {}
        return InferenceCrossHparams(cross_params=NONE, **{**more, "pretrained_model_path": folder}, **common)
    named = bool(hp.cross_params) or Path(hp.cross_params_path).exists()
    if not named or hp.cross_params == NONE:
        return None
    return InferenceCrossHparams(cross_params=hp.cross_params_path, **common)


def second_stage(hp: DemoHparams) -> str:
    """Return the folder of a retriever that was not trained here and is a re-ranker as well; else empty."""
    folder = hp.pretrained_model_path or ""
    config = Path(folder) / "config.json"
    if hp.cross_params or hp.dual_params != NONE or not folder or not config.exists():
        return ""
    if Path(hp.cross_params_path).exists():
        return ""
    entries = read_json(config)
    is_head = (entries.get("architectures") or [""])[0].endswith("ForSequenceClassification")
    return folder if is_head and len(entries.get("id2label", ())) == 1 else ""


def infer_command(hp: DemoHparams) -> str:
    """Return the command line of do_dual_infer.py that writes the vectors for these settings."""
    plain = DemoHparams.defaults(hp.debug)
    words = ["--debug"] if hp.debug else []
    for name in (knob.name for knob in fields(InferenceDeHparams) if hasattr(plain, knob.name)):
        value = getattr(hp, name)
        if value != getattr(plain, name) and name not in ("debug", "topk", "search_memory_gb"):
            words += [f"--{name}", str(value)]
    return command("do_dual_infer.py", *words)


def how_to_fix(hp: DemoHparams) -> tuple[str, str]:
    """Return what to do about vectors that do not fit, in English and Chinese.

    Never a command that would replace good ones.
    """
    saved = read_saved(hp.output_dir, "dual_infer_hparams.json")
    if not saved:
        return (
            "name the model and settings that they were made with (--dual_params, --pooling, ...)",
            "请用选项写明生成它们的模型和设置（--dual_params、--pooling 等）",
        )
    changed = [name for name in FIXED if name in saved and getattr(hp, name) != saved[name]]
    if changed:
        options = " ".join(f"--{name}" for name in changed)
        return f"omit {options}", f"去掉 {options}"
    return f"run {infer_command(hp)} again", f"重新运行 {infer_command(hp)}"
