"""What the columns of a search need: the BM25 index, the retriever with its vectors, the re-ranker.

A part is loaded as soon as its files are there, and again when they are replaced, so a search can start with
what exists and grow while do_dual_infer.py or a training runs beside it.
"""

import traceback
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch_src.data.collection import PassageCollection
from torch_src.hparams import NONE
from torch_src.retrieval.bm25 import MARK, Bm25Index, build_index, import_tantivy, is_index_of
from torch_src.retrieval.vectors import VectorStore
from torch_src.runtime.commands import command, pip_install
from torch_src.runtime.errors import UserError, first_line
from torch_src.runtime.files import from_root, read_json
from torch_src.runtime.locks import folder_lock
from torch_src.runtime.log import warn
from torch_src.runtime.stamps import stamp_path
from torch_src.saved_settings import SAVED, read_saved
from torch_src.tools.demo_hparams import DemoHparams, infer_command, reranker_hparams, search_settings
from torch_src.tools.page_error import PageError, chinese

if TYPE_CHECKING:  # both import torch, which takes seconds; the threads that load them import them
    from torch_src.tools.search_models import DenseSearch, RerankedSearch

DEMO = "requirements-demo.txt"
BM25_ROWS = 1_000_000  # larger collections are indexed by script/bm25.py only
# States of a part: loaded; being built or loaded; a file is missing; failed; turned off.
READY, WORKING, MISSING, FAILED, OFF = "ready", "working", "missing", "error", "off"

Loaded = TypeVar("Loaded")


class NotReady(Exception):
    """The part cannot be loaded yet: why (in both languages), and how much of its files is there."""

    def __init__(self, state: str, message: str = "", zh: str = "", done: int = 0, total: int = 0):
        super().__init__(message)
        self.state, self.zh, self.done, self.total = state, zh, done, total


class Part(Generic[Loaded]):
    """Something that columns need. Only one thread calls refresh()."""

    def __init__(
        self,
        options: Mapping[str, Any],
        collection: PassageCollection,
        settings: type[DemoHparams] = DemoHparams,
    ):
        self.options, self.collection, self.settings = options, collection, settings
        self.loaded: Loaded | None = None
        self.version = 0  # of `loaded`
        self.seen: Hashable = None  # state of the files at the last refresh
        self.set_state(WORKING)

    def files(self, hp: DemoHparams) -> Hashable:
        """Return a value that changes with the files of the part."""
        raise NotImplementedError

    def load(self, hp: DemoHparams) -> Loaded:
        """Return what the files hold; NotReady or UserError where that cannot be."""
        raise NotImplementedError

    def set_state(self, state: str, message: str = "", zh: str = "", done: int = 0, total: int = 0) -> None:
        self.state, self.message, self.zh, self.done, self.total = state, message, zh, done, total

    def refresh(self) -> None:
        """Load the part if its files have changed since the last call."""
        try:
            # again: the programs may save theirs after the search has started
            hp = search_settings(self.settings, self.options)
            files = self.files(hp)
            if files == self.seen:
                return
            self.seen = files
            if self.loaded is None:
                self.set_state(WORKING)
            loaded = self.load(hp)
        except NotReady as why:
            return self._set(None, why.state, str(why), why.zh, why.done, why.total)
        except (UserError, OSError) as error:
            return self._fail(first_line(error), chinese(error))
        except Exception as error:  # the other columns keep working
            traceback.print_exc()
            return self._fail(f"{type(error).__name__}: {first_line(error)}")
        self._set(loaded, READY)

    def _fail(self, message: str, zh: str = "") -> None:
        if (self.state, self.message) != (FAILED, message):
            warn(message)
        self._set(None, FAILED, message, zh)

    def _set(self, loaded: Loaded | None, state: str, *more: Any) -> None:
        if loaded is not self.loaded:
            self.loaded, self.version = loaded, self.version + 1
        self.set_state(state, *more)

    def describe(self) -> dict[str, Any]:
        """Return the state as JSON."""
        names = ("state", "message", "zh", "done", "total")
        return {name: getattr(self, name) for name in names}


