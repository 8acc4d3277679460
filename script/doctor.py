"""Check this machine: packages, GPU and driver, faiss, disk, memory, network, data, model, output folder.

    python script/doctor.py
    python script/doctor.py --data_dir D --pretrained_model_path M --output_dir O

One line for each check: ok, WARNING or ERROR with how to fix it. Takes a few seconds, changes nothing, and
needs no package. Exit status: 0, or 1 when there is an error.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from http.client import HTTPException
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

from torch_src.dual_hparams import DualHparams
from torch_src.models.hub import is_hub_name
from torch_src.runtime.commands import command, download, pip_install, python
from torch_src.runtime.errors import UserError, first_line
from torch_src.runtime.files import ROOT, from_root
from torch_src.runtime.libraries import GPU_REQUIREMENTS, VENV, how_to_install, requirements_of
from torch_src.runtime.locks import folder_lock
from torch_src.runtime.options import OptionParser

OK, WARNING, ERROR = "ok", "WARNING", "ERROR"
REQUIREMENT = re.compile(r"(?m)^(\w[\w-]*)((?:[<>=!]=?[\d.]+,?)*)")
HUB, MIRROR = "https://huggingface.co", "https://hf-mirror.com"
SECONDS = 5  # that the hub and nvidia-smi get to answer
# The default job: vectors of 8,096,668 passages, checkpoints, caches (docs/reproduce_dureader.md).
JOB_DISK_GB, LEAST_DISK_GB, JOB_MEMORY_GB, LEAST_MEMORY_GB = 26, 1, 16, 2
SMI = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]


class Finding(NamedTuple):
    """A line of the output."""

    level: str
    what: str
    text: str


def numbers(version: str) -> tuple[int, ...]:
    """Return the release of a version such as 2.13.0+cpu, without zeros at its end."""
    found = [int(part) for part in re.findall(r"\d+", re.split(r"[^\d.]", version)[0])]
    while found and not found[-1]:
        found.pop()
    return tuple(found)


def fits(version: str, limits: str) -> bool:
    """Return whether a version is within limits such as >=2.6,<3."""
    own = numbers(version)
    compare = {">=": own.__ge__, "<": own.__lt__, "==": own.__eq__, "<=": own.__le__, ">": own.__gt__}
    pairs = re.findall(r"([<>=]+)([\d.]+)", limits)
    return all(compare[sign](numbers(limit)) for sign, limit in pairs)


def installed(package: str) -> str:
    """Return the version of an installed package; empty when it is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def required() -> dict[str, str]:
    """Return {package: limits} of what every machine needs besides faiss."""
    files = ("requirements-base.txt", GPU_REQUIREMENTS)
    found = dict(REQUIREMENT.findall("\n".join((ROOT / name).read_text(encoding="utf-8") for name in files)))
    return {name: limits for name, limits in found.items() if limits and not name.startswith("faiss")}


def check_python() -> Iterator[Finding]:
    """The interpreter."""
    version = f"{sys.version.split()[0]} in {sys.executable}"
    other = (ROOT / VENV).exists() and Path(sys.prefix).resolve() != (ROOT / ".venv").resolve()
    hint = f"; the quick start installed the packages for {from_root(VENV)}" if other else ""
    yield Finding(WARNING if other else OK, "python", version + hint)


def check_packages() -> Iterator[Finding]:
    """Versions against the requirements."""
    versions = {name: installed(name) for name in required()}
    if missing := [name for name, version in versions.items() if not version]:
        yield Finding(ERROR, "packages", f"missing: {', '.join(missing)}; {how_to_install('torch')}")
    for name, limits in required().items():
        if versions[name] and not fits(versions[name], limits):
            fix = pip_install(name + limits)
            yield Finding(ERROR, "packages", f"{name} {versions[name]} (expected {limits}); run {fix}")
    if present := [f"{name} {version}" for name, version in versions.items() if version]:
        yield Finding(OK, "packages", ", ".join(present))
    for path in sorted(ROOT.glob("requirements-*.txt")):
        purpose = {"tools": "tools of script/", "demo": "search page"}.get(path.stem.partition("-")[2])
        lacks = [
            name for name, _ in REQUIREMENT.findall(path.read_text(encoding="utf-8")) if not installed(name)
        ]
        if purpose and lacks:
            fix = pip_install("-r", from_root(path.name))
            yield Finding(OK, "optional", f"for {purpose}: {fix} (it has {', '.join(lacks)})")


