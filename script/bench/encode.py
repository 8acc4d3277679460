"""Passages to vectors, ours against sentence-transformers.encode: same weights, texts, length and threads.

    python -m pip install -r script/bench/requirements.txt
    python script/bench/encode.py --data_dir D --model M --count 512
    python script/bench/encode.py --data_dir D --model M --random_hidden 768 --count 128

`ours` reads the collection, tokenises, encodes and writes fp16 blocks. `st` is SentenceTransformer.encode as
people call it (fp32, batches of 32 of its own length sort); `st_N` the same in batches of N. --random_hidden
H takes a 12-layer BERT of that width with random weights over the model's vocabulary. Mean pooling,
normalised, 384 tokens. With --openvino our first side encodes by OpenVINO (requirements-openvino.txt), and
the ratios are its.
"""

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run by path: the root is not on it

import numpy as np
import torch
from common import compare, parser
from peers import bi_encoder
from transformers import AutoConfig, AutoTokenizer, BertConfig, BertModel

from torch_src.data.collection import PassageCollection
from torch_src.inference_de_hparams import OPENVINO
from torch_src.models.dual_encoder import load_backbone
from torch_src.models.tokenization import TextRules, load_tokenizer
from torch_src.retrieval.encoding import Encoder, encode_collection
from torch_src.retrieval.engines.openvino import TOKENS, OpenVinoTower
from torch_src.retrieval.vectors import VectorStore
from torch_src.runtime.devices import choose_precision, set_threads, token_budget

LENGTH, PREFIX = 384, "passage: "
CPU = torch.device("cpu")


def texts(given) -> list[str]:
    """Return `count` passages, evenly spread over the collection."""
    collection = PassageCollection(Path(given.data_dir) / "passage-collection")
    rows = np.linspace(0, len(collection) - 1, given.count).astype(int)
    return [collection[int(row)] for row in rows]


def ours(given, engine: str = "torch") -> dict:
    set_threads(0)
    precision = choose_precision(given.precision, CPU)
    config = AutoConfig.from_pretrained(given.model)
    tower = load_backbone(given.model, config, "mean", 0).eval()
    budget = token_budget(given.tokens_per_batch, CPU)
    if engine == OPENVINO:
        tower, budget = OpenVinoTower(tower, precision), given.tokens_per_batch or TOKENS
    rules, tokenizer = TextRules(LENGTH, PREFIX), load_tokenizer(given.model)
    encoder = Encoder(tower, tokenizer, rules, "mean", True, CPU, precision, 512, budget)
    encoder.encode(texts(given)[:8])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with open(folder / "part-00", "w", encoding="utf-8", newline="") as file:
            file.writelines(f"-\t\t{text}\t0\n" for text in texts(given))
        begun = time.perf_counter()
        collection = PassageCollection(folder)
        store = VectorStore.create_or_continue(
            folder / "emb", {}, len(collection), config.hidden_size, 65536, print
        )
        encode_collection(encoder, collection, store, 1e9)
        took = time.perf_counter() - begun
        np.save(given.result, store.vectors_at(np.arange(store.rows)))
    return {
        "seconds": took,
        "passages_per_s": given.count / took,
        "precision": precision,
        "tokens_per_batch": budget,
    }


def sentence_transformers(batch_size: int):
    def side(given) -> dict:
        model = bi_encoder(given.model, LENGTH)
        passages = [PREFIX + text for text in texts(given)]
        # As people call it is fp32; its other settings run at our precision.
        low = batch_size != 32 and choose_precision(given.precision, CPU) == "bf16"
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            model.encode(passages[:8], batch_size=batch_size)
            begun = time.perf_counter()
            vectors = model.encode(passages, batch_size=batch_size, show_progress_bar=False)
            took = time.perf_counter() - begun
        np.save(given.result, vectors)
        return {"seconds": took, "passages_per_s": given.count / took, "precision": "bf16" if low else "fp32"}

    return side


def make_random_bert(given, folder: Path) -> None:
    """Write a 12-layer BERT of the width asked for, random weights, the model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    hidden = given.random_hidden
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data_dir", required=True)
    options.add_argument("--model", required=True, help="folder of an encoder")
    options.add_argument(
        "--random_hidden", type=int, default=0, help="width of a random model; 0: the model itself"
    )
    options.add_argument("--count", type=int, default=512, help="passages")
    options.add_argument("--precision", default="auto")
    options.add_argument("--tokens_per_batch", type=int, default=0)
    options.add_argument("--openvino", action="store_true", help="a side with --encoder_engine openvino")
    options.add_argument("--peer_batches", type=int, nargs="*", default=[8, 16, 64])
    given = options.parse_args()
    sides = {"ours": ours, "st": sentence_transformers(32)}
    if given.openvino:
        sides = {OPENVINO: lambda given: ours(given, OPENVINO), **sides}
    sides |= {f"st_{size}": sentence_transformers(size) for size in given.peer_batches}
    with tempfile.TemporaryDirectory() as temporary:
        if given.random_hidden and not given.side:
            make_random_bert(given, Path(temporary))
            at = sys.argv.index("--random_hidden")
            sys.argv[at : at + 2] = ["--model", temporary]  # the last --model counts

        first = next(iter(sides))

        def cosine(folder: Path) -> dict:
            one, other = (np.load(folder / f"{name}.npy").astype(np.float64) for name in (first, "st"))
            both = (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
            return {"cosine_min": float(both.min()), "count": given.count, "threads": torch.get_num_threads()}

        compare(given, sides, list(sides), cosine)


if __name__ == "__main__":
    main()
