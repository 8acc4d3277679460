"""Outputs: an input, a link to one, a folder, a device or a foreign file is never replaced."""

import os
from pathlib import Path

import pytest

from torch_src.runtime.errors import UserError
from torch_src.runtime.files import atomic_folder, atomic_write
from torch_src.runtime.outputs import RUN, Output, check_new_folder, check_outputs, never
from torch_src.runtime.stamps import clear_stamp, stamp_path, write_stamp

ROW = "问\t3\t1\t0.5\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").write_text(ROW, encoding="utf-8")
    (tmp_path / "passages").mkdir()
    return tmp_path


def refused(path, *inputs, own=RUN, stages=("bm25",)) -> str:
    with pytest.raises(UserError) as caught:
        check_outputs([Output(path, own, stages)], inputs)
    message = str(caught.value)
    assert message.startswith(f"{os.fspath(Path(path))}: ") and "\n" not in message
    return message


@pytest.mark.parametrize("name", ["in", "./in", "passages/../in", "symbolic", "hard", "chain"])
def test_an_input_under_any_name_is_refused(folder, name):
    (folder / "symbolic").symlink_to("in")
    (folder / "chain").symlink_to("symbolic")
    os.link("in", "hard")
    assert "one of the inputs" in refused(name, "in")
    assert "one of the inputs" in refused(folder / name, "symbolic")


@pytest.mark.parametrize("name", ["passages", "passages/part-07", "link/part-07", "passages/new/deep"])
def test_a_path_in_an_input_folder_is_refused(folder, name):
    (folder / "link").symlink_to("passages", target_is_directory=True)
    assert "input" in refused(name, "passages")


def test_the_current_directory_may_be_an_input_folder(folder):
    check_outputs([Output("output/new", RUN)], ["."])
    for name in ("part-07", "./new"):
        assert "input folder" in refused(name, ".")


def test_an_output_is_not_named_as_if_it_were_compressed(folder):
    assert "not compressed" in refused("run.gz")


def test_two_outputs_of_one_path_are_refused(folder):
    pair = [Output("new", RUN), Output(folder / "new", RUN)]
    with pytest.raises(UserError, match="two outputs"):
        check_outputs(pair)


@pytest.mark.parametrize("name", ["passages", "/dev/null", "/dev/stdout", "/proc/self/fd/1", "fifo"])
def test_what_is_no_regular_file_is_refused(folder, name):
    os.mkfifo("fifo")
    refused(name)
    with pytest.raises(UserError), atomic_write(name):
        pass
    assert os.path.exists("/dev/null") and not os.path.isfile("/dev/null")


@pytest.mark.parametrize(
    ("content", "stamp", "own", "allowed"),
    [
        (None, None, never, True),
        ("", None, never, True),  # nothing to lose
        (ROW, None, RUN, True),
        (ROW, None, never, False),  # a path that the user names
        ("notes\n", None, RUN, False),
        ("notes\n", "bm25", never, True),  # the stamp decides
        (ROW, "dual_infer", RUN, False),
        (ROW, "damaged", never, True),
        (ROW, "incomplete", never, True),
    ],
)
def test_only_a_file_of_the_program_is_replaced(folder, content, stamp, own, allowed):
    path = folder / "out"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    if stamp == "damaged":
        stamp_path(path).write_text("{")
    elif stamp == "incomplete":
        clear_stamp(path)
    elif stamp:
        write_stamp(path, {"stage": stamp})
    if allowed:
        check_outputs([Output(path, own, ("bm25",))])
    else:
        refused(path, own=own)
    assert path.exists() == (content is not None)


def test_a_new_folder_is_missing_or_empty_and_apart_from_the_inputs(folder):
    check_new_folder("new", ["in"])
    (folder / "empty").mkdir()
    check_new_folder("empty", ["in", ""])
    for path, inputs in (("in", []), (".", []), ("passages", ["passages"]), ("passages/x", ["passages"]),
                         ("empty", ["empty/in"])):  # fmt: skip
        with pytest.raises(UserError, match=f"^{path}: "):
            check_new_folder(path, inputs)


def test_a_folder_gets_its_name_when_it_is_complete(folder):
    with pytest.raises(ZeroDivisionError), atomic_folder("a/out") as unfinished:
        (unfinished / "x").write_text("1")
        assert not os.path.exists("a/out")
        raise ZeroDivisionError
    assert os.listdir("a") == []
    for content in ("1", "2"):
        with atomic_folder("a/out") as unfinished:
            (unfinished / content).write_text(content)
    assert os.listdir("a") == ["out"] and os.listdir("a/out") == ["2"]


def test_the_folder_of_a_killed_process_is_deleted(folder):
    with atomic_folder("out") as unfinished:
        prefix = unfinished.name.rsplit(".", 2)[0]
    killed = folder / f"{prefix}.{2**22 + 1}.tmp"  # above the highest process id
    killed.mkdir()
    (killed / "x").write_text("1")
    with atomic_folder("out"):
        pass
    assert not killed.exists()
