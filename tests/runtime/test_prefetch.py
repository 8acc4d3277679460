"""Items prepared ahead: order, errors in one line, nothing printed by the processes."""

import os
import signal
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from toy_world import ROOT

from torch_src.runtime.errors import UserError
from torch_src.runtime.prefetch import PARALLEL_TOKENIZERS, finish_in_thread, one_ahead, prepared_by_workers


def prepare(item):
    if item == "mistake":
        raise UserError("a.tsv:3: expected 4 columns")
    if item == "missing":
        raise FileNotFoundError(2, "No such file or directory", "b.tsv")
    return item * 2


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_items_keep_their_order(workers):
    found = prepared_by_workers(prepare, range(9), workers) if workers else one_ahead(prepare, range(9))
    assert list(found) == [item * 2 for item in range(9)]


def test_each_item_is_finished_before_the_second_after_it_is_taken():
    made, finished = [], []

    def items():
        for item in range(5):
            assert set(range(item - 1)) <= set(finished)
            made.append(item)
            yield item

    finish_in_thread(finished.append, items())
    assert made == finished == [0, 1, 2, 3, 4]
    finish_in_thread(finished.append, [])


def test_a_failure_to_finish_ends_the_loop():
    def finish(item):
        if item == 1:
            raise UserError("disk full")

    taken = iter(range(9))
    with pytest.raises(UserError, match="disk full"):
        finish_in_thread(finish, taken)
    assert next(taken) == 3  # item 2 was taken before the failure was seen


@pytest.mark.parametrize(("item", "message"), [("mistake", r"^a\.tsv:3"), ("missing", r"^b\.tsv: No such")])
def test_errors_of_workers_are_one_line(item, message):
    found = prepared_by_workers(prepare, [1, item, 2], 1)
    assert next(found) == 2
    with pytest.raises(UserError, match=message) as caught:
        list(found)
    assert "\n" not in str(caught.value)


def test_workers_tokenize_in_one_thread_without_a_warning(monkeypatch, capfd):
    monkeypatch.delenv(PARALLEL_TOKENIZERS, raising=False)
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()

    def tokenize(text):
        ids = [encoding.ids for encoding in tokenizer.encode_batch([text] * 64)]
        return ids[0], os.environ.get(PARALLEL_TOKENIZERS)

    tokenize("a b")  # in several threads, before the processes are started
    assert list(prepared_by_workers(tokenize, ["a b", "b"], 2)) == [([0, 1], "false"), ([1], "false")]
    assert PARALLEL_TOKENIZERS not in os.environ
    assert capfd.readouterr().err == ""


def test_a_killed_worker_ends_the_iteration_in_one_line():
    found = prepared_by_workers(kill_at_two, range(9), 1)
    assert next(found) == 0
    with pytest.raises(UserError, match="killed") as caught:
        list(found)
    assert "\n" not in str(caught.value)


def kill_at_two(item):
    if item == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


UNCAUGHT = """
from torch_src.runtime.prefetch import prepared_by_workers

for item in prepared_by_workers(str, range(1000), workers=2):
    raise LookupError(item)  # its traceback keeps the iterator, and so the workers, until the process ends
"""


@pytest.mark.slow
def test_an_uncaught_error_ends_the_program_and_its_workers():
    command = [sys.executable, "-c", UNCAUGHT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "LookupError: 0" in done.stderr
