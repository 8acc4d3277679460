"""Log lines, atomic files, exit statuses, durations."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from script import bm25
from torch_src import dual_infer
from torch_src.data.lines import FormatError
from torch_src.runtime import files, program
from torch_src.runtime import log as log_module
from torch_src.runtime.devices import choose_device, make_deterministic
from torch_src.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TIME = r"\d\d:\d\d:\d\d "


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_atomic_write_replaces_the_old_file_and_leaves_no_tmp(tmp_path):
    path = tmp_path / "new folder" / "file"
    for text in ("old 水\r\n", "new\u2028\n"):
        with files.atomic_write(path) as file:
            file.write(text)
        assert path.read_bytes() == text.encode()
    assert names(path.parent) == ["file"]


def test_atomic_write_takes_bytes(tmp_path):
    with files.atomic_write(tmp_path / "file", "wb") as file:
        file.write(b"\xff\r\n")
    assert (tmp_path / "file").read_bytes() == b"\xff\r\n"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, PermissionError(13, "no")])
@pytest.mark.parametrize("before", [["file"], []])
def test_failed_atomic_write_leaves_the_old_file_and_no_tmp(tmp_path, error, before):
    for name in before:
        (tmp_path / name).write_text("old")
    kind = error if isinstance(error, type) else type(error)
    with pytest.raises(kind), files.atomic_write(tmp_path / "file") as file:
        file.write("half")
        file.flush()
        raise error
    assert names(tmp_path) == before
    assert all((tmp_path / name).read_text() == "old" for name in before)


def test_an_error_of_the_library_that_writes_names_the_file(tmp_path):
    """numpy's error for a full disk has neither an error number nor a file name."""
    words = "file: could not be written .5 requested and 2 written.; is the disk full"
    with pytest.raises(UserError, match=words), files.atomic_write(tmp_path / "file"):
        raise OSError("5 requested and 2 written")
    assert names(tmp_path) == []


