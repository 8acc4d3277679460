"""Settings of do_cross_infer.py. Edit a default here, or pass `--name value`."""

from dataclasses import dataclass

from torch_src.hparams import PRECISIONS, SAMPLE_DIR, OfficialLayout, check_choice, check_range, under

PRETRAINED = "none"  # --cross_params none: a pretrained re-ranker as it is


@dataclass(frozen=True)
class InferenceCrossHparams(OfficialLayout):
    """Re-rank: output/res.top50 + output/cross_params.bin -> output/res.rerank50, output/cross_res.json."""

    # the knobs most people change first
    retrieval_result: str = ""  # run of stage one, or an official .res.tsv; empty: output_dir/res.top50
    cross_params: str = ""  # trained weights; empty: output_dir/cross_params.bin; none: not fine-tuned
    pretrained_model_path: str | None = None  # default: the model cross_params was trained from
    vocab_path: str | None = None  # default: the tokenizer cross_params was trained with
    batch_size: int = 256  # pairs in one forward pass, at most
    topk: int = 50  # passages kept for each query, whatever number is re-ranked
    fuse_retriever_weight: float = 0.0  # adds so much x the retriever's score (mean 0, variance 1 a query)

    # files
    data_dir: str = "dureader-retrieval-baseline-dataset"  # official layout; empty paths below follow it
    dev_q: str = ""  # queries, 4 columns or test1.json; empty: data_dir/dev/dev.q.format
    dev_q2qid: str = ""  # query text -> qid (JSON); empty: beside dev_q; not needed with test1.json
    dev_set: str = ""  # queries with answers; empty: data_dir/dev/dev.json; none: no scoring
    passage_dir: str = ""  # the collection, part-00.. or all_doc; empty: data_dir/passage-collection
    passage_ids: str = ""  # row -> pid (JSON); empty: passage_dir/passage2id.map.json
    output_dir: str = "output"  # where everything is written

    # fixed by the weights: the default is what they were trained with, anything else is refused
    max_seq_len: int | None = None  # tokens of query and passage together, special ones included
    remove_spaces: bool | None = None  # remove ASCII spaces from every text

    # the run
    block_pairs: int = 65536  # pairs a score file: the unit of carrying on
    tokens_per_batch: int = 0  # padded tokens in one forward pass, at most; 0: 4,096 on a CPU, 32,768 on CUDA
    precision: str = "auto"  # auto, bf16, fp16 or fp32; the last layer and the order are fp32 in any case
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    threads: int = 0  # CPU threads of this process; 0: what torch chooses
    seed: int = 42  # weights of a model that has none (the sample's)
    log_every: int = 10  # seconds between log lines
    plan: bool = False  # print time, memory and disk of this run from a short probe, and exit
    force: bool = False  # score again although the results are up to date
    debug: bool = False  # seconds on a CPU with no download: sample data, small random model

    @property
    def retrieval_result_path(self) -> str:
        return under(self.output_dir, self.retrieval_result, "res.top50")

    @property
    def cross_params_path(self) -> str:
        return under(self.output_dir, self.cross_params, "cross_params.bin")

    def check(self) -> None:
        """UserError for a value out of range."""
        check_choice("precision", self.precision, PRECISIONS)
        for name in ("batch_size", "topk", "block_pairs", "log_every"):
            check_range(name, getattr(self, name), 1)
        if self.max_seq_len is not None:
            check_range("max_seq_len", self.max_seq_len, 8)
        for name in ("threads", "seed", "fuse_retriever_weight", "tokens_per_batch"):
            check_range(name, getattr(self, name), 0)


# --debug lowers these defaults; an explicit option still wins.
DEBUG = dict(data_dir=SAMPLE_DIR, output_dir="output/debug", precision="fp32")
