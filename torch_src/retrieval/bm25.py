"""A BM25 index of a collection, by tantivy: on disk, memory bounded, k1 1.2, b 0.75.

Terms are those of torch_src/data/terms.py. A single character in a query matches every passage that has it.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch_src.data.collection import PassageCollection
from torch_src.data.terms import PIECES, is_single, terms, terms_and_characters
from torch_src.runtime.errors import UserError, first_line
from torch_src.runtime.files import atomic_folder, atomic_write
from torch_src.runtime.libraries import import_library
from torch_src.runtime.log import duration, log
from torch_src.runtime.outputs import begins
from torch_src.runtime.stamps import JsonDict, clear_stamp, read_stamp, write_stamp

READ_ROWS = 4096  # passages in memory at a time
MARK = "tokens.txt"  # the file of the index folder with the stamp
ENGINE = "tantivy"  # the engine's folder in the index folder
IS_MARK = begins(rb"[0-9]+ passages\n")
TERMS, CHARACTERS = "terms", "characters"  # fields of the index
MEMORY_MB = 256  # for indexing


def import_tantivy() -> Any:
    """Return the module; UserError if it cannot be imported."""
    return import_library("tantivy", "requirements-demo.txt")


@contextmanager
def engine_errors(folder: Path) -> Iterator[None]:
    """Turn what tantivy raises (ValueError, or a panic that is no Exception) into a UserError."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"
        if not panic and not isinstance(error, ValueError | OverflowError):
            raise
        fix = "is the disk full? else delete the folder and run again"
        raise UserError(f"{folder}: the search engine failed ({first_line(error)[:200]}); {fix}") from error


def make_schema(tantivy: Any) -> Any:
    """Return the schema of the index: terms and characters separated by spaces, and the row."""
    builder = tantivy.SchemaBuilder()
    for field in (TERMS, CHARACTERS):
        builder.add_text_field(field, stored=False, tokenizer_name="whitespace", index_option="freq")
    builder.add_integer_field("row", stored=True)
    return builder.build()


def index_stamp(collection: PassageCollection) -> JsonDict:
    """Return the stamp of the index of a collection."""
    return {"stage": "bm25", "collection": collection.checksum, "terms": f"NFKC {PIECES.pattern}"}


def is_index_of(folder: Path, collection: PassageCollection) -> bool:
    """Return whether the folder has a finished index of the collection."""
    return index_stamp(collection).items() <= (read_stamp(folder / MARK) or {}).items()


def build_index(
    folder: Path,
    collection: PassageCollection,
    memory_mb: int = MEMORY_MB,
    indexed: Callable[[int], None] = lambda rows: None,
) -> None:
    """Write the index of the collection to the folder. Calls indexed(rows so far) after each chunk."""
    tantivy, mark, start_time = import_tantivy(), folder / MARK, time.monotonic()
    clear_stamp(mark)  # first: an incomplete index must not have a stamp
    with engine_errors(folder), atomic_folder(folder / ENGINE) as inside:
        writer = tantivy.Index(make_schema(tantivy), path=str(inside)).writer(memory_mb << 20, 1)
        for start in range(0, len(collection), READ_ROWS):
            for row, text in enumerate(collection[start : start + READ_ROWS], start):
                writer.add_document(_document(tantivy, text, row))
            indexed(min(start + READ_ROWS, len(collection)))
        writer.commit()
        writer.wait_merging_threads()
    with atomic_write(mark) as file:
        file.write(f"{len(collection)} passages\n")
    write_stamp(mark, index_stamp(collection))
    log(f"wrote {folder} ({len(collection):,} passages) in {duration(time.monotonic() - start_time)}")


def _document(tantivy: Any, text: str, row: int) -> Any:
    """Return the entry of a passage."""
    found, characters = terms_and_characters(text)
    return tantivy.Document(row=row, **{TERMS: " ".join(found), CHARACTERS: " ".join(characters)})


class Bm25Index:
    """A finished index; usable from several threads."""

    def __init__(self, folder: Path):
        self.folder, self.tantivy = folder, import_tantivy()
        self.schema = make_schema(self.tantivy)
        with engine_errors(folder):
            self.searcher = self.tantivy.Index.open(str(folder / ENGINE)).searcher()

    def search(self, query: str, topk: int) -> list[tuple[int, float]]:
        """Return (row, score), best first, ties by row. A term that the query repeats counts each time.

        A single character is compared with all characters of a passage, not with its pairs.
        """
        occur, term_query = self.tantivy.Occur.Should, self.tantivy.Query.term_query
        with engine_errors(self.folder):
            clauses = [
                (occur, term_query(self.schema, _field(term), term, index_option="freq"))
                for term in terms(query)
            ]
            if not clauses:
                return []
            hits = self.searcher.search(self.tantivy.Query.boolean_query(clauses), topk).hits
            found = [(self.searcher.doc(at)["row"][0], score) for score, at in hits]
        return sorted(found, key=lambda hit: (-hit[1], hit[0]))

    def share(self, term: str) -> float:
        """Return the share of the passages that contain a term."""
        return self.searcher.doc_freq(_field(term), term) / max(self.searcher.num_docs, 1)


def _field(term: str) -> str:
    return CHARACTERS if is_single(term) else TERMS