def test_temporary_files_of_a_killed_process_are_deleted(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    host = socket.gethostname()
    left = [
        f"file.{host}.{dead.pid}.tmp",
        f"file.{host}.1.tmp",
        "file.elsewhere.2.tmp",
        f"other.{host}.{dead.pid}.tmp",
    ]
    for name in left:
        (tmp_path / name).write_text("half")
    with files.atomic_write(tmp_path / "file") as file:
        file.write("new")
    assert names(tmp_path) == sorted(["file", *left[1:]])


def test_out_of_memory_is_an_error_of_one_line(capsys):
    class OutOfMemoryError(RuntimeError):
        """Has the name of torch's class."""

    assert (
        program.exit_status(fail_with(OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"))) == 2
    )
    assert " ERROR out of memory (CUDA out of memory)" in capsys.readouterr().err


def test_new_content_is_not_seen_before_the_block_ends(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with files.atomic_write(path) as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_json_round_trip_and_layout(tmp_path):
    value = {"水": ["\u2028", 1.5, None], "": {}}
    files.write_json(tmp_path / "a.json", value)
    assert files.read_json(tmp_path / "a.json") == value
    assert "水" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_a_value_without_json_form_keeps_the_old_file(tmp_path):
    files.write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "a.json", {"a": "x" * 100_000, "b": object()})
    assert files.read_json(tmp_path / "a.json") == {"a": 1}
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"[1]", b"3", b"\xff", b'\xef\xbb\xbf{"a": 1}'])
def test_truncated_json_or_no_object_is_a_user_error_with_the_path(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        files.read_json(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_missing_json_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        files.read_json(tmp_path / "none.json")


def test_require_returns_the_path_or_names_the_file_and_the_fix(tmp_path):
    assert files.require(tmp_path, "a folder") == str(tmp_path)
    with pytest.raises(UserError) as caught:
        files.require(tmp_path / "none", "the weights", "train first")
    assert str(caught.value) == f"{tmp_path / 'none'}: no such file or folder (the weights); train first"
    with pytest.raises(UserError, match=r"\(the weights\)$"):
        files.require(tmp_path / "none", "the weights")


def fail_with(error):
    def program():
        raise error

    return program


def test_success_is_silent_and_status_0_or_the_one_returned(capsys):
    assert (program.exit_status(lambda: None), program.exit_status(lambda: 7)) == (0, 7)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "error, status, line",
    [
        (UserError("f: wrong"), 2, "ERROR f: wrong"),
        (FormatError("f", 3, "wrong"), 2, "ERROR f:3: wrong"),
        (FileNotFoundError(2, "No such file or directory", "f"), 2, "ERROR f: No such file or directory"),
        (OSError(28, "No space left on device"), 2, "ERROR system: No space left on device"),
        (KeyboardInterrupt(), 130, f"WARNING {program.RESUMES}"),
    ],
)
def test_user_errors_and_interruptions_are_one_line_on_stderr(capsys, error, status, line):
    assert program.exit_status(fail_with(error)) == status
    printed = capsys.readouterr()
    assert printed.out == "" and re.fullmatch(TIME + re.escape(line) + "\n", printed.err)


@pytest.mark.parametrize("error", [ValueError("x"), AssertionError("x"), OSError("x"), SystemExit(3)])
def test_bugs_keep_their_traceback(error):
    with pytest.raises(type(error)) as caught:
        program.exit_status(fail_with(error))
    assert caught.value is error


def test_process_ends_with_the_status_and_without_a_traceback():
    program = (
        "import sys; from torch_src.runtime.files import require; "
        "from torch_src.runtime.program import exit_status; "
        "sys.exit(exit_status(lambda: require('no/such/file', 'weights')))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(TIME + r"ERROR no/such/file: [^\n]*\(weights\)\n", done.stderr)


@pytest.mark.parametrize(
    "work",
    [
        "os.kill(os.getpid(), signal.SIGINT)",
        "Deleted()",
        "atexit.register(lambda: (os.kill(os.getpid(), signal.SIGINT), time.sleep(60)))",
    ],
    ids=["in the program", "in a destructor", "after the program"],
)
def test_an_interrupted_program_ends_at_once_without_a_traceback(work):
    program = f"""
import atexit, os, signal, time
from torch_src.runtime.program import exit_status, exit_with
class Deleted:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
def work():
    {work}
    "atexit" in {work!r} or time.sleep(60)
exit_with(lambda: exit_status(work))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=50
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert re.fullmatch(TIME + "WARNING interrupted[^\n]*\n", done.stderr)


@pytest.mark.parametrize("rank", ["0", "3"])
def test_log_lines_carry_the_time_the_rank_and_the_level(capsys, monkeypatch, rank):
    monkeypatch.setenv("RANK", rank)
    log_module.log("step 1")
    log_module.warn("odd\nvalue")
    log_module.error("wrong")
    out, err = capsys.readouterr()
    start = TIME if rank == "0" else TIME + r"\[rank 3\] "
    assert re.fullmatch(f"{start}step 1\n", out)
    assert re.fullmatch(f"{start}WARNING odd value\n{start}ERROR wrong\n", err)


@pytest.mark.parametrize(
    "seconds, shown",
    [
        (0, "0.0s"),
        (4.24, "4.2s"),
        (59.9, "59.9s"),
        (59.96, "1m00s"),
        (60, "1m00s"),
        (187, "3m07s"),
        (3599, "59m59s"),
        (3600, "1h00m"),
        (6720, "1h52m"),
        (360_000, "100h00m"),
    ],
)
def test_duration(seconds, shown):
    assert log_module.duration(seconds) == shown


def test_deterministic_algorithms_are_enabled(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *on, **how: asked.append((on, how)))
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with pytest.raises(UserError, match="put CUBLAS_WORKSPACE_CONFIG=:4096:8 in front"):
        make_deterministic(torch.device("cuda"))
    make_deterministic(torch.device("cpu"))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    make_deterministic(torch.device("cuda"))
    assert asked == [((True,), {"warn_only": on_cpu}) for on_cpu in (True, False)]


@pytest.mark.parametrize(
    ("name", "local", "index"), [("auto", None, 0), ("cuda:1", None, 1), ("cuda", "3", 1)]
)
def test_the_chosen_gpu_is_the_current_device(monkeypatch, name, local, index):
    """torch.cuda.set_device rejects a device without an index."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", current.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local:
        monkeypatch.setenv("LOCAL_RANK", local)
    device = choose_device(name)
    assert device.type == "cuda" and (device.index or 0) == index and current == [index, False]


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "gbk"},
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=str,
)
def test_lines_that_the_terminal_cannot_show_are_escaped(environment):
    code = (
        "import sys\nfrom torch_src.runtime.program import exit_status\n"
        "from torch_src.runtime.log import log\n"
        "def run():\n"
        " log('\\u67e5 \\xe9 \\U0001f600 \\udcff'); raise FileNotFoundError(2, 'missing', '\\u6587.\\xd7')\n"
        "sys.exit(exit_status(run))"
    )
    settings = ("LC_", "LANG", "PYTHON")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(settings)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=clean | environment, capture_output=True
    )
    assert done.returncode == 2 and b"Traceback" not in done.stderr
    assert done.stdout.count(b"\n") == 1 and done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("main", [bm25.main, dual_infer.main])
def test_an_option_that_is_not_utf8_is_refused(main, capsys):
    words = ["search", "--index", "caf\udce9"] if main is bm25.main else ["--output_dir", "caf\udce9"]
    try:
        status = main(words)
    except SystemExit as done:
        status = done.code
    assert status == 2 and "not UTF-8" in capsys.readouterr().err
