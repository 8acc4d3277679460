"""script/download.sh and lib/download.py with a local test server, without a network."""

import gzip
import hashlib
import http.server
import importlib.util
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import threading
import types
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "script"
FOLDER = "dureader-retrieval-baseline-dataset"
ARCHIVE = f"{FOLDER}.tar.gz"
NOISE = random.Random(0).randbytes(60_000).hex().encode()  # incompressible
FILES = {
    "train/dual.train.tsv": NOISE + b"\nq\t\tp\t\tn\t0",  # two rows, the last without a newline
    "dev/q2qid.dev.json": json.dumps({'a "quoted": query': "1", "一：\\": "2"}).encode(),
    "passage-collection/passage2id.map.json": b'{"0": "x", "1": "y", "2": "z"}\n',
}
ROWS = {"train/dual.train.tsv": 2, "dev/q2qid.dev.json": 2, "passage-collection/passage2id.map.json": 3}


class Server(http.server.ThreadingHTTPServer):
    """Serves `body`; can ignore Range, cut each of the first `cuts` responses in half, or fail."""

    body = b""
    etag = '"one"'
    ranges = True
    cuts = 0
    status = 200

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.sent = []  # (first byte, bytes sent) of each response


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        if server.status != 200:
            return self.send_error(server.status)
        wanted = self.headers.get("Range") if server.ranges else None
        start = int(wanted[len("bytes=") : -1]) if wanted else 0
        if start >= len(server.body):
            return self.send_error(416)
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(server.body) - 1}/{len(server.body)}")
        self.send_header("Content-Length", str(len(server.body) - start))
        self.send_header("ETag", server.etag)
        stop = len(server.body)
        if server.cuts:
            server.cuts -= 1
            stop = (start + stop) // 2
        server.sent.append((start, stop - start))  # before the client can read it
        self.end_headers()
        self.wfile.write(server.body[start:stop])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with Server() as server:
        server.body = pack(FILES)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def download(server, tmp_path, monkeypatch):
    """lib/download.py as a module, with `get(*options)` that downloads from the server to tmp_path."""
    spec = importlib.util.spec_from_file_location("download", SCRIPTS / "lib/download.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("DATA_URL", "DATA_SHA256", "HF_ENDPOINT", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    monkeypatch.setenv("DATA_COUNTS", str(tmp_path / "rows.json"))
    common = ["--url", address(server), "--to", str(tmp_path), "--retry-wait", "0"]
    module.get = lambda *options: module.main([*common, *options])
    return module


def address(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_port}/qianyan/"


def pack(files: dict[str, bytes], *extra: tarfile.TarInfo) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{FOLDER}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in extra:
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    return packed.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    info.size = 1 if kind == tarfile.REGTYPE else 0
    return info


def assert_complete(folder: Path) -> None:
    assert {name: (folder / FOLDER / name).read_bytes() for name in FILES} == FILES


def assert_failed(folder: Path, captured, complaint: str) -> None:
    """An error on stderr, no data set, and no partly unpacked folder."""
    last = captured.err.splitlines()[-1]
    assert " ERROR " in last and complaint in last and captured.err.count(" ERROR ") == 1, captured.err
    assert not (folder / FOLDER).exists() and not list(folder.glob(".*"))


def test_fresh_download_then_up_to_date(download, server, tmp_path, capsys):
    assert download.get() == 0
    assert_complete(tmp_path)
    digest = hashlib.sha256(server.body).hexdigest()
    assert (tmp_path / f"{ARCHIVE}.sha256").read_text() == f"{digest}  {ARCHIVE}\n"
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [FOLDER, ARCHIVE, f"{ARCHIVE}.sha256", "rows.json"]
    assert "100.0%" in capsys.readouterr().out
    assert download.get() == 0
    assert "up to date" in capsys.readouterr().out
    assert server.sent == [(0, len(server.body))]


def test_an_interrupted_download_resumes_with_the_missing_bytes_only(download, server, tmp_path, capsys):
    server.cuts, size = 1, len(server.body)
    assert download.get("--retries", "0") == 2
    assert_failed(tmp_path, capsys.readouterr(), "again to resume")
    assert not (tmp_path / ARCHIVE).exists()
    assert download.get() == 0
    assert server.sent == [(0, size // 2), (size // 2, size - size // 2)]
    assert_complete(tmp_path)


def test_a_lost_connection_is_retried(download, server, tmp_path):
    server.cuts = 2
    assert download.get("--retries", "1") == 0  # each attempt received new bytes, so the retries start over
    assert [start for start, _ in server.sent] == [0, server.sent[0][1], sum(n for _, n in server.sent[:2])]
    assert sum(count for _, count in server.sent) == len(server.body)
    assert_complete(tmp_path)


def test_a_server_without_range_sends_everything_again(download, server, tmp_path, capsys):
    server.cuts, server.ranges = 1, False
    assert download.get() == 0
    assert "cannot be resumed" in capsys.readouterr().out
    assert server.sent[1] == (0, len(server.body))
    assert_complete(tmp_path)


@pytest.mark.parametrize("shorter", [False, True])
def test_a_changed_remote_file_replaces_the_old_part(download, server, tmp_path, shorter):
    server.cuts = 1
    server.body = pack({**FILES, "more": random.Random(1).randbytes(500_000)}) if shorter else server.body
    assert download.get("--retries", "0") == 2
    server.body, server.etag = pack(FILES), '"two"'
    assert download.get() == 0
    assert server.sent[-1] == (0, len(server.body))
    assert_complete(tmp_path)


@pytest.mark.parametrize("status, answer", [(404, "404"), (503, "503")])
def test_http_errors(download, server, tmp_path, capsys, status, answer):
    server.status = status
    assert download.get("--retries", "1") == 2
    assert_failed(tmp_path, capsys.readouterr(), answer)


def test_an_invalid_address(download, tmp_path, capsys):
    assert download.get("--url", "ftp.example.com") == 2
    assert_failed(tmp_path, capsys.readouterr(), "--url ftp.example.com")


def broken_crc(body: bytes) -> bytes:
    return body[:-8] + bytes(byte ^ 255 for byte in body[-8:-4]) + body[-4:]


@pytest.mark.parametrize(
    "harm, complaint",
    [
        (lambda body: body[: len(body) // 2], "end-of-stream"),
        (lambda body: body[:-9], "end-of-stream"),
        (broken_crc, "CRC"),
        (lambda body: b"<html>busy</html>", "gzip"),
        (lambda body: gzip.compress(b""), "empty"),
    ],
)
def test_a_damaged_archive_is_renamed(download, server, tmp_path, capsys, harm, complaint):
    server.body = harm(server.body)
    assert download.get() == 2
    assert_failed(tmp_path, capsys.readouterr(), complaint)
    assert not (tmp_path / ARCHIVE).exists() and (tmp_path / f"{ARCHIVE}.bad").exists()
    server.body = pack(FILES)
    assert download.get() == 0
    assert_complete(tmp_path)


@pytest.mark.parametrize(
    "changed, complaint",
    [
        ({"dev/q2qid.dev.json": b'{"a": "1"}'}, "dev/q2qid.dev.json has 1 rows (expected 2)"),
        ({"dev/q2qid.dev.json": b'{"a": "1", "b": "2"'}, "truncated"),
        ({"dev/q2qid.dev.json": b'{"a": "1", "b": "2'}, "truncated"),
        ({"train/dual.train.tsv": b"1\n2\n3"}, "dual.train.tsv has 3 rows (expected 2)"),
    ],
)
def test_wrong_row_counts(download, server, tmp_path, capsys, changed, complaint):
    server.body = pack({**FILES, **changed})
    assert download.get() == 2
    assert_failed(tmp_path, capsys.readouterr(), complaint)


@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_counting_does_not_depend_on_chunks(download, tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(download, "CHUNK", chunk)
    for name in ("dev/q2qid.dev.json", "passage-collection/passage2id.map.json"):
        path = tmp_path / "some.json"
        path.write_bytes(FILES[name])
        assert download.json_entries(path) == ROWS[name]
        assert download.line_rows(path) == 1


def test_the_published_counts_agree_with_each_other(download):
    parts = [rows for name, rows in download.ROWS.items() if "/part-" in name]
    assert sum(parts) == download.ROWS["passage-collection/passage2id.map.json"] == 8_096_668
    assert download.ROWS["train/cross.train.tsv"] * 4 == download.ROWS["train/dual.train.tsv"] * 5


@pytest.mark.slow
@pytest.mark.parametrize("with_filter", [True, False])
@pytest.mark.parametrize(
    "bad, complaint",
    [
        (member(f"{FOLDER}/../../evil"), "unsafe path"),
        (member("/tmp/evil"), "unsafe path"),
        (member("..\\evil"), "unsafe path"),
        (member("C:evil"), "unsafe path"),
        (member(f"{FOLDER}/link", tarfile.SYMTYPE, "/etc/passwd"), "link"),
        (member(f"{FOLDER}/link", tarfile.LNKTYPE, f"{FOLDER}/dev/q2qid.dev.json"), "link"),
        (member(f"{FOLDER}/pipe", tarfile.FIFOTYPE), "device"),
    ],
)
def test_unsafe_archives_are_rejected(
    download, server, tmp_path, monkeypatch, capsys, bad, complaint, with_filter
):
    if not with_filter:
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    server.body = pack(FILES, bad)
    assert download.get() == 2
    assert_failed(tmp_path, capsys.readouterr(), complaint)
    assert not list(tmp_path.parent.glob("evil"))


def test_an_archive_of_the_bare_files(download, server, tmp_path):
    server.body = pack({}, *[member(name) for name in ROWS])
    (tmp_path / "rows.json").write_text(json.dumps({"train/dual.train.tsv": 1}))
    assert download.get() == 0
    assert (tmp_path / FOLDER / "train/dual.train.tsv").read_bytes() == b"x"


def test_not_enough_disk(download, server, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage._replace(free=len(server.body)))
    assert download.get() == 2
    assert_failed(tmp_path, capsys.readouterr(), "not enough disk space")
    assert not (tmp_path / ARCHIVE).exists() and not (tmp_path / f"{ARCHIVE}.part").exists()


def test_expected_checksum(download, server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DATA_SHA256", "0" * 64)
    assert download.get() == 2
    assert_failed(tmp_path, capsys.readouterr(), "DATA_SHA256")
    monkeypatch.setenv("DATA_SHA256", hashlib.sha256(server.body).hexdigest().upper())
    assert download.get() == 0
    assert server.sent == [(0, len(server.body))]  # the bytes were kept
    assert_complete(tmp_path)


def test_an_archive_that_no_longer_matches_its_checksum(download, tmp_path, capsys):
    (tmp_path / ARCHIVE).write_bytes(pack(FILES))
    (tmp_path / f"{ARCHIVE}.sha256").write_text(f"{'1' * 64}  {ARCHIVE}\n")
    assert download.get() == 2
    assert_failed(tmp_path, capsys.readouterr(), f"{ARCHIVE}.sha256")


def test_an_existing_archive_is_not_downloaded(download, server, tmp_path):
    (tmp_path / ARCHIVE).write_bytes(pack(FILES))
    (tmp_path / f".{FOLDER}.unpacking").mkdir()  # from a killed run
    assert download.get() == 0
    assert_complete(tmp_path)
    assert server.sent == []


def test_an_incomplete_folder_is_not_touched(download, server, tmp_path, capsys):
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "mine").write_text("mine")
    assert download.get() == 2
    assert "move it away" in capsys.readouterr().err
    assert (tmp_path / FOLDER / "mine").read_text() == "mine" and server.sent == []


def test_two_runs_at_once(download, tmp_path, capsys):
    with download.download_lock(tmp_path):
        assert download.get() == 2
    assert_failed(tmp_path, capsys.readouterr(), "another download")


@pytest.mark.slow
def test_the_shell_script_by_itself(server, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    env = {**os.environ, "DATA_URL": address(server), "no_proxy": "127.0.0.1"}
    command = ["sh", SCRIPTS / "download.sh"]
    shown = subprocess.run([*command, "--help"], env=env, capture_output=True, text=True, check=True)
    assert "DATA_URL" in shown.stdout
    options = ["--counts", "rows.json", "--to", "."]
    subprocess.run([*command, *options], cwd=tmp_path, env=env, check=True)
    assert_complete(tmp_path)


def test_the_standard_library_is_enough(tmp_path):
    command = [sys.executable, "-S", SCRIPTS / "lib/download.py", "--url", "none", "--to", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "--url none" in done.stderr


class FakeHub(types.ModuleType):
    """Replaces huggingface_hub: one repository with the files `names`, of which `lost` never arrive."""

    names = ["config.json", "vocab.txt", "pytorch_model.bin", "tf_model.h5", "onnx/config.json", "README.md"]
    lost = ()

    def HfApi(self):
        return self

    def model_info(self, name):
        siblings = [types.SimpleNamespace(rfilename=each) for each in self.names]
        return types.SimpleNamespace(sha="0123", siblings=siblings)

    def snapshot_download(self, name, revision, local_dir, allow_patterns):
        Path(local_dir).mkdir(parents=True, exist_ok=True)
        for each in allow_patterns:
            if each not in self.lost:
                (Path(local_dir) / each).write_text(name)


@pytest.fixture
def hub(monkeypatch):
    hub = FakeHub("huggingface_hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    return hub


def test_only_the_needed_files_of_a_model_are_downloaded(download, hub, tmp_path, capsys):
    assert download.get("model") == 0
    folder = tmp_path / "torch_pretrained_models" / "ernie-gram-zh"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "pytorch_model.bin", "vocab.txt"]
    assert "pretrained_model_path" in capsys.readouterr().out
    hub.names = []
    assert download.get("model") == 0
    assert "up to date" in capsys.readouterr().out


def test_safetensors_are_preferred(download):
    names = ["config.json", "model.safetensors", "pytorch_model.bin", "training_args.bin", "spiece.model"]
    assert download.model_files(names) == ["model.safetensors", "config.json", "spiece.model"]


def test_the_modules_of_a_model_are_downloaded_and_other_formats_are_not(download):
    wanted = ["model.safetensors", "2_Dense/pytorch_model.bin", "config.json", "modules.json"]
    wanted += ["1_Pooling/config.json", "2_Dense/config.json", "chat_template.jinja"]
    other = ["onnx/model.onnx", "onnx/config.json", "openvino/pytorch_model.bin", "pytorch_model.bin"]
    assert download.model_files([*wanted[2:], *other, *wanted[:2]]) == wanted
    old = ["0_Transformer/config.json", "0_Transformer/pytorch_model.bin", "modules.json"]
    assert sorted(download.model_files(old)) == old


@pytest.mark.parametrize(
    "lost, names, complaint",
    [
        (("vocab.txt",), FakeHub.names, "not downloaded: vocab.txt"),
        ((), ["config.json", "tf_model.h5"], "no config.json with safetensors"),
    ],
)
def test_an_incomplete_model_has_no_final_name(download, hub, tmp_path, capsys, lost, names, complaint):
    hub.lost, hub.names = lost, names
    assert download.get("model", "some/model") == 2
    assert_failed(tmp_path, capsys.readouterr(), complaint)
    assert not (tmp_path / "torch_pretrained_models" / "model").exists()


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["HF_HUB_OFFLINE", "HF_ENDPOINT"])
def test_model_errors_are_one_line(server, tmp_path, setting):
    pytest.importorskip("huggingface_hub")
    server.status = 404  # to the hub, an unknown name
    value = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": address(server).rstrip("/")}[setting]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "no_proxy": "127.0.0.1", "HF_HOME": str(tmp_path), setting: value}
    command = ["sh", SCRIPTS / "download.sh", "model", "some/name"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert " ERROR cannot download model some/name" in done.stderr and done.stderr.count("\n") == 1
