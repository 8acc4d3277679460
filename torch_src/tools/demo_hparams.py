"""Settings of script/demo.py. Edit a default here, or pass `--name value`."""

from dataclasses import dataclass
from pathlib import Path

from torch_src.hparams import (
    POOLINGS,
    PRECISIONS,
    SAMPLE_DIR,
    OfficialLayout,
    check_choice,
    check_range,
    under,
)
from torch_src.runtime.errors import UserError

NO_CROSS = "none"  # --cross_params none: no re-ranker, recall alone


@dataclass(frozen=True)
class DemoHparams(OfficialLayout):
    """Search page on this machine: trained models and passage vectors -> a page at http://127.0.0.1:7860."""

    # the knobs most people change first
    topk: int = 50  # passages retrieved for a question, and re-ranked
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0: whoever reaches this machine may ask
    port: int = 7860  # port to listen on; 0: any free one
    cross_params: str = ""  # trained re-ranker; empty: output_dir/cross_params.bin if there; none: without
    dual_params: str = ""  # trained retriever; empty: output_dir/dual_params.bin; none: not fine-tuned
    pretrained_model_path: str | None = None  # default: the model dual_params was trained from
    vocab_path: str | None = None  # default: the tokenizer dual_params was trained with

    search_memory_gb: float = 2.0  # 10^9 bytes of vectors that may stay in memory (GPUs: what fits); 0: none
    index: str = ""  # faiss factory string of the index that do_dual_infer.py wrote; empty: exact search
    search_params: str = ""  # of that index, e.g. nprobe=64,k_factor_rf=10

    # files
    data_dir: str = "dureader-retrieval-baseline-dataset"  # official layout; empty paths below follow it
    dev_q: str = ""  # queries offered as examples if there; empty: data_dir/dev/dev.q.format; none
    passage_dir: str = ""  # the collection, part-00.. or all_doc; empty: data_dir/passage-collection
    passage_ids: str = ""  # row -> pid (JSON); empty: passage_dir/passage2id.map.json; none: rows alone
    para_emb: str = ""  # folder of passage vectors; empty: output_dir/para_emb
    output_dir: str = "output"  # models, vectors and index; nothing is written there but its cache

    # fixed by the weights: the default is what they were trained with, anything else is refused
    share_encoder: bool | None = None  # one tower for queries and passages
    pooling: str | None = None  # cls, mean or pooler
    normalize: bool | None = None  # scale vectors to length 1
    query_prefix: str | None = None  # put before every question
    passage_prefix: str | None = None  # put before every passage
    q_max_seq_len: int | None = None  # tokens, [CLS] and [SEP] included
    p_max_seq_len: int | None = None  # tokens, [CLS] and [SEP] included
    remove_spaces: bool | None = None  # remove ASCII spaces from every text

    # the run
    precision: str = "auto"  # auto (that of the vectors, on a device of their kind), bf16, fp16 or fp32
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    threads: int = 0  # CPU threads of this process; 0: what torch chooses
    seed: int = 42  # weights of a model that has none (the sample's)
    debug: bool = False  # the sample collection, after sh script/quickstart.sh

    @property
    def dual_params_path(self) -> str:
        return under(self.output_dir, self.dual_params, "dual_params.bin")

    @property
    def cross_params_path(self) -> str:
        return under(self.output_dir, self.cross_params, "cross_params.bin")

    @property
    def para_emb_path(self) -> str:
        return under(self.output_dir, self.para_emb, "para_emb")

    @property
    def reranks(self) -> bool:
        """Whether there is a re-ranker, or one was asked for by name."""
        asked = bool(self.cross_params) or Path(self.cross_params_path).exists()
        return asked and self.cross_params != NO_CROSS

    def check(self) -> None:
        """UserError for a value out of range."""
        check_choice("pooling", self.pooling, (*POOLINGS, None))
        check_choice("precision", self.precision, PRECISIONS)
        check_range("topk", self.topk, 1, 1000)
        check_range("port", self.port, 0, 65535)
        for name in ("search_memory_gb", "threads", "seed"):
            check_range(name, getattr(self, name), 0)
        for name in ("q_max_seq_len", "p_max_seq_len"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 3)
        if self.search_params and not self.index:
            raise UserError("--search_params is for an approximate --index")


# --debug lowers these defaults; an explicit option still wins.
DEBUG = dict(data_dir=SAMPLE_DIR, output_dir="output/debug")
