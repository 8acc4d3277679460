"""What both inference programs do before the work: find the model, read the queries."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from torch_src.data.formats import read_q2qid, read_queries, read_question_ids
from torch_src.hparams import NONE
from torch_src.models.backbones import architecture, load_config, model_checksum
from torch_src.models.tokenization import load_tokenizer, tokenizer_checksum
from torch_src.models.trained_settings import MODEL_FIELDS, model_fields_intact
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import read_json, require
from torch_src.runtime.log import warn
from torch_src.runtime.stamps import changed_files, checksum_files, checksum_text

LOG_SECONDS = 10.0  # between progress lines


@dataclass
class FoundModel:
    """Settings fixed by the weights, where the model lies, its tokenizer, its checksum."""

    fixed: dict
    path: str  # folder or hub name of configuration and tokenizer (and of the weights, when not fine-tuned)
    params: str | None  # NAME_params.bin; None for the pretrained model as it is
    tokenizer: PreTrainedTokenizerBase
    checksum: str
    config: object = field(repr=False, default=None)
    architecture: str = ""  # as it was read: loading weights may add to the configuration
    look_again: Callable[[], str] | None = field(repr=False, default=None)  # the checksum now

    @property
    def decides(self) -> dict:
        """Return what of the model decides its results, for a stamp."""
        return {
            "weights": self.checksum, "architecture": self.architecture,
            "tokenizer": tokenizer_checksum(self.tokenizer),
        }  # fmt: skip

    def require_unchanged(self) -> None:
        """UserError when the weights were replaced while they were loaded: the stamp would be wrong."""
        if self.look_again is not None and self.look_again() != self.checksum:
            raise UserError(f"{self.params or self.path}: changed while it was being read; run again")


def planned_before_training(hp, params_path: str) -> bool:
    """Return whether a plan is asked for that has no trained weights yet: the pretrained model will do."""
    return hp.plan and not Path(params_path).exists()


def find_trained_model(hp, name: str, params_path: str, fixed_names: tuple[str, ...]) -> FoundModel:
    """Return the model of NAME_params.bin; UserError where an option contradicts what the weights fix."""
    program = f"do_{name}_train.py" + (" --debug" if hp.debug else "")
    params = require(params_path, "trained weights", f"run {program} first, or pass --{name}_params none")
    folder = Path(params).parent
    record_path = folder / f"{name}_hparams.json"
    record = read_json(
        require(record_path, f"the settings of {name}_params.bin, which {program} writes beside it")
    )
    if "fixed_by_weights" not in record or "tokenizer" not in record:
        raise UserError(f"{record_path}: not written by {program}")
    if "checksum" in record and not model_fields_intact(record):
        raise UserError(
            f"{record_path}: checksum mismatch: {', '.join(MODEL_FIELDS)} belong to the weights and must "
            "not be edited; restore the file, or train again"
        )
    fixed = record["fixed_by_weights"]
    for knob in fixed_names:
        asked = getattr(hp, knob)
        if knob != "vocab_path" and asked is not None and asked != fixed[knob]:
            raise UserError(
                f"--{knob} {asked!r}: {params} was trained with {fixed[knob]!r}, "
                "and results made otherwise would be wrong; leave the option out, or train again"
            )
    checksum = checksum_files([params])
    if record.get("weights", checksum) != checksum:
        warn(f"{params} is not the file that {record_path} was written for; its settings are used")
    beside = folder / f"{name}_model"
    for changed in changed_files(beside, record.get("model_files", {})) if beside.exists() else ():
        raise UserError(f"{changed}: not what {program} wrote; restore it, or train again")
    path = hp.pretrained_model_path or (str(beside) if beside.exists() else record["pretrained_model_path"])
    vocab_path = hp.vocab_path or ("" if path == str(beside) else fixed["vocab_path"])
    tokenizer = load_tokenizer(path, vocab_path)
    if tokenizer_checksum(tokenizer) != record["tokenizer"]:
        raise UserError(
            f"{vocab_path or path}: its tokenizer is not the one that {params} was trained with; "
            "leave the option out"
        )
    config = load_config(path)
    shape = architecture(config)
    if beside.exists() and path != str(beside) and shape != architecture(load_config(str(beside))):
        raise UserError(
            f"{path}: its configuration is not the one that {params} was trained with; "
            "leave --pretrained_model_path out"
        )
    return FoundModel(
        fixed, path, params, tokenizer, checksum, config, shape, lambda: checksum_files([params])
    )


def find_pretrained_model(hp, trained, fixed_names: tuple[str, ...]) -> FoundModel:
    """Return the pretrained model as it is; what no option says is as in the training settings `trained`."""
    path = hp.pretrained_model_path or trained.pretrained_model_path
    fixed = {n: getattr(trained, n) if getattr(hp, n) is None else getattr(hp, n) for n in fixed_names}
    config = load_config(path)  # first: when the model is not there at all, its message is the right one
    tokenizer = load_tokenizer(path, fixed["vocab_path"])

    def checksum() -> str:
        return checksum_text(f"{model_checksum(path)} seed {hp.seed}")

    shape = architecture(config)
    return FoundModel(fixed, path, None, tokenizer, checksum(), config, shape, checksum)


def read_query_ids(hp) -> dict[str, list[str] | None]:
    """Return {query text: its qids} in file order; qids are None when they are not to be checked.

    dev_q is dev.q.format with q2qid.dev.json beside it, or JSON lines with question_id and question
    (test1.json, dev.json). UserError when a query has no qid: the conversion would fail after hours of work.
    """
    if hp.dev_q_path.endswith(".json"):
        return dict(read_question_ids(hp.dev_q_path))
    queries = read_queries(hp.dev_q_path)
    if hp.dev_q2qid == NONE:
        return dict.fromkeys(queries)
    q2qid = read_q2qid(require(hp.dev_q2qid_path, "query text -> qid", "--dev_q2qid none goes without"))
    missing = [query for query in queries if query not in q2qid]
    if missing:
        raise UserError(
            f"{hp.dev_q2qid_path}: {len(missing)} queries of {hp.dev_q_path} are missing, "
            f"the first: {missing[0][:60]!r}"
        )
    if len(q2qid) > len(queries):
        others = f"{len(queries)} of them: the others will have no result"
        warn(f"{hp.dev_q2qid_path} has {len(q2qid)} queries, {hp.dev_q_path} only {others}")
    return {query: [q2qid[query]] for query in queries}
