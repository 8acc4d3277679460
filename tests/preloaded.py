"""Start programs from a server process that has already imported torch: 0.1 s a start instead of 4 s.

The server only imports what the programs need and forks for each start, so that each program still gets a
fresh process. What it has imported is exempt from garbage collection, which would copy its memory.
Usage: `with Preloaded() as programs: programs.start(...)`.
"""

import contextlib
import gc
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Running:
    """A started program; stdout and stderr go to the file `log`."""

    def __init__(self, server: "Preloaded", pid: int, log: Path):
        self.server, self.pid, self.log, self.returncode = server, pid, log, None

    def poll(self) -> int | None:
        """Return the exit status as subprocess does; None while the program runs."""
        if self.returncode is None:
            self.returncode = self.server.ask({"poll": self.pid})
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = self.server.ask({"wait": self.pid})
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


class Preloaded:
    """The server process; kills programs that still run when it ends. `root` is their folder."""

    def __init__(self, root: Path = ROOT):
        self.root = root

    def __enter__(self) -> "Preloaded":
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, self.root / "tests/preloaded.py"], cwd=self.root, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        return self

    def __exit__(self, *_) -> None:
        self.process.communicate()

    def ask(self, request: dict):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(
        self, program: str, words: list[str], log: Path, file_limit: int = 0, kill_at: int = 0, **env: str
    ) -> Running:
        """Start `program` (such as do_dual_train.py) with these options.

        `file_limit`: maximum file size in bytes; writing beyond it fails, as on a full disk.
        `kill_at`: SIGKILL just before this operation on files, counted from 1; they are logged (-1: no kill).
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        request = {"program": program, "words": words, "log": str(log), "limit": file_limit}
        request |= {"kill_at": kill_at, "env": env}
        return Running(self, self.ask(request), log)

    def run(self, program: str, words: list[str], log: Path, **more) -> Running:
        """Start a program and wait until it ends."""
        running = self.start(program, words, log, **more)
        running.wait()
        return running


def serve() -> None:
    """Answer one JSON request per line until the input ends."""
    sys.path[0] = str(ROOT)
    import transformers.models.bert.modeling_bert  # noqa: F401 (the programs import it with the first model)

    import torch_src.cross_infer
    import torch_src.cross_train
    import torch_src.dual_infer
    import torch_src.dual_train
    from torch_src import hparams

    hparams.parse(torch_src.dual_train.DualHparams, [])  # imports tyro
    with contextlib.suppress(ImportError):  # of some versions of transformers: patterns that take 0.8 s
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        get_checkpoint_conversion_mapping("bert")
    gc.freeze()
    children: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "program" in request:
            sys.stdout.flush()
            pid = os.fork()
            if not pid:
                return child(request)
            children.add(pid)
            answer = pid
        else:
            pid = request.get("wait") or request["poll"]
            done, status = os.waitpid(pid, 0 if "wait" in request else os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if done else None
            children -= {done}
        print(json.dumps(answer), flush=True)
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def child(request: dict) -> None:
    """Run the program in this forked process; ends with SystemExit."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    if request["limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], request["limit"]))
    os.environ.update(request["env"])
    if request["kill_at"]:
        kill_at_operation(request["kill_at"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    sys.argv = [request["program"], *request["words"]]
    runpy.run_path(str(ROOT / request["program"]), run_name="__main__")
    sys.exit(0)


def kill_at_operation(at: int) -> None:
    """Log each file that is written, renamed or deleted from now on; SIGKILL before number `at`."""
    count = 0

    def before(event: str, given: tuple) -> None:
        nonlocal count
        if event == "open":
            changes = isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR)
        else:
            changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")
        if changes and str(given[0]) != os.devnull:
            count += 1
            paths = given[:2] if event == "os.rename" else given[:1]
            os.write(2, f"operation {count}: {event} {' -> '.join(map(str, paths))}\n".encode())
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(before)


if __name__ == "__main__":
    serve()
