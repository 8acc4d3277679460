"""What the users of the search page mark as answers, appended to feedback.jsonl."""

import errno
import os
import threading
import time
from pathlib import Path

from torch_src.data.formats import FeedbackHit, FeedbackRow, format_feedback, read_feedback
from torch_src.data.lines import LONGEST_LINE
from torch_src.runtime.errors import UserError
from torch_src.tools.search_service import COLUMNS, SearchService, clean

MOST_ABOVE = 1000  # passages


class Feedback:
    """The file, and which passages are marked now. Usable from several threads."""

    def __init__(self, service: SearchService):
        """UserError for a file with other content. Marks of passages that have changed are not shown."""
        self.service, self.lock = service, threading.Lock()
        self.path = Path(service.hp.output_dir) / "feedback.jsonl"
        self.rows_of: dict[str, set[int]] = {}
        if self.path.exists():
            for row in read_feedback(self.path):
                if self._is_current(row.hit):
                    self._count(row)

    def _is_current(self, hit: FeedbackHit) -> bool:
        collection = self.service.collection
        return 0 <= hit.row < len(collection) and collection[hit.row] == hit.passage

    def _count(self, row: FeedbackRow) -> None:
        rows = self.rows_of.setdefault(row.query, set())
        (rows.add if row.relevant else rows.discard)(row.hit.row)

    def marked(self, question: str) -> list[int]:
        """Return the rows that are marked as answers of a question."""
        with self.lock:
            return sorted(self.rows_of.get(question, ()))

    def add(
        self, question: str, row: int, relevant: bool, column: str, rank: int, above: list[int]
    ) -> list[int]:
        """Append one line; return the marked rows. `above`: rows shown above it."""
        question = clean(question)
        if column not in COLUMNS or rank < 1 or len(above) > MOST_ABOVE:
            raise UserError("column, rank or above: not of a result of this page")
        hits = [self._hit(number) for number in above]
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = FeedbackRow(now, question, self._hit(row), relevant, column, rank, hits)
        with self.lock:
            self._append(format_feedback(line).encode("utf-8"))
            self._count(line)
        return self.marked(question)

    def _append(self, data: bytes) -> None:
        """Append a line to the file; nothing when it cannot be written whole, or not be read again."""
        if len(data) > LONGEST_LINE:
            raise UserError(f"the passages above it are too long to be saved (over {LONGEST_LINE >> 20} MiB)")
        with open(self.path, "ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            try:
                if file.write(data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)  # half a line would join the next one
                raise

    def _hit(self, row: int) -> FeedbackHit:
        if not 0 <= row < len(self.service.collection):
            raise UserError(f"row {row}: not in the collection of {len(self.service.collection):,} passages")
        return FeedbackHit(self.service.pid(row), row, self.service.collection[row])
