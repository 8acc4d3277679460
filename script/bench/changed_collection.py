"""Time and memory of do_dual_infer.py's encoding when few passages are new, against encoding all of them.

    python script/bench/changed_collection.py --rows 1000000 --new 10000 --part 20000

The old vectors are random, with the hashes of generated passages of --characters; the new passages are at
random places. Encoding all is estimated from --part of the passages. One thread, the sample's encoder.
"""

import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root

import torch_src  # noqa: F401 (first: it reports missing packages)

# isort: split

import numpy as np

from script.bench.common import make_parser
from torch_src import Retriever
from torch_src.data.collection import PassageCollection
from torch_src.hparams import TINY_ENCODER
from torch_src.retrieval.encoding import encode_collection, text_hashes
from torch_src.retrieval.vectors import TEXT_HASH, VectorStore
from torch_src.runtime.files import from_root

CHARACTERS = np.array(list("银杏从小苗到挂果得等多少年又称公孙树法律规定合同双方应当按照约定履行义务"))
BLOCK_ROWS = 65536


def write_passages(folder: Path, texts: list[str]) -> None:
    folder.mkdir()
    with open(folder / "part-00", "w", encoding="utf-8", newline="") as file:
        file.writelines(f"-\t\t{text}\t0\n" for text in texts)


def open_store(folder: Path, collection: PassageCollection, hidden: int) -> VectorStore:
    stamp = {**TEXT_HASH, "collection": collection.checksum}
    return VectorStore.create_or_continue(folder, stamp, len(collection), hidden, BLOCK_ROWS, print)


def encode(passages: Path, vectors: Path) -> tuple[float, float]:
    """Encode a folder of passages; return (seconds, peak resident memory of this process in 10^9 bytes)."""
    encoder = Retriever.load(from_root(TINY_ENCODER), device="cpu", threads=1).own_encoder("passage")
    started = time.perf_counter()
    collection = PassageCollection(passages, passages / "cache")
    store = open_store(vectors, collection, encoder.width)
    encode_collection(encoder, encoder.texts_of(collection), store, 30)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return time.perf_counter() - started, peak


def write_old(folder: Path, hidden: int, draw: np.random.Generator) -> None:
    """Write random vectors for the old passages."""
    collection = PassageCollection(folder / "old", folder / "old/cache")
    store = open_store(folder / "vectors", collection, hidden)
    for block in range(store.block_count):
        first, last = store.block_range(block)
        vectors = draw.standard_normal((last - first, hidden), dtype=np.float32).astype(np.float16)
        store.write_block(block, vectors, hashes=text_hashes(collection[first:last]))


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--new", type=int, default=10_000)
    parser.add_argument(
        "--part", type=int, default=20_000, help="passages encoded to estimate the time of all"
    )
    parser.add_argument("--characters", type=int, default=40, help="of a passage")
    args = parser.parse_args()
    draw = np.random.default_rng(0)
    drawn = draw.integers(0, len(CHARACTERS), (args.rows + args.new, args.characters))
    texts = ["".join(row) for row in CHARACTERS[drawn]]
    is_new = np.zeros(len(texts), dtype=bool)
    is_new[draw.choice(len(texts), args.new, replace=False)] = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_passages(folder / "old", [text for text, new in zip(texts, is_new, strict=True) if not new])
        write_passages(folder / "changed", texts)
        write_passages(folder / "part", texts[: args.part])
        hidden = Retriever.load(from_root(TINY_ENCODER), device="cpu").width
        write_old(folder, hidden, draw)
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            part, _ = pool.apply(encode, (folder / "part", folder / "part_vectors"))
            changed, peak = pool.apply(encode, (folder / "changed", folder / "vectors"))
    whole = part * len(texts) / args.part
    print(f"{args.part:,} passages: {part:.1f} s, so all {len(texts):,}: {whole:,.0f} s (an estimate)")
    print(f"{args.new:,} new: {changed:.1f} s, {100 * changed / whole:.2f}%, peak memory {peak:.2f} GB")


if __name__ == "__main__":
    main()
