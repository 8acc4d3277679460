"""Settings of script/mine_negatives.py. Edit a default here, or pass `--name value`."""

from dataclasses import dataclass

from torch_src.common_hparams import Job, TrainedRetriever, TrainRows
from torch_src.hparams import NONE, under
from torch_src.runtime.errors import UserError
from torch_src.runtime.options import AT_MOST_ALL, COUNT, SHARE


@dataclass(frozen=True)
class MiningHparams(TrainRows, TrainedRetriever, Job):
    """Mine negatives with the retriever, denoised by the re-ranker: new training files for both models."""

    # main options
    topk: int = 200  # passages retrieved for each training query
    negatives: int = 4  # negatives written for each positive
    cross_params: str = NONE  # trained re-ranker that removes likely false negatives; none: keep all
    max_score: float = 0.1  # keep negatives whose re-ranker probability is below this (with cross_params)
    select: str = "top"  # top: the highest ranks first; sample: at random

    # data paths
    retrieval_result: str = ""  # run over the training queries, e.g. of bm25.py; empty: the retriever's own
    mined_dir: str = ""  # folder of the mined files; empty: output_dir/mined

    # advanced
    score_against: str = "auto"  # compare logits with zero or those of positives; auto: as trained
    rank_from: int = 1  # first rank that may be a negative (from 1)
    rank_to: int = 0  # last rank that may be a negative; 0: topk
    too_few: str = "original"  # original: add those of train_set; fewer: write fewer; drop: omit the query
    promote_score: float = 0.0  # re-ranker probability above which a passage becomes a positive; 0: never
    bs: int = 1000  # queries searched at once

    DEBUG = {"topk": 50, "precision": "fp32"}
    INPUTS = {"retrieval_result": "run over the training queries", "cross_params": "trained re-ranker"}
    CHOICES = {
        "score_against": ("auto", "zero", "positive"), "select": ("top", "sample"),
        "too_few": ("original", "fewer", "drop"),
    }  # fmt: skip
    RANGES = {
        "topk": AT_MOST_ALL, "negatives": COUNT, "max_score": SHARE, "rank_from": AT_MOST_ALL,
        "rank_to": (0,), "promote_score": SHARE, "bs": AT_MOST_ALL,
    }  # fmt: skip

    @property
    def mined_dir_path(self) -> str:
        return under(self.output_dir, self.mined_dir, "mined")

    @property
    def saved_to(self) -> str:
        return under(self.mined_dir_path, "", "mining.json")

    def check(self) -> None:
        super().check()
        last = self.rank_to or self.topk
        if last > self.topk:
            raise UserError(f"--rank_to {last}: must be at most --topk {self.topk}")
        if self.rank_from > last:
            raise UserError(f"--rank_from {self.rank_from}: must be at most the last rank, {last}")
        if self.promote_score and self.cross_params == NONE:
            raise UserError("--promote_score needs a re-ranker: pass --cross_params")
        if 0 < self.promote_score <= self.max_score:
            raise UserError("--promote_score must be above --max_score")
