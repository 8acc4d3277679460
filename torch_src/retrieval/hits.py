"""A passage in a result list."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Hit:
    """A passage that was found for a question."""

    rank: int  # from 1
    row: int  # global, 0-based
    pid: str  # empty without pids
    score: float  # by which the list is sorted
    text: str
    ranks: dict[str, int] = field(default_factory=dict)  # its rank in the lists that this one is made from
    logit: float | None = None  # of the re-ranker
