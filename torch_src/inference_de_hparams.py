"""Settings of do_dual_infer.py. Edit a default here, or pass `--name value`. Shared: common_hparams.py."""

from dataclasses import dataclass

from torch_src.common_hparams import PlannedJob, QueryIds, TrainedRetriever
from torch_src.hparams import NONE, POOLINGS, under
from torch_src.retrieval import index_options
from torch_src.retrieval.engines import milvus_options
from torch_src.runtime.errors import UserError
from torch_src.runtime.options import AT_MOST_ALL, COUNT, COUNT_OR_OFF, LENGTH, STRIDE, WINDOWS

OPENVINO = "openvino"


@dataclass(frozen=True)
class RetrieverHparams(TrainedRetriever):
    """Model and search settings that do_dual_infer.py and script/demo.py share."""

    # main options
    pretrained_model_path: str | None = None  # unset: as trained
    vocab_path: str | None = None  # unset: as trained

    # model: a value other than the trained one is an error
    share_encoder: bool | None = None  # one encoder for queries and passages; unset: as trained
    pooling: str | None = None  # how token vectors become one vector; unset: as trained
    normalize: bool | None = None  # scale vectors to length 1; unset: as trained
    query_prefix: str | None = None  # put before every query; unset: as trained
    passage_prefix: str | None = None  # put before every passage; unset: as trained
    q_max_seq_len: int | None = None  # tokens of a query, as in training; unset: as trained
    p_max_seq_len: int | None = None  # tokens of a passage, as in training; unset: as trained
    remove_spaces: bool | None = None  # remove ASCII spaces from every text; unset: as trained

    # search
    index: str = ""  # search with a faiss index (Flat, HNSW32, ...), on the GPUs if any; empty: exact search
    search_params: str = ""  # search parameters of that index (or of Milvus), e.g. nprobe=64,k_factor_rf=10
    search_memory_gb: float = 2.0  # memory for passage vectors during the search, in 10^9 bytes

    INPUTS = {"pretrained_model_path": "model", "vocab_path": "vocabulary"}
    CHOICES = {"pooling": POOLINGS}
    RANGES = {"q_max_seq_len": LENGTH, "p_max_seq_len": LENGTH, "search_memory_gb": (0.01,)}

    def check(self) -> None:
        super().check()
        if self.index:
            index_options.check_factory(self.index)
            index_options.check_search_params(self.search_params)


@dataclass(frozen=True)
class InferenceDeHparams(RetrieverHparams, QueryIds, PlannedJob):
    """Encode queries and passages, search, write the run: output/dual_params.bin -> output/res.top50."""

    # main options
    topk: int | None = None  # passages kept per query; unset: as in enter() of do_dual_infer.py
    bs: int | None = None  # queries searched at once; unset: as in enter() of do_dual_infer.py
    batch_size: int = 4096  # maximum texts per forward pass; fewer if they are long

    # search
    engine: str = "exact"  # exact: on this machine; milvus: in the collection of script/milvus_load.py
    milvus_uri: str = ""  # file of Milvus Lite, or http://host:19530; empty: output_dir/milvus.db
    milvus_collection: str = "passages"  # name of the collection in Milvus
    passage_windows: int = 1  # most windows of a passage longer than p_max_seq_len, a vector each; 1: off
    window_stride: int = -1  # tokens that neighboring windows share; -1: a quarter of p_max_seq_len
    vector_dims: int = 0  # store only the first dimensions (see matryoshka_dims); 0: all
    recall_queries: int = 200  # queries to compare an index with exact search; 0: none

    # advanced
    block_rows: int = 65536  # passages per vector file, the unit of writing and resuming
    encoder_engine: str = "torch"  # for passages; openvino: faster on a CPU with bf16
    workers: int = -1  # processes that tokenize ahead; 0: a thread; -1: 0 on a CPU, up to 16 on CUDA

    DEBUG = {"precision": "fp32"}
    CHOICES = {"engine": ("exact", "milvus"), "encoder_engine": ("torch", OPENVINO)}
    RANGES = {
        "topk": AT_MOST_ALL, "bs": AT_MOST_ALL, "batch_size": COUNT, "vector_dims": COUNT_OR_OFF,
        "recall_queries": (0,), "block_rows": AT_MOST_ALL, "workers": (-1, 256),
        "passage_windows": WINDOWS, "window_stride": STRIDE,
    }  # fmt: skip

    @property
    def milvus_uri_path(self) -> str:
        return under(self.output_dir, self.milvus_uri, "milvus.db")

    @property
    def saved_to(self) -> str:
        return under(self.output_dir, "", "dual_infer_hparams.json")

    def check(self) -> None:
        super().check()
        if self.search_params and not self.index and self.engine != "milvus":
            raise UserError("--search_params requires --index or --engine milvus")
        if self.passage_windows == 1 and self.window_stride != InferenceDeHparams.window_stride:
            raise UserError("--window_stride requires --passage_windows")
        if self.dev_q == NONE and (self.index or self.engine != "exact"):
            raise UserError("--dev_q none encodes the passages only: omit --index and --engine")
        if self.engine == "milvus":
            milvus_options.check_milvus_uri(self.milvus_uri_path)
            milvus_options.check_search_params(self.milvus_uri_path, self.search_params)
            if self.index or self.plan:
                option = "--index" if self.index else "--plan"
                raise UserError(f"{option} cannot be combined with --engine milvus")
        elif self.milvus_uri or self.milvus_collection != InferenceDeHparams.milvus_collection:
            raise UserError("--milvus_uri and --milvus_collection require --engine milvus")
