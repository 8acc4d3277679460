"""Settings of do_cross_infer.py. Edit a default here, or pass `--name value`. Shared: common_hparams.py."""

from dataclasses import dataclass

from torch_src.common_hparams import DevAnswers, PlannedJob, QueryIds, WithRecipe
from torch_src.hparams import NONE, under
from torch_src.runtime.errors import UserError
from torch_src.runtime.options import AT_MOST_ALL, COUNT, COUNT_OR_OFF, FROM_0, PAIR_LENGTH, STRIDE, WINDOWS


@dataclass(frozen=True)
class InferenceCrossHparams(QueryIds, DevAnswers, PlannedJob, WithRecipe):
    """Re-rank: output/res.top50 + output/cross_params.bin -> output/res.rerank50, output/cross_res.json."""

    # main options
    retrieval_result: str = ""  # run of the retriever, or an official .res.tsv; empty: output_dir/res.top50
    cross_params: str = ""  # trained weights; empty: output_dir/cross_params.bin; none: not fine-tuned
    pretrained_model_path: str | None = None  # unset: as trained
    vocab_path: str | None = None  # unset: as trained
    topk: int = 50  # passages kept per query
    depth: int = 0  # first candidates of each query to re-rank, the others are dropped; 0: all
    batch_size: int = 2048  # maximum pairs per forward pass; fewer if they are long
    passage_windows: int = 1  # most windows of a pair longer than max_seq_len, the best one counts; 1: off
    window_stride: int = -1  # tokens that neighboring windows share; -1: a quarter of max_seq_len

    # model: a value other than the trained one is an error
    max_seq_len: int | None = None  # tokens of query and passage; unset: as trained
    remove_spaces: bool | None = None  # remove ASCII spaces from every text; unset: as trained

    # advanced
    fuse_retriever_weight: float = 0.0  # weight of the retriever's score, standardized per query; 0: off
    block_pairs: int = 65536  # pairs per score file, the unit of writing and resuming

    STAGE = "cross_infer"
    DEBUG = {"precision": "fp32", "depth": 20}
    INPUTS = {
        "retrieval_result_path": "candidates", "cross_params_path": "trained re-ranker",
        "pretrained_model_path": "model", "vocab_path": "vocabulary",
    }  # fmt: skip
    RANGES = {
        "topk": AT_MOST_ALL, "depth": COUNT_OR_OFF, "batch_size": COUNT, "fuse_retriever_weight": FROM_0,
        "max_seq_len": PAIR_LENGTH, "block_pairs": AT_MOST_ALL,
        "passage_windows": WINDOWS, "window_stride": STRIDE,
    }  # fmt: skip

    def check(self) -> None:
        super().check()
        if self.dev_q == NONE:
            raise UserError("--dev_q none: re-ranking needs the queries of its candidates; omit the option")

        if self.passage_windows == 1 and self.window_stride != InferenceCrossHparams.window_stride:
            raise UserError("--window_stride requires --passage_windows")

    @property
    def retrieval_result_path(self) -> str:
        return under(self.output_dir, self.retrieval_result, "res.top50")

    @property
    def cross_params_path(self) -> str:
        return under(self.output_dir, self.cross_params, "cross_params.bin")

    @property
    def saved_to(self) -> str:
        return under(self.output_dir, "", "cross_infer_hparams.json")