def gpus() -> list[str]:
    """Return `name, memory, driver` of each GPU that the driver reports."""
    try:
        done = subprocess.run(SMI, capture_output=True, text=True, timeout=SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.strip().splitlines()


def check_gpu(found: list[str]) -> Iterator[Finding]:
    """The build of torch against GPU and driver."""
    if not installed("torch"):
        yield Finding(OK, "gpu", "; ".join(found) or "none that nvidia-smi reports")
        return
    try:
        import torch
    except Exception as error:
        fix = pip_install("--force-reinstall", "-r", from_root(requirements_of("torch")))
        yield Finding(ERROR, "torch", f"cannot be imported ({first_line(error)[:200]}); run {fix}")
        return
    with warnings.catch_warnings(record=True) as reasons:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    reason = "; ".join(str(warning.message).split(". ")[0][:200] for warning in reasons)
    yield gpu_finding(found, torch.__version__, torch.version.cuda, usable, reason)
    cores, threads = available_cores(), torch.get_num_threads()
    line = f"{cores} cores, {threads} threads"
    if threads < cores / 2 and not usable:
        yield Finding(WARNING, "cpu", f"{line}; unset OMP_NUM_THREADS, or pass --threads {cores}")
    else:
        yield Finding(OK, "cpu", line)


def gpu_finding(found: list[str], version: str, cuda: str | None, usable: bool, reason: str) -> Finding:
    """Return what GPU, driver and the build of torch are good for."""
    card = "; ".join(found)
    if usable:
        return Finding(OK, "gpu", f"{card or 'a CUDA device'}; torch {version} (CUDA {cuda})")
    if not found and not cuda:
        return Finding(OK, "gpu", f"none; torch {version} computes on the CPU (--debug, small collections)")
    if not found:
        return Finding(OK, "gpu", f"none that nvidia-smi reports; torch {version} (CUDA {cuda}) uses the CPU")
    if not cuda:
        install = pip_install("-r", from_root(GPU_REQUIREMENTS))
        fix = f"run {python()} -m pip uninstall -y torch faiss-cpu, then {install}"
        return Finding(ERROR, "gpu", f"{card}, but torch {version} is a build without CUDA; {fix}")
    if os.getenv("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return Finding(WARNING, "gpu", f"{card}, hidden by CUDA_VISIBLE_DEVICES; unset it")
    fix = "update the driver, or install a torch for it: https://pytorch.org/get-started/locally"
    return Finding(ERROR, "gpu", f"{card}, but torch {version} (CUDA {cuda}) cannot use it ({reason}); {fix}")


def available_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_faiss(found: list[str]) -> Iterator[Finding]:
    """One faiss package, which fits the machine."""
    names = [name for name in ("faiss-cpu", "faiss-gpu") if installed(name)]
    if not names:
        yield Finding(ERROR, "faiss", f"missing; {how_to_install('torch')}")
        return
    text = ", ".join(f"{name} {installed(name)}" for name in names)
    try:
        from torch_src.retrieval.faiss_index import load_faiss

        load_faiss()
    except (UserError, ImportError) as error:
        yield Finding(ERROR, "faiss", f"{text}: {first_line(error)}")
        return
    if found and names == ["faiss-cpu"]:
        text += ": --index searches on the CPU; for the GPU uninstall it and install faiss-gpu"
        yield Finding(WARNING, "faiss", text)
    else:
        yield Finding(OK, "faiss", text)


def check_space(output: Path) -> Iterator[Finding]:
    """Free disk and memory against what the default job needs."""
    amounts = [
        ("disk", shutil.disk_usage(output).free, JOB_DISK_GB, LEAST_DISK_GB, "use another --output_dir")
    ]
    try:
        from torch_src.runtime.devices import free_memory

        amounts.append(("memory", free_memory(), JOB_MEMORY_GB, LEAST_MEMORY_GB, "close other programs"))
    except ImportError:
        pass  # reported above
    for what, size, job, least, fix in amounts:
        text = f"{size / 1e9:.1f} GB free"
        if size < least * 1e9:
            yield Finding(ERROR, what, f"{text} (needs {least} GB or more); {fix}")
        elif size < job * 1e9:
            small = f"enough for --debug, not for 8 million passages ({job} GB); --plan computes other jobs"
            yield Finding(WARNING, what, f"{text}: {small}")
        else:
            yield Finding(OK, what, text)


def check_hub() -> Iterator[Finding]:
    """Whether models by hub name can be downloaded."""
    address = os.getenv("HF_ENDPOINT") or HUB
    if os.getenv("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        yield Finding(OK, "hub", "not checked (HF_HUB_OFFLINE): models by hub name must be in the cache")
        return
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=SECONDS).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except (OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        fix = f"set HF_ENDPOINT={MIRROR} or a proxy; with model folders nothing is needed"
        yield Finding(WARNING, "hub", f"{address} cannot be reached ({reason}); {fix}")
        return
    yield Finding(OK, "hub", f"{address} answers")


def check_data(hp: DualHparams) -> Iterator[Finding]:
    """Data and model of the default job."""
    folder = Path(hp.data_dir)
    queries = (folder / "dev/dev.q.format", folder / "dev/q2qid.dev.json", folder / "dev/dev.json")
    files = (hp.train_set_path, hp.passage_dir_path, hp.passage_ids_path, *map(str, queries))
    missing = [path for path in files if not os.path.exists(path)]
    if not folder.is_dir():
        yield Finding(
            WARNING, "data", f"{folder}: no such folder; run {download()}, or use --debug (the sample)"
        )
    elif missing:
        fix = f"run {download()}, or see docs/formats.md"
        yield Finding(WARNING, "data", f"{folder}: lacks {', '.join(missing)}; {fix}")
    else:
        yield Finding(OK, "data", f"{folder}; {command('script/check_data.py', folder)} reads every line")
    model = Path(hp.pretrained_model_path)
    if is_hub_name(hp.pretrained_model_path):
        yield Finding(OK, "model", f"{model}: a hub name, downloaded when it is used")
    elif not (model / "config.json").exists():
        fix = f"run {download('model')}, or pass --pretrained_model_path"
        yield Finding(
            WARNING, "model", f"{model}: no config.json; {fix}, or use --debug (the sample's encoder)"
        )
    else:
        yield Finding(OK, "model", str(model))


def check_output(output: Path) -> Iterator[Finding]:
    """Whether files can be written and locked in the output folder."""
    try:
        with tempfile.TemporaryDirectory(dir=output, prefix=".doctor-") as folder, folder_lock(folder):
            code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
            code += "from torch_src.runtime.locks import folder_lock\n"
            code += f"with folder_lock({folder!r}): pass"
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    except OSError as error:
        yield Finding(ERROR, "output", f"{output}: {error.strerror or error}; pass another --output_dir")
        return
    if "locked by another run" in done.stderr:
        yield Finding(OK, "output", f"{output}: writable, with file locks")
    else:
        text = f"{output}: writable, but file locks do not work there; run one program at a time"
        yield Finding(WARNING, "output", text)


def existing(path: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())


def check_all(hp: DualHparams) -> Iterator[Finding]:
    """Yield the findings of all checks."""
    found, output = gpus(), existing(Path(hp.output_dir))
    yield from check_python()
    yield from check_packages()
    yield from check_gpu(found)
    yield from check_faiss(found)
    yield from check_space(output)
    yield from check_output(output)
    yield from check_hub()
    yield from check_data(hp)


def main(argv: list[str]) -> int:
    """Print the findings; return 1 when one is an error."""
    plain = DualHparams.defaults(debug=False)
    parser = OptionParser(__doc__)
    for name, what in (
        ("data_dir", "data folder of the official layout"),
        ("pretrained_model_path", "folder or hub name"),
        ("output_dir", "folder of the results"),
    ):
        parser.add_argument(f"--{name}", default=getattr(plain, name), help=f"{what}; default: %(default)s")
    hp = DualHparams(**vars(parser.parse_args(argv)))
    counts = dict.fromkeys((ERROR, WARNING, OK), 0)
    for level, what, text in check_all(hp):
        counts[level] += 1
        print(f"{level:8} {what:9} {' '.join(text.split())}", flush=True)
    print(f"{counts[ERROR]} errors, {counts[WARNING]} warnings")
    return int(counts[ERROR] > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
