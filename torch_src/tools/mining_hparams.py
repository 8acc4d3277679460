"""Settings of script/mine_negatives.py. Edit a default here, or pass `--name value`."""

from dataclasses import dataclass

from torch_src.hparams import PRECISIONS, SAMPLE_DIR, OfficialLayout, check_choice, check_range, under
from torch_src.runtime.errors import UserError

NO_CROSS = "none"  # --cross_params none: no re-ranker, nothing is denoised
SELECTIONS = ("top", "sample")
SCORES_AGAINST = ("auto", "zero", "positive")
TOO_FEW = ("original", "fewer", "drop")


@dataclass(frozen=True)
class MiningHparams(OfficialLayout):
    """Mine negatives with the retriever, denoised by the re-ranker: new training files for both models."""

    # the knobs most people change first
    topk: int = 200  # passages retrieved for each training query
    negatives: int = 4  # negatives written for each positive
    cross_params: str = NO_CROSS  # trained re-ranker that drops likely false negatives; none: keep all
    max_score: float = 0.1  # keep negatives whose re-ranker probability is below this (with cross_params)
    score_against: str = "auto"  # the logit is held against zero or the best positive's; auto: as trained
    select: str = "top"  # top: highest-ranked first; sample: at random from the ranks below
    rank_from: int = 1  # first rank that may be a negative (from 1)
    rank_to: int = 0  # last rank that may be a negative; 0: topk
    too_few: str = "original"  # original: filled up from the training file; fewer: go without; drop
    promote_score: float = 0.0  # re-ranker probability above which a passage becomes a positive; 0: never

    # files
    data_dir: str = "dureader-retrieval-baseline-dataset"  # official layout; empty paths below follow it
    train_set: str = ""  # training rows, 6 columns; empty: data_dir/train/dual.train.tsv
    retrieval_result: str = ""  # run over the training queries (bm25.py's, say); empty: the retriever's own
    passage_dir: str = ""  # the collection, part-00.. or all_doc; empty: data_dir/passage-collection
    passage_ids: str = ""  # row -> pid (JSON); empty: passage_dir/passage2id.map.json
    output_dir: str = "output"  # where the trained models and the passage vectors are
    dual_params: str = ""  # trained retriever; empty: output_dir/dual_params.bin; none: not fine-tuned
    para_emb: str = ""  # its passage vectors, made when they are not there; empty: output_dir/para_emb
    mined_dir: str = ""  # where everything is written; empty: output_dir/mined

    # the run
    bs: int = 1000  # queries searched at once
    precision: str = "auto"  # auto, bf16, fp16 or fp32
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    threads: int = 0  # CPU threads of this process; 0: what torch chooses
    seed: int = 42  # of --select sample
    force: bool = False  # do it all again although the results are up to date
    debug: bool = False  # the sample collection, after the four programs with --debug

    @property
    def train_set_path(self) -> str:
        return under(self.data_dir, self.train_set, "train/dual.train.tsv")

    @property
    def mined_dir_path(self) -> str:
        return under(self.output_dir, self.mined_dir, "mined")

    @property
    def para_emb_path(self) -> str:
        return under(self.output_dir, self.para_emb, "para_emb")

    @property
    def dual_params_path(self) -> str:
        return under(self.output_dir, self.dual_params, "dual_params.bin")

    def check(self) -> None:
        """UserError for a value out of range."""
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("score_against", self.score_against, SCORES_AGAINST)
        check_choice("select", self.select, SELECTIONS)
        check_choice("too_few", self.too_few, TOO_FEW)
        for name in ("topk", "negatives", "rank_from", "bs"):
            check_range(name, getattr(self, name), 1)
        for name in ("threads", "seed"):
            check_range(name, getattr(self, name), 0)
        for name in ("max_score", "promote_score"):
            check_range(name, getattr(self, name), 0, 1)
        check_range("rank_to", self.rank_to, 0, self.topk)
        if self.rank_from > (self.rank_to or self.topk):
            raise UserError(
                f"--rank_from {self.rank_from}: behind the last rank, {self.rank_to or self.topk}"
            )
        if self.promote_score and self.cross_params == NO_CROSS:
            raise UserError("--promote_score needs a re-ranker: pass --cross_params")
        if 0 < self.promote_score <= self.max_score:
            raise UserError("--promote_score must be above --max_score")


# --debug lowers these defaults; an explicit option still wins.
DEBUG = dict(data_dir=SAMPLE_DIR, output_dir="output/debug", topk=50, precision="fp32")
