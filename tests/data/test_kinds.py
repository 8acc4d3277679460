"""Files are told apart by their first bytes; arguments in the wrong order are named."""

import itertools

import pytest
from toy_world import ROOT

from torch_src.data import kinds
from torch_src.runtime.errors import UserError

SAMPLE = ROOT / "script/sample_data"
CONTENT = {
    kinds.RUN: "怎么做\t12\t1\t0.5\n",
    kinds.RESULT: '{\n"q1": ["p1", "p2"]\n}\n',
    kinds.ANSWERS: '{"question_id": "q1", "question": "a", "answer_paragraphs": []}\n',
    kinds.PASSAGE_MAP: '{"0": "p0", "1": "p1"}',
    kinds.QUERY_MAP: '{"怎么做 \\"1\\"": "q1"}',
    kinds.QUERIES: "怎么做\t-\t-\t0\n",
    kinds.ID_MAP: "q1\tp1\n",
    kinds.SCORES: "-1.5e-2\n3\n",
}


@pytest.mark.parametrize("kind", kinds.HEADS)
def test_each_kind_is_recognized(tmp_path, kind):
    path = tmp_path / "file"
    path.write_text(CONTENT[kind], encoding="utf-8")
    assert kinds.kind_of(path) == kind


def test_files_of_the_sample():
    assert kinds.kind_of(SAMPLE / "dev/dev.json") == kinds.ANSWERS
    assert kinds.kind_of(SAMPLE / "dev/q2qid.dev.json") == kinds.QUERY_MAP
    assert kinds.kind_of(SAMPLE / "passage-collection/passage2id.map.json") == kinds.PASSAGE_MAP


@pytest.mark.parametrize("content", ["", "{}", '{"110": "q1"}', "一", '{"7": "p7"}'])
def test_what_may_be_anything_passes(tmp_path, content):
    path = tmp_path / "file"
    path.write_text(content, encoding="utf-8")
    for kind in (kinds.QUERY_MAP, kinds.PASSAGE_MAP, kinds.RUN):
        kinds.check_kinds((path, kind), (tmp_path / "missing", kind))


def test_a_file_given_twice_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_text(CONTENT[kinds.RESULT], encoding="utf-8")
    with pytest.raises(UserError, match="file: a result"):
        kinds.check_kinds((path, kinds.ANSWERS), (path, kinds.RESULT))


def test_every_other_order_of_the_arguments_is_refused(tmp_path):
    expected = [kinds.QUERY_MAP, kinds.PASSAGE_MAP, kinds.RUN]
    paths = [tmp_path / str(at) for at in range(3)]
    for path, kind in zip(paths, expected, strict=True):
        path.write_text(CONTENT[kind], encoding="utf-8")
    for order in itertools.permutations(paths):
        given = zip(order, expected, strict=True)
        if list(order) == paths:
            kinds.check_kinds(*given)
        else:
            with pytest.raises(UserError, match="order"):
                kinds.check_kinds(*given)
