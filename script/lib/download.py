"""Download, verify and unpack the data set, or download a model from the Hugging Face hub.

Run by script/download.sh. Unfinished work never has a final name: the archive is downloaded to ARCHIVE.part,
its files are unpacked into a hidden folder beside the target, and both are renamed after their checks. Needs
the standard library alone; `model` also needs huggingface_hub (in requirements.txt). Exit status: 0, or 2
with an error of one line.
"""

import argparse
import contextlib
import errno
import fcntl
import gzip
import hashlib
import http.client
import json
import os
import re
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root

from torch_src.models.hub import is_weights, needed_files
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import atomic_write, from_root
from torch_src.runtime.libraries import import_library
from torch_src.runtime.log import duration, log, warn
from torch_src.runtime.options import OptionParser, integer, number
from torch_src.runtime.program import exit_status

BASE_URL = "https://dataset-bj.cdn.bcebos.com/qianyan/"
FOLDER = "dureader-retrieval-baseline-dataset"
MODEL = "nghuyong/ernie-gram-zh"
# Rows of the published data set; for a .map.json or q2qid file, entries of its JSON object.
ROWS = {
    "train/dual.train.tsv": 889_580,
    "train/cross.train.tsv": 1_111_975,
    "dev/dev.q.format": 2_000,
    "dev/q2qid.dev.json": 2_000,
    "dev/dev.json": 2_000,
    "passage-collection/part-00": 2_024_167,
    "passage-collection/part-01": 2_024_167,
    "passage-collection/part-02": 2_024_167,
    "passage-collection/part-03": 2_024_167,
    "passage-collection/passage2id.map.json": 8_096_668,
    "auxiliary/dev.retrieval.top50.res.tsv": 100_000,
    "auxiliary/dev.retrieval.top50.res.id_map.tsv": 100_000,
}
CHUNK = 1 << 20  # bytes
TIMEOUT = 60  # seconds without data after which a connection counts as lost
LOG_EVERY = 15  # seconds between progress lines
UNPACKED_RATIO = 3.5  # bytes on disk per compressed byte; gzip shrinks Chinese text to a half or a third
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # a retry does not help
JSON_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


class BadArchive(UserError):
    """The archive has the wrong content: unpacking it again would fail in the same way."""


def gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def require_space(folder: Path, needed: float, purpose: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"{folder}: not enough disk space ({gb(needed)} needed {purpose}, {gb(free)} free)")


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


# --- download ---------------------------------------------------------------------------------------


