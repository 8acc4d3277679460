"""Settings of do_dual_infer.py. Edit a default here, or pass `--name value`."""

from dataclasses import dataclass

from torch_src.hparams import (
    POOLINGS,
    PRECISIONS,
    SAMPLE_DIR,
    OfficialLayout,
    check_choice,
    check_range,
    under,
)
from torch_src.retrieval.engines.milvus_uri import check_milvus_uri
from torch_src.runtime.errors import UserError

ENGINES = ("exact", "milvus")
OPENVINO = "openvino"
ENCODER_ENGINES = ("torch", OPENVINO)
SEARCH_PRODUCTS = ("auto", "fp32", "bf16", "int8")
PRETRAINED = "none"  # --dual_params none: the pretrained model as it is, without fine-tuning (zero-shot)


@dataclass(frozen=True)
class InferenceDeHparams(OfficialLayout):
    """Encode queries and passages, search, write the run: output/dual_params.bin -> output/res.top50."""

    # the knobs most people change first
    dual_params: str = ""  # trained weights; empty: output_dir/dual_params.bin; none: not fine-tuned
    pretrained_model_path: str | None = None  # default: the model dual_params was trained from
    vocab_path: str | None = None  # default: the tokenizer dual_params was trained with
    batch_size: int = 512  # texts in one forward pass, at most (tokens_per_batch decides)
    topk: int | None = None  # passages kept for each query; default: enter() in do_dual_infer.py
    bs: int | None = None  # queries searched at once; default: enter() in do_dual_infer.py

    index: str = ""  # approximate search by a faiss factory string (HNSW32, ...); empty: exact search
    search_params: str = ""  # of that index (or Milvus's), e.g. nprobe=64,k_factor_rf=10
    engine: str = "exact"  # exact: on this machine; milvus: where script/milvus_load.py put the vectors
    milvus_uri: str = ""  # file of Milvus Lite, or http://host:19530; empty: output_dir/milvus.db
    milvus_collection: str = "passages"  # its name there

    # files
    data_dir: str = "dureader-retrieval-baseline-dataset"  # official layout; empty paths below follow it
    dev_q: str = ""  # queries, 4 columns; empty: data_dir/dev/dev.q.format
    dev_q2qid: str = ""  # query text -> qid (JSON); empty: beside dev_q; none: not checked
    passage_dir: str = ""  # the collection, part-00.. or all_doc; empty: data_dir/passage-collection
    passage_ids: str = ""  # row -> pid (JSON); empty: passage_dir/passage2id.map.json; none: not checked
    para_emb: str = ""  # folder of passage vectors, to share them between results; empty: output_dir/para_emb
    output_dir: str = "output"  # where everything else is written

    vector_dims: int = 0  # keep the first so many dimensions (trained with matryoshka_dims); 0: all

    # fixed by the weights: the default is what they were trained with, anything else is refused
    share_encoder: bool | None = None  # one tower for queries and passages
    pooling: str | None = None  # cls, mean or pooler
    normalize: bool | None = None  # scale vectors to length 1
    query_prefix: str | None = None  # put before every query
    passage_prefix: str | None = None  # put before every passage
    q_max_seq_len: int | None = None  # tokens, [CLS] and [SEP] included
    p_max_seq_len: int | None = None  # tokens, [CLS] and [SEP] included
    remove_spaces: bool | None = None  # remove ASCII spaces from every text

    # the run
    block_rows: int = 65536  # passages a vector file: the unit of writing and of carrying on
    tokens_per_batch: int = 0  # padded tokens in one forward pass, at most; 0: 4,096 on a CPU, 32,768 on CUDA
    encoder_engine: str = "torch"  # what encodes the passages: torch, or openvino (a CPU with bf16; optional)
    workers: int = -1  # processes that tokenise ahead; 0: a thread; -1: 0 on a CPU, up to 4 on CUDA
    search_memory_gb: float = 2.0  # 10^9 bytes that the search may take beside queries and results
    search_product: str = "auto"  # first look of the search: auto, fp32, bf16 or int8; the result is the same
    recall_queries: int = 200  # queries on which an index's recall against exact search is measured
    precision: str = "auto"  # auto, bf16, fp16 or fp32 (encoding; the search is exact in any case)
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    threads: int = 0  # CPU threads of this process; 0: what torch chooses
    seed: int = 42  # weights of a model that has none (the sample's)
    log_every: int = 10  # seconds between log lines
    plan: bool = False  # print time, memory and disk of this run from a short probe, and exit
    force: bool = False  # encode and search again although the results are up to date
    debug: bool = False  # a few minutes on a CPU with no download: sample data, small random model

    @property
    def dual_params_path(self) -> str:
        return under(self.output_dir, self.dual_params, "dual_params.bin")

    @property
    def para_emb_path(self) -> str:
        return under(self.output_dir, self.para_emb, "para_emb")

    @property
    def milvus_uri_path(self) -> str:
        return under(self.output_dir, self.milvus_uri, "milvus.db")

    def check(self) -> None:
        """UserError for a value out of range."""
        check_choice("pooling", self.pooling, (*POOLINGS, None))
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("search_product", self.search_product, SEARCH_PRODUCTS)
        check_range("search_memory_gb", self.search_memory_gb, 0.01)
        for name in ("batch_size", "block_rows", "log_every"):
            check_range(name, getattr(self, name), 1)
        for name, low in (("topk", 1), ("bs", 1), ("q_max_seq_len", 3), ("p_max_seq_len", 3)):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), low)
        for name in ("threads", "seed", "tokens_per_batch", "recall_queries", "vector_dims"):
            check_range(name, getattr(self, name), 0)
        check_range("workers", self.workers, -1)
        check_choice("engine", self.engine, ENGINES)
        check_choice("encoder_engine", self.encoder_engine, ENCODER_ENGINES)
        self._check_milvus()
        if self.search_params and not self.index and self.engine != "milvus":
            raise UserError("--search_params is for an approximate --index, or for --engine milvus")

    def _check_milvus(self) -> None:
        if self.engine != "milvus":
            if self.milvus_uri or self.milvus_collection != InferenceDeHparams.milvus_collection:
                raise UserError("--milvus_uri and --milvus_collection are for --engine milvus")
            return
        check_milvus_uri(self.milvus_uri_path)
        if self.index:
            raise UserError("--index is a search on this machine: leave out either it or --engine milvus")
        if self.plan:
            raise UserError("--plan is of the encoding and search on this machine: leave out --engine milvus")


# --debug lowers these defaults; an explicit option still wins.
DEBUG = dict(data_dir=SAMPLE_DIR, output_dir="output/debug", precision="fp32")
