"""Any bytes give a parsed value or one clear error; bad_input.py runs millions."""

import tracemalloc

import pytest
from bad_input import READERS, look, run
from hypothesis import HealthCheck, given, settings, strategies
from toy_world import write

from torch_src.data.collection import PassageCollection
from torch_src.data.formats import read_queries
from torch_src.data.lines import LONGEST_LINE, FormatError
from torch_src.data.row_file import RowFile


@pytest.mark.slow
def test_mutated_files(tmp_path):
    counts, failures = run(tmp_path, list(READERS), inputs=2000, seed=7)
    assert not failures, failures[0]
    assert counts["parsed"] > 100 and counts["refused"] > 1000


@pytest.mark.slow
@pytest.mark.parametrize("name", list(READERS))
def test_any_bytes(tmp_path_factory, name):
    file, _, read, beside = READERS[name]
    folder = tmp_path_factory.mktemp("any")
    (folder / file).parent.mkdir(exist_ok=True)
    for other, data in beside.items():
        (folder / other).write_bytes(data)

    @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(strategies.one_of(strategies.binary(max_size=400), strategies.text(max_size=200).map(str_bytes)))
    def check(data):
        (folder / file).write_bytes(data)
        assert look(read, folder / file) in ("parsed", "refused")

    check()


def str_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def test_passages_of_zero_and_a_million_characters(tmp_path):
    texts = ["", "长" * 1_000_000, "\x0b\x0c\x1c\x85\u2028 \x00 a\r", "\ufeff"]
    write(tmp_path / "part-00", [f"-\t\t{text}\t0" for text in texts])
    collection = PassageCollection(tmp_path)
    assert collection[0 : len(collection)] == texts


@pytest.mark.slow
@pytest.mark.parametrize("read", [
    lambda path: read_queries(path), lambda path: PassageCollection(path.parent),
    lambda path: RowFile(path, lambda text, path, line: text, lambda row: (0,)),
])  # fmt: skip
def test_a_line_of_200_megabytes_is_refused_in_bounded_memory(tmp_path, read):
    path = tmp_path / "part-00"
    with open(path, "wb") as file:
        file.write(b"-\t\t\xe9\xb1\xbc\t0\n" if read is not read_queries else b"")
        file.truncate(200_000_000)  # sparse: NULs without a line end
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=r"part-00:\d: a line of more than 16 MiB"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 4 * LONGEST_LINE
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("escape", ['"\\ud800"', '"a\\udc00"'])
def test_lone_surrogates_are_refused(tmp_path, escape):
    path = tmp_path / "test1.json"
    path.write_text(f'{{"question_id": "q1", "question": {escape}}}\n', encoding="utf-8")
    found = look(READERS["test queries"][2], path)
    assert found == "refused"
