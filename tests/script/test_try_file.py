"""script/try_file.py: a file is converted once, the page is served, the encoder runs beside it."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from script import try_file
from torch_src.data.collection import PassageCollection
from torch_src.runtime.errors import UserError

# A page that answers, and ends when the file `end` exists.
PAGE = """
import http.server, pathlib, sys, threading, time
server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), type(
    "H", (http.server.BaseHTTPRequestHandler,),
    {"do_GET": lambda self: self.send_response(200) or self.end_headers(), "log_message": lambda *_: None}))
threading.Thread(target=server.serve_forever, daemon=True).start()
while not pathlib.Path("end").exists(): time.sleep(0.01)
"""


@pytest.fixture
def trials(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(try_file, "TRIALS", tmp_path / "try")
    monkeypatch.setattr(try_file, "POLL_SECONDS", 0.02)
    return tmp_path / "try"


def convert(source: Path, model: str = "models/small") -> try_file.Trial:
    return try_file.convert(source, model, "", "")


def test_a_file_is_converted_once(trials, tmp_path, monkeypatch, capsys):
    source = tmp_path / "notes.csv"
    source.write_text("id,text\n1,清蒸鱼\n2,红烧肉\n")
    trial = convert(source)
    assert trial == (trials / "notes/data", trials / "notes/small")
    assert PassageCollection(trial.data / "passage-collection")[0:2] == ["清蒸鱼", "红烧肉"]
    monkeypatch.setattr(try_file.convert_dataset, "main", lambda _: pytest.fail("converted again"))
    assert convert(source, "owner/other").output == trials / "notes/other"
    monkeypatch.undo()
    monkeypatch.setattr(try_file, "TRIALS", trials)
    (trial.output / "para_emb").mkdir(parents=True)
    assert convert(source) == trial and (trial.output / "para_emb").exists()
    source.write_text("id,text\n1,清蒸鱼\n3,米饭\n")
    assert PassageCollection(convert(source).data / "passage-collection")[1] == "米饭"
    assert not (trial.output / "para_emb").exists()  # the page would report vectors of other passages
    assert "out of date" in capsys.readouterr().out


def test_two_files_of_one_name(trials, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}/notes.txt").write_text(f"{name}\n")
    first, second = (convert(tmp_path / f"{name}/notes.txt") for name in ("a", "b"))
    assert first.data != second.data and convert(tmp_path / "a/notes.txt") == first


@pytest.mark.parametrize("name", ["...txt", "..txt", ".txt"])
def test_a_name_of_dots_stays_inside(trials, tmp_path, name):
    (tmp_path / name).write_text("a\n")
    assert try_file.trial_folder(tmp_path / name, "text").resolve().parent == trials


def test_passages_that_a_page_shows_are_not_replaced(trials, tmp_path):
    (tmp_path / "notes.txt").write_text("a\n")
    convert(tmp_path / "notes.txt")
    code = "import sys, time; from torch_src.runtime.locks import folder_lock\n"
    code += "with folder_lock(sys.argv[1], shared=True): print(1, flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code, str(trials / "notes")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as page:
        page.stdout.readline()
        assert convert(tmp_path / "notes.txt").data == trials / "notes/data"  # nothing has changed
        (tmp_path / "notes.txt").write_text("b\n")
        with pytest.raises(UserError, match="locked by another run"):
            convert(tmp_path / "notes.txt")
        page.kill()
    assert PassageCollection(convert(tmp_path / "notes.txt").data / "passage-collection")[0] == "b"


def test_a_port_in_use_is_reported_before_anything_is_written(trials, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert try_file.main([str(tmp_path / "a.txt"), "--port", port]) == 2
    assert f"--port {port}" in capsys.readouterr().err and not trials.exists()


def test_a_wrong_option_is_reported_before_anything_is_written(trials, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a\n")
    with pytest.raises(SystemExit):
        try_file.main([str(tmp_path / "a.txt"), "--poling", "mean"])
    assert "--poling" in capsys.readouterr().err
    assert try_file.main([str(tmp_path / "a.txt"), "--vocab_path", "gone"]) == 2
    assert "--vocab_path gone: no such file" in capsys.readouterr().err and not trials.exists()


def test_the_official_layout_is_used_as_it_is(trials, tmp_path):
    (tmp_path / "own/passage-collection").mkdir(parents=True)
    trial = convert(tmp_path / "own")
    assert trial.data == tmp_path / "own" and not trials.exists()
    (trial.output / "para_emb").mkdir(parents=True)
    (tmp_path / "own.txt").write_text("a\n")
    assert convert(tmp_path / "own.txt").output == trials / "own/small"
    assert (trial.output / "para_emb").exists()


def test_rows_give_example_questions(trials, tmp_path):
    source = tmp_path / "train.jsonl"
    source.write_text(json.dumps({"query": "怎么蒸鱼", "pos": ["清蒸鱼"], "neg": ["红烧肉"]}) + "\n")
    assert (convert(source).data / "dev/dev.q.format").read_text() == "怎么蒸鱼\t-\t-\t0\n"


def test_a_wrong_file_ends_with_one_line(trials, tmp_path, capsys):
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "a.txt").write_text("a\n")
    assert try_file.main([str(tmp_path / "a.txt"), "--model", "./gone"]) == 2
    assert "./gone: no such folder" in capsys.readouterr().err
    for name in ("gone.csv", "empty.csv"):
        assert try_file.main([str(tmp_path / name)]) == 2
        error = capsys.readouterr().err.splitlines()
        assert " ERROR " in error[-1] and name in error[-1]


@pytest.fixture
def stand_ins(trials, tmp_path, monkeypatch):
    """Serve a stand-in of the page; return a function that starts it with a stand-in of the encoder."""
    (tmp_path / "script").mkdir()
    (tmp_path / "script/demo.py").write_text(PAGE)
    monkeypatch.setattr(try_file, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    trial = try_file.Trial(tmp_path / "data", tmp_path / "output")

    def serve(encoder: str) -> int:
        (tmp_path / "encoder.py").write_text(encoder)
        return try_file.serve(trial, free_port(), ["script/demo.py"], ["encoder.py"])

    return serve


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_encoder_runs_beside_the_page(stand_ins, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nothing listens there
    assert stand_ins("print('done'); open('end', 'w')") == 0
    assert (tmp_path / "output/encode.log").read_text() == "done\n"


def test_a_failed_encoding_is_reported(stand_ins, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(try_file, "error", lambda line: (tmp_path / "end").write_text(line))
    assert stand_ins("print('12:00:00 ERROR no such model'); raise SystemExit(2)") == 0
    assert (tmp_path / "end").read_text().endswith(": no such model")


def test_the_encoder_ends_with_the_page(stand_ins, tmp_path):
    stand_ins(f"""
import os, time
open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
open("end", "w")
time.sleep(60)
""")
    pid = (tmp_path / "pid").read_text()
    assert not Path(f"/proc/{pid}").exists()
