"""Requests of many callers in one batch."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from torch_src.tools.batching import Batcher, Call, Late, Left


class Doubling:
    """Doubles numbers once `open` is set; fails for a batch with a negative one. Keeps the batches."""

    def __init__(self):
        self.open, self.begun, self.batches = threading.Event(), threading.Event(), []
        self.open.set()

    def __call__(self, numbers: list[int]) -> list[int]:
        self.begun.set()
        self.open.wait()
        self.batches.append(numbers)
        if min(numbers) < 0:
            raise ValueError("negative")
        return [2 * number for number in numbers]


@pytest.fixture
def doubling() -> Doubling:
    return Doubling()


def blocked(doubling: Doubling, batcher: Batcher) -> list:
    """Let the batcher begin a batch with 1 and wait in it; return its future."""
    doubling.open.clear()
    first = batcher.submit(1)
    doubling.begun.wait()
    return [first]


def test_what_waits_is_computed_together_up_to_the_limit(doubling):
    batcher = Batcher(doubling, 5, size=lambda number: number)
    futures = blocked(doubling, batcher) + [batcher.submit(number) for number in (2, 3, 1, 9, 2)]
    doubling.open.set()
    assert [future.result() for future in futures] == [2, 4, 6, 2, 18, 4]
    assert doubling.batches == [[1], [2, 3], [1], [9], [2]]


def test_each_caller_gets_its_own_result(doubling):
    batcher = Batcher(doubling, 8)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: Call(60).results([batcher.submit(number)])[0], range(200)))
    assert found == [2 * number for number in range(200)]


def test_only_the_item_at_fault_fails(doubling):
    batcher = Batcher(doubling, 8)
    futures = blocked(doubling, batcher) + [batcher.submit(number) for number in (2, -1, 3)]
    doubling.open.set()
    assert [futures[at].result() for at in (0, 1, 3)] == [2, 4, 6]
    with pytest.raises(ValueError, match="negative"):
        futures[2].result()


def test_work_of_a_caller_who_is_late_or_has_left_is_dropped(doubling):
    batcher = Batcher(doubling, 8)
    first = blocked(doubling, batcher)
    with pytest.raises(Late):
        Call(0.01).results([batcher.submit(2), batcher.submit(3)])
    call = Call()
    threading.Timer(0.01, call.leave).start()
    with pytest.raises(Left):
        call.results([batcher.submit(4)])
    with pytest.raises(Left):
        call.results([batcher.submit(5)])  # it has left before
    doubling.open.set()
    assert first[0].result() == 2 and batcher.submit(6).result() == 12
    assert doubling.batches == [[1], [6]]


def test_a_deleted_batcher_ends_its_thread(doubling):
    batcher = Batcher(doubling, 8)
    batcher.submit(1).result()
    (thread,) = batcher.worker._threads
    del batcher
    thread.join(10)
    assert not thread.is_alive()
