"""What download.sh runs: fetch, check and unpack the data set, or fetch a model from the Hugging Face hub.

Nothing half-done bears a final name: bytes gather in <archive>.part, files are unpacked into a hidden
folder beside the target, and both are renamed only after their checks. Standard library only (the model
command imports huggingface_hub, which comes with transformers). Exit status 0, or 2 with one line.
"""

from __future__ import annotations

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
from pathlib import Path

BASE_URL = "https://dataset-bj.cdn.bcebos.com/qianyan/"
FOLDER = "dureader-retrieval-baseline-dataset"
MODEL = "nghuyong/ernie-gram-zh"
ROWS = {  # rows of the published data set; of a .map.json or q2qid file, the entries of its one object
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
TIMEOUT = 60  # seconds without a byte before a connection counts as dropped
LOG_EVERY = 15  # seconds between progress lines
UNPACKED_RATIO = 3.5  # room to unpack per compressed byte; Chinese text gzips to a half or a third
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # trying again would not help


class Fault(Exception):
    """The user's, the network's or the data's fault: printed as one line, exit status 2."""


class BadData(Fault):
    """The archive itself is at fault: unpacking it once more would end the same way."""


def log(text: str) -> None:
    print(text, flush=True)


def gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def need_space(folder: Path, needed: float, purpose: str) -> None:
    free = free_bytes(folder)
    if free < needed:
        raise Fault(f"not enough disk in {folder}: {gb(needed)} needed {purpose}, {gb(free)} free")


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def write_text(path: Path, text: str) -> None:
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


# --- download ---------------------------------------------------------------------------------------


class Progress:
    """Prints one whole line every LOG_EVERY seconds, so that a nohup log stays readable."""

    def __init__(self, done: int, total: int):
        self.done, self.first, self.total = done, done, total
        self.began = self.logged = time.monotonic()

    def add(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.logged >= LOG_EVERY or self.done == self.total:
            self.logged = now
            speed = (self.done - self.first) / max(now - self.began, 1e-3)
            left = int((self.total - self.done) / max(speed, 1))
            log(
                f"downloaded {gb(self.done)} of {gb(self.total)} ({self.done / self.total:.1%})  "
                f"{speed / 1e6:.1f} MB/s  eta {left // 3600}h{left // 60 % 60:02d}m{left % 60:02d}s"
            )


def remote_identity(response) -> dict:
    """{"size": bytes of the whole remote file, "version": its ETag or date}, to know it again by."""
    headers = response.headers
    total = headers.get("Content-Length")
    if response.status == 206:
        total = headers.get("Content-Range", "").rpartition("/")[2]
    if not (total or "").isdigit():
        raise Fault(f"{response.url}: the server does not tell the size, so nothing could be verified")
    return {"size": int(total), "version": headers.get("ETag") or headers.get("Last-Modified")}


def open_remote(url: str, start: int, known: dict):
    """(response, first byte it sends, remote identity); from byte 0 where `known` cannot be resumed."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if not start or error.code != 416:  # 416: the remote file is now shorter than what is here
            raise
        return open_remote(url, 0, {})
    remote = remote_identity(response)
    span = response.headers.get("Content-Range", "")
    if start and response.status == 206 and remote == known and span.startswith(f"bytes {start}-"):
        return response, start, remote
    if not start or response.status == 200:  # 200 to a Range request: the server sends all of it
        return response, 0, remote
    response.close()
    return open_remote(url, 0, {})


def fetch_once(url: str, part: Path) -> None:
    """Bring `part` to its full size, going on from what is there; ConnectionError if cut short."""
    note = part.with_name(part.name + ".json")  # identity of the file that `part` is a beginning of
    known = json.loads(note.read_text()) if size_of(note) else {}
    start = size_of(part) if known else 0
    if known and start == known["size"]:
        return
    response, begin, remote = open_remote(url, start, known)
    with response:
        if start:
            log(f"resuming at {gb(start)}" if begin else "cannot resume here: starting anew")
        need_space(
            part.parent, remote["size"] * (1 + UNPACKED_RATIO) - size_of(part), "to download and unpack"
        )
        progress = Progress(begin, remote["size"])
        with open(part, "ab" if begin else "wb") as out:
            if not begin:  # after `part` was emptied: old bytes never stand beside a new note
                write_text(note, json.dumps(remote))
            while chunk := response.read1(CHUNK):
                out.write(chunk)
                progress.add(len(chunk))
            out.flush()
            os.fsync(out.fileno())
    if size_of(part) != remote["size"]:
        raise ConnectionError(f"{gb(size_of(part))} of {gb(remote['size'])} received")


def fetch(url: str, part: Path, retries: int, wait: float) -> None:
    """fetch_once, again after a dropped connection: `retries` times in a row without a new byte."""
    failures = 0
    while True:
        before = size_of(part)
        try:
            return fetch_once(url, part)
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError):
                if error.code < 500 and error.code not in (408, 429):
                    raise Fault(f"{url} answers {error.code} {error.reason}") from error
            elif isinstance(error, OSError) and (error.filename or error.errno in DISK_ERRORS):
                raise
            failures = 1 if size_of(part) > before else failures + 1
            if failures > retries:
                raise Fault(f"{url}: {error}; run again to resume") from error
            pause = min(wait * 2 ** (failures - 1), 60)
            log(f"connection lost ({error}); try {failures} of {retries} in {pause:.0f} s")
            time.sleep(pause)


def settle(source: Path, archive: Path, expected: str) -> None:
    """Check the sha256 of source, record it beside the archive and give source the archive's name."""
    record = archive.with_name(archive.name + ".sha256")
    wanted = {"DATA_SHA256": expected}
    if source == archive and size_of(record):
        wanted[record.name] = record.read_text().split()[0]
    digest = hashlib.sha256()
    with open(source, "rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    found = digest.hexdigest()
    log(f"sha256 {found}  {gb(size_of(source))}  {source.name}")
    for origin, value in wanted.items():
        if value and value.lower() != found:
            raise Fault(f"{source}: its sha256 is not the {value} of {origin}; delete it to download it anew")
    write_text(record, f"{found}  {archive.name}\n")  # before the rename: a record is never older
    source.replace(archive)


# --- unpack and verify ------------------------------------------------------------------------------


def check_member(member: tarfile.TarInfo) -> None:
    """BadData for whatever could be written outside the folder: by path, by link or as a device."""
    name = member.name.replace("\\", "/")
    if name.startswith("/") or re.match(r"[A-Za-z]:", name) or ".." in name.split("/"):
        raise BadData(f"it holds the unsafe path {member.name!r}")
    if not (member.isreg() or member.isdir()):
        raise BadData(f"it holds a link or a device, {member.name!r}")


def unpack(archive: Path, folder: Path) -> None:
    safer = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # lacking in older 3.9 to 3.11
    with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            check_member(member)
            need_space(folder, member.size, f"to unpack {member.name}")
            tar.extract(member, folder, set_attrs=False, **safer)
            if member.isreg():
                log(f"unpacked {member.name}  {gb(member.size)}")
        while stream.read(CHUNK):  # to the very end, where gzip checks length and CRC
            pass


def line_rows(path: Path) -> int:
    rows, last = 0, b"\n"
    with open(path, "rb") as source:
        while chunk := source.read(CHUNK):
            rows += chunk.count(b"\n")
            last = chunk[-1:]
    return rows + (last != b"\n")


def json_entries(path: Path) -> int:
    """Entries of a file that is one flat JSON object, in bounded memory: its colons outside strings."""
    string = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
    entries, rest, last = 0, b"", b""
    with open(path, "rb") as source:
        while (chunk := source.read(CHUNK)) and len(rest) < 1 << 24:
            bare, quote, rest = string.sub(b"", rest + chunk).partition(b'"')
            rest = quote + rest  # a string that goes on in the next chunk
            entries += bare.count(b":")
            last = bare.rstrip()[-1:] or last
    if rest or last != b"}":
        raise BadData(f"{path.name} is broken off: its JSON object does not end")
    return entries


def verify(folder: Path, rows: dict[str, int]) -> None:
    """BadData, naming every file at fault, unless each file of `rows` is there with that many rows."""
    faults = []
    for name, wanted in rows.items():
        if not (folder / name).is_file():
            faults.append(f"{name} is missing")
            continue
        count = json_entries if name.endswith(".map.json") or "q2qid" in name else line_rows
        found = count(folder / name)
        log(f"counted {name}  {found:,} rows")
        if found != wanted:
            faults.append(f"{name} has {found:,} rows instead of {wanted:,}")
    if faults:
        raise BadData("; ".join(faults))


def install(archive: Path, target: Path, rows: dict[str, int]) -> None:
    """Unpack beside the target, verify, rename; an unusable archive is set aside as <archive>.bad."""
    fresh = target.with_name(f".{target.name}.unpacking")
    shutil.rmtree(fresh, ignore_errors=True)  # left by a killed run
    need_space(target.parent, size_of(archive) * UNPACKED_RATIO, "to unpack")
    fresh.mkdir()
    try:
        unpack(archive, fresh)
        folders = [path for path in fresh.iterdir() if path.is_dir()]
        root = folders[0] if len(folders) == 1 else fresh  # with or without one folder around it all
        verify(root, rows)
        os.sync()
        root.replace(target)
    except (BadData, tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        bad = archive.with_name(archive.name + ".bad")
        archive.replace(bad)
        raise Fault(f"{archive.name} is unusable, set aside as {bad.name}: {error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


@contextlib.contextmanager
def only_run(folder: Path):
    """Lock the folder: two runs would write into one .part file."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Fault(f"{folder}: another download into this folder is running") from error
        except OSError:
            log("note: this file system has no locks: start one download at a time")
        yield
    finally:
        os.close(handle)


def wanted_rows(path: str | None) -> dict[str, int]:
    if not path:
        return ROWS
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
        return {str(name): int(count) for name, count in rows.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise Fault(f"{path}: expected a JSON object of relative path: rows ({error})") from error


def get_data(args: argparse.Namespace) -> None:
    rows = wanted_rows(args.counts)
    url = args.url if args.url.endswith(".gz") else f"{args.url.rstrip('/')}/{FOLDER}.tar.gz"
    if not re.fullmatch(r"https?://[^\s/]+/\S*", url):
        raise Fault(f"{url}: expected an address that begins with https:// or http://")
    target, archive = args.to / FOLDER, args.to / f"{FOLDER}.tar.gz"
    args.to.mkdir(parents=True, exist_ok=True)
    with only_run(args.to):
        if target.exists():
            try:
                verify(target, rows)
            except BadData as error:
                raise Fault(f"{target} is not whole: {error}; move it away and run again") from error
            return log(f"{target} is up to date")
        part = archive.with_name(archive.name + ".part")
        if not archive.exists():
            log(f"downloading {url}")
            fetch(url, part, args.retries, args.retry_wait)
        settle(archive if archive.exists() else part, archive, os.environ.get("DATA_SHA256", ""))
        part.with_name(part.name + ".json").unlink(missing_ok=True)
        install(archive, target, rows)
    log(f"{target} is ready; {archive.name} is no longer needed")


# --- pre-trained model ------------------------------------------------------------------------------


def is_weights(name: str) -> bool:
    return name.endswith(".safetensors") or re.fullmatch(r"pytorch_model.*\.bin", name) is not None


def model_files(names: list[str]) -> list[str]:
    """Of a model's files, those that transformers needs: one kind of weights, configuration, tokenizer."""
    top = [name for name in names if "/" not in name]  # sub-folders hold onnx, openvino and the like
    weights = [name for name in top if is_weights(name)]
    safe = [name for name in weights if name.endswith(".safetensors")]
    if not weights or "config.json" not in top:
        raise Fault("it has no config.json with safetensors or pytorch_model.bin beside it")
    return (safe or weights) + [name for name in top if name.endswith((".json", ".txt", ".model"))]


def get_model(args: argparse.Namespace) -> None:
    """Download into a hidden folder, where a later run resumes, and rename when every file is there."""
    target = args.to / "torch_pretrained_models" / args.name.rstrip("/").rpartition("/")[2]
    if target.exists():
        there = [path.name for path in target.iterdir()] if target.is_dir() else []
        if "config.json" not in there or not any(map(is_weights, there)):
            raise Fault(f"{target} is there without config.json or weights; move it away and run again")
        return log(f"{target} is up to date: set pretrained_model_path to it")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise Fault("huggingface_hub is missing: python3 -m pip install -r requirements.txt") from error
    fresh = target.with_name(f".{target.name}.unfinished")
    try:
        info = hub.HfApi().model_info(args.name)
        files = model_files([sibling.rfilename for sibling in info.siblings])
        log(f"downloading {args.name} at revision {info.sha}: {', '.join(files)}")
        hub.snapshot_download(args.name, revision=info.sha, local_dir=str(fresh), allow_patterns=files)
    except Exception as error:  # the hub's errors have no base class in common over its versions
        raise Fault(f"cannot download model {args.name}: {first_line(error)}") from error
    lacking = [name for name in files if not (fresh / name).is_file()]
    if lacking:
        raise Fault(f"{args.name}: {', '.join(lacking)} did not arrive; run again to resume")
    shutil.rmtree(fresh / ".cache", ignore_errors=True)  # the hub's notes for resuming
    fresh.replace(target)
    log(f"{target} is ready: set pretrained_model_path to it")


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="download.sh",
        description="Download the data set (default), or, "
        "with `model [NAME]`, a model of the Hugging Face hub.",
    )
    env = os.environ.get
    parser.add_argument("what", nargs="?", choices=("data", "model"), default="data")
    parser.add_argument("name", nargs="?", help=f"model name, after `model` only (default: {MODEL})")
    parser.add_argument("--to", type=Path, default=Path("."), help="folder to download into (default: here)")
    parser.add_argument(
        "--url",
        default=env("DATA_URL") or BASE_URL,
        help="address of the archive or of its folder (env DATA_URL; default: %(default)s)",
    )
    parser.add_argument(
        "--counts",
        default=env("DATA_COUNTS"),
        metavar="FILE",
        help="JSON file of {relative path: rows} to verify instead of the published counts (env DATA_COUNTS)",
    )
    parser.add_argument("--retries", type=int, default=5, help="tries after a lost connection (default: 5)")
    parser.add_argument("--retry-wait", type=float, default=2, help="seconds before the first (default: 2)")
    args = parser.parse_args(argv)
    if args.name and args.what == "data":
        parser.error(f"unexpected {args.name!r}: only `model` takes a name")
    args.name = args.name or MODEL
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        (get_model if args.what == "model" else get_data)(args)
    except (Fault, OSError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run again to resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