class DownloadLog:
    """Logs the progress of a download every LOG_EVERY seconds, as whole lines."""

    def __init__(self, done: int, total: int):
        self.done, self.first, self.total = done, done, total
        self.start = self.last = time.monotonic()

    def add(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.last >= LOG_EVERY or self.done == self.total:
            self.last = now
            speed = (self.done - self.first) / max(now - self.start, 1e-3)
            left = duration((self.total - self.done) / max(speed, 1))
            share = f"{gb(self.done)} of {gb(self.total)} ({self.done / self.total:.1%})"
            log(f"downloaded {share}  {speed / 1e6:.1f} MB/s  eta {left}")


def remote_version(response: Any) -> dict[str, Any]:
    """Return {"size": bytes of the whole remote file, "version": its ETag or date}."""
    headers = response.headers
    total = headers.get("Content-Length")
    if response.status == 206:
        total = headers.get("Content-Range", "").rpartition("/")[2]
    if not (total or "").isdigit():
        raise UserError(f"{response.url}: the server does not send the size of the file")
    return {"size": int(total), "version": headers.get("ETag") or headers.get("Last-Modified")}


def open_remote(url: str, start: int, known: dict[str, Any]) -> tuple[Any, int, dict[str, Any]]:
    """Return (response, its first byte, remote version); first byte 0 unless `known` can be resumed."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if not start or error.code != 416:  # 416: the remote file is shorter than the local part
            raise
        return open_remote(url, 0, {})
    remote = remote_version(response)
    span = response.headers.get("Content-Range", "")
    if start and response.status == 206 and remote == known and span.startswith(f"bytes {start}-"):
        return response, start, remote
    if not start or response.status == 200:  # 200 to a Range request: the server sends the whole file
        return response, 0, remote
    response.close()
    return open_remote(url, 0, {})


def fetch_once(url: str, part: Path) -> None:
    """Download what `part` still lacks; ConnectionError when the connection ends early."""
    version_path = part.with_name(part.name + ".json")  # of the remote file that `part` is the beginning of
    known = json.loads(version_path.read_text()) if size_of(version_path) else {}
    start = size_of(part) if known else 0
    if known and start == known["size"]:
        return
    response, first, remote = open_remote(url, start, known)
    with response:
        if start:
            log(f"resuming at {gb(start)}" if first else "the download cannot be resumed: starting again")
        needed = remote["size"] * (1 + UNPACKED_RATIO) - size_of(part)
        require_space(part.parent, needed, "to download and unpack")
        progress = DownloadLog(first, remote["size"])
        with open(part, "ab" if first else "wb") as out:
            if not first:  # after `part` was emptied: the version never describes old bytes
                with atomic_write(version_path) as file:
                    json.dump(remote, file)
            while chunk := response.read1(CHUNK):
                out.write(chunk)
                progress.add(len(chunk))
            out.flush()
            os.fsync(out.fileno())
    if size_of(part) != remote["size"]:
        raise ConnectionError(f"{gb(size_of(part))} of {gb(remote['size'])} received")


def fetch(url: str, part: Path, retries: int, wait: float) -> None:
    """Download `part`; give up after `retries` lost connections in a row that brought no new byte."""
    failures = 0
    while True:
        before = size_of(part)
        try:
            return fetch_once(url, part)
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError):
                if error.code < 500 and error.code not in (408, 429):
                    raise UserError(f"{url}: HTTP status {error.code} {error.reason}") from error
            elif isinstance(error, OSError) and (error.filename or error.errno in DISK_ERRORS):
                raise
            failures = 1 if size_of(part) > before else failures + 1
            if failures > retries:
                raise UserError(f"{url}: {error}; run the same command again to resume") from error
            pause = min(wait * 2 ** (failures - 1), 60)
            warn(f"connection lost ({error}); attempt {failures} of {retries} in {pause:.0f} s")
            time.sleep(pause)


def check_sha256(source: Path, archive: Path, wanted: str) -> None:
    """Check the sha256 of `source`, write it beside the archive and rename `source` to the archive."""
    record = archive.with_name(archive.name + ".sha256")
    known = {"DATA_SHA256": wanted}
    if source == archive and size_of(record):
        known[record.name] = record.read_text().split()[0]
    digest = hashlib.sha256()
    with open(source, "rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    found = digest.hexdigest()
    log(f"sha256 {found}  {gb(size_of(source))}  {source.name}")
    for origin, value in known.items():
        if value and value.lower() != found:
            expected = f"expected {value}, from {origin}"
            raise UserError(f"{source}: sha256 mismatch ({expected}); delete the file to download it again")
    with atomic_write(record) as file:  # before the rename: the checksum is never older than the archive
        file.write(f"{found}  {archive.name}\n")
    source.replace(archive)


# --- unpack and verify ------------------------------------------------------------------------------


def check_member(member: tarfile.TarInfo) -> None:
    """BadArchive for a member that could be written outside the folder: by its path, a link or a device."""
    name = member.name.replace("\\", "/")
    if name.startswith("/") or re.match(r"[A-Za-z]:", name) or ".." in name.split("/"):
        raise BadArchive(f"unsafe path {member.name!r}")
    if not (member.isreg() or member.isdir()):
        raise BadArchive(f"{member.name!r} is a link or a device")


def unpack(archive: Path, folder: Path) -> None:
    safer: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # not in early 3.10
    with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            check_member(member)
            require_space(folder, member.size, f"to unpack {member.name}")
            tar.extract(member, folder, set_attrs=False, **safer)
            if member.isreg():
                log(f"unpacked {member.name}  {gb(member.size)}")
        while stream.read(CHUNK):  # to the end of the file, where gzip checks length and CRC
            pass


def line_rows(path: Path) -> int:
    rows, last = 0, b"\n"
    with open(path, "rb") as source:
        while chunk := source.read(CHUNK):
            rows += chunk.count(b"\n")
            last = chunk[-1:]
    return rows + (last != b"\n")


def json_entries(path: Path) -> int:
    """Return the entries of a flat JSON object, by its colons outside strings; memory is bounded."""
    entries, rest, last = 0, b"", b""
    with open(path, "rb") as source:
        while (chunk := source.read(CHUNK)) and len(rest) < 1 << 24:
            bare, quote, rest = JSON_STRING.sub(b"", rest + chunk).partition(b'"')
            rest = quote + rest  # a string that continues in the next chunk
            entries += bare.count(b":")
            last = bare.rstrip()[-1:] or last
    if rest or last != b"}":
        raise BadArchive(f"{path.name} is truncated: its JSON object does not end")
    return entries


def verify(folder: Path, rows: dict[str, int]) -> None:
    """BadArchive, with every wrong file, unless each file of `rows` exists and has that many rows."""
    faults = []
    for name, expected in rows.items():
        if not (folder / name).is_file():
            faults.append(f"{name} is missing")
            continue
        count = json_entries if name.endswith(".map.json") or "q2qid" in name else line_rows
        found = count(folder / name)
        log(f"counted {name}  {found:,} rows")
        if found != expected:
            faults.append(f"{name} has {found:,} rows (expected {expected:,})")
    if faults:
        raise BadArchive("; ".join(faults))


def install(archive: Path, target: Path, rows: dict[str, int]) -> None:
    """Unpack beside the target, verify, rename. A bad archive is renamed to ARCHIVE.bad."""
    fresh = target.with_name(f".{target.name}.unpacking")
    shutil.rmtree(fresh, ignore_errors=True)  # from a killed run
    require_space(target.parent, size_of(archive) * UNPACKED_RATIO, "to unpack")
    fresh.mkdir()
    try:
        unpack(archive, fresh)
        folders = [path for path in fresh.iterdir() if path.is_dir()]
        root = folders[0] if len(folders) == 1 else fresh  # with or without one folder around all files
        verify(root, rows)
        os.sync()
        root.replace(target)
    except (BadArchive, tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        bad = archive.with_name(archive.name + ".bad")
        archive.replace(bad)
        raise UserError(f"{archive}: bad archive ({error}); renamed to {bad.name}, run again") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


@contextlib.contextmanager
def download_lock(folder: Path) -> Iterator[None]:
    """Lock the folder itself, without a lock file: two runs would write to the same .part file."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another download into this folder is running") from None
        except OSError:
            warn(f"{folder}: this file system has no locks; run one download at a time")
        yield
    finally:
        os.close(handle)