class Bm25Part(Part[Bm25Index]):
    """The index that an option names, or output_dir/bm25, or one in output_dir/cache that is built here."""

    def _folder(self, hp: DemoHparams) -> Path:
        if hp.bm25:
            return Path(hp.bm25)
        beside = Path(hp.output_dir) / "bm25"
        return beside if is_index_of(beside, self.collection) else Path(hp.output_dir) / "cache/bm25"

    def files(self, hp: DemoHparams) -> Hashable:
        folder = self._folder(hp)
        return folder, file_state(stamp_path(folder / MARK))

    def load(self, hp: DemoHparams) -> Bm25Index:
        if hp.bm25 == NONE:
            raise NotReady(OFF)
        try:
            import_tantivy()
        except UserError as error:
            raise NotReady(
                MISSING, str(error), f"没有装好 tantivy：运行 {pip_install('-r', from_root(DEMO))}"
            ) from None
        folder = self._folder(hp)
        if not is_index_of(folder, self.collection):
            self._build(hp, folder)
        return Bm25Index(folder)

    def _build(self, hp: DemoHparams, folder: Path) -> None:
        rows = len(self.collection)
        beside = Path(hp.output_dir) / "bm25"
        index = command("script/bm25.py", "index", "--data_dir", hp.data_dir, "--index", hp.bm25 or beside)
        if hp.bm25:
            raise PageError(
                f"{folder}: no BM25 index of these passages; run {index}",
                f"{folder} 不是这些段落的 BM25 索引；运行 {index}",
            )
        if rows > BM25_ROWS:
            en = f"{rows:,} passages take long to index; run {index}"
            raise NotReady(MISSING, en, f"{rows:,} 个段落建索引要很久；运行 {index}")
        self.set_state(WORKING, total=rows)
        with folder_lock(folder):
            build_index(
                folder, self.collection, indexed=lambda done: self.set_state(WORKING, done=done, total=rows)
            )
        self.seen = self.files(hp)


class DensePart(Part["DenseSearch"]):
    """The retriever, once all blocks of its vectors are there."""

    def files(self, hp: DemoHparams) -> Hashable:
        folder, output = Path(hp.para_emb_path), Path(hp.output_dir)
        manifest = file_state(folder / "manifest.json")
        if self.loaded and isinstance(self.seen, tuple) and manifest == self.seen[0]:
            return self.seen  # newer weights are not those of these vectors
        blocks = len(list(folder.glob("block-*.json"))) if folder.is_dir() else 0
        saved = [file_state(output / name) for name in (*SAVED[:2], "dual_params.bin")]
        return manifest, blocks, *saved

    def load(self, hp: DemoHparams) -> "DenseSearch":
        folder = Path(hp.para_emb_path)
        path = folder / "manifest.json"
        if not path.exists():
            run = infer_command(hp)
            en = f"no vectors in {folder} yet; {run} writes them"
            raise NotReady(MISSING, en, f"{folder} 里还没有向量；运行 {run} 来生成")
        manifest = read_json(path)
        if not {"rows", "hidden", "block_rows"} <= manifest.keys():
            raise UserError(f"{path}: not a manifest of vectors; run {infer_command(hp)}")
        store = VectorStore(folder, manifest)
        done = store.block_count - len(store.missing_blocks())
        saved = read_saved(hp.output_dir, SAVED[0])
        is_known = saved or "dual_params" in self.options or Path(hp.dual_params_path).exists()
        if done < store.block_count or not is_known:  # do_dual_infer.py saves its settings after the search
            raise NotReady(WORKING, done=done, total=store.block_count)
        from torch_src.tools.search_models import DenseSearch

        dense = DenseSearch(hp)
        # do_dual_infer.py may have run and saved another data_dir since the page was started
        if dense.retriever.collection.checksum != self.collection.checksum:
            raise PageError(
                f"{folder}: vectors of other passages than this page shows; start the page again",
                f"{folder} 里是另一批段落的向量；请重新启动页面的程序",
            )
        return dense


class RerankerPart(Part["RerankedSearch"]):
    """The re-ranker: trained weights, or a model folder."""

    def files(self, hp: DemoHparams) -> Hashable:
        trained = Path(hp.cross_params_path)
        files = [trained, trained.with_name("cross_hparams.json")]
        return reranker_hparams(hp), hp.fuse_retriever_weight, *map(file_state, files)

    def load(self, hp: DemoHparams) -> "RerankedSearch":
        settings = reranker_hparams(hp)
        if settings is None and NONE in (hp.cross_params, hp.reranker):
            raise NotReady(OFF)
        if settings is None:
            path = hp.cross_params_path
            en = f"{path} does not exist yet; do_cross_train.py writes it, or pass --reranker FOLDER"
            zh = f"还没有 {path}；do_cross_train.py 会生成它，也可以用 --reranker 指定模型"
            raise NotReady(MISSING, en, zh)
        from torch_src.tools.search_models import RerankedSearch

        return RerankedSearch(hp, settings)


def file_state(path: Path) -> Hashable:
    """Return a value that changes when the file is written; None without it."""
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_mtime_ns, state.st_size, state.st_ino