def expected_rows(path: str | None) -> dict[str, int]:
    if not path:
        return ROWS
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
        return {str(name): int(count) for name, count in rows.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: expected a JSON object {{relative path: rows}} ({error})") from error


def download_data(args: argparse.Namespace) -> None:
    rows = expected_rows(args.counts)
    url = args.url if args.url.endswith(".gz") else f"{args.url.rstrip('/')}/{FOLDER}.tar.gz"
    if not re.fullmatch(r"https?://[^\s/]+/\S*", url):
        raise UserError(f"--url {url}: expected an address that begins with https:// or http://")
    target, archive = args.to / FOLDER, args.to / f"{FOLDER}.tar.gz"
    args.to.mkdir(parents=True, exist_ok=True)
    with download_lock(args.to):
        if target.exists():
            try:
                verify(target, rows)
            except BadArchive as error:
                raise UserError(f"{target}: incomplete ({error}); move it away and run again") from error
            return log(f"{target}: up to date")
        part = archive.with_name(archive.name + ".part")
        if not archive.exists():
            log(f"downloading {url}")
            fetch(url, part, args.retries, args.retry_wait)
        check_sha256(archive if archive.exists() else part, archive, os.environ.get("DATA_SHA256", ""))
        part.with_name(part.name + ".json").unlink(missing_ok=True)
        install(archive, target, rows)
    log(f"wrote {target}; {archive.name} can be deleted")


# --- pre-trained model ------------------------------------------------------------------------------


def model_files(names: list[str]) -> list[str]:
    """Return the files of a model that are used: one kind of weights, settings, tokenizer."""
    files = needed_files(names)
    if not any(map(is_weights, files)) or not any(name.rpartition("/")[2] == "config.json" for name in files):
        raise UserError("the repository has no config.json with safetensors or pytorch_model.bin")
    return files


def download_model(args: argparse.Namespace) -> None:
    """Download into a hidden folder, where a later run resumes; rename it when it is complete."""
    target = args.to / "torch_pretrained_models" / args.name.rstrip("/").rpartition("/")[2]
    if target.exists():
        present = [path.name for path in target.rglob("*")]
        if "config.json" not in present or not any(map(is_weights, present)):
            raise UserError(f"{target}: no config.json or no weights; move it away and run again")
        return log(f"{target}: up to date; set pretrained_model_path to it")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    hub = import_library("huggingface_hub", "requirements.txt")
    fresh = target.with_name(f".{target.name}.unfinished")
    try:
        info = hub.HfApi().model_info(args.name)
        files = model_files([sibling.rfilename for sibling in info.siblings or ()])
        log(f"downloading {args.name} at revision {info.sha}: {', '.join(files)}")
        hub.snapshot_download(args.name, revision=info.sha, local_dir=str(fresh), allow_patterns=files)
    except Exception as error:  # the errors of huggingface_hub share no base class across its versions
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot download model {args.name}: {reason}") from error
    missing = [name for name in files if not (fresh / name).is_file()]
    if missing:
        raise UserError(f"{args.name}: not downloaded: {', '.join(missing)}; run again to resume")
    shutil.rmtree(fresh / ".cache", ignore_errors=True)  # state of the hub's own resume
    fresh.replace(target)
    log(f"wrote {target}; set pretrained_model_path to it")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = OptionParser(
        "Download the data set (disk: 4.5 times the archive), or with `model [NAME]` a model from the\n"
        "Hugging Face hub. Checks every file; the same command resumes. The connection decides the time.",
        "download.sh",
    )
    env = os.environ.get
    parser.add_argument("what", nargs="?", choices=("data", "model"), default="data")
    parser.add_argument("name", nargs="?", help=f"model name, only after `model` (default: {MODEL})")
    here = Path(from_root("."))
    parser.add_argument("--to", type=Path, default=here, help="into this folder (default: the repository)")
    parser.add_argument(
        "--url",
        default=env("DATA_URL") or BASE_URL,
        help="address of the archive or of its folder (env DATA_URL; default: %(default)s)",
    )
    parser.add_argument(
        "--counts",
        default=env("DATA_COUNTS"),
        metavar="FILE",
        help="JSON file {relative path: rows} to verify instead of the published counts (env DATA_COUNTS)",
    )
    retries, seconds = integer(0, 1000), number(0, 3600)
    parser.add_argument("--retries", type=retries, default=5, help="after a lost connection (default: 5)")
    parser.add_argument("--retry-wait", type=seconds, default=2, help="seconds before a retry (default: 2)")
    args = parser.parse_args(argv)
    if args.name and args.what == "data":
        parser.error(f"unexpected {args.name!r}: only `model` takes a name")
    args.name = args.name or MODEL
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    return exit_status(lambda: (download_model if args.what == "model" else download_data)(args))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
