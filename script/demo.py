"""Search page on this machine: ask a question, compare BM25, the retriever, both together and the re-ranker.

    python -m pip install -r requirements-demo.txt
    python script/demo.py --output_dir output   # the models and vectors there, with the settings saved there
    python script/demo.py --debug               # the sample, after sh script/quickstart.sh

The page starts with what exists and grows: while do_dual_infer.py encodes, BM25 answers. Settings:
torch_src/tools/demo_hparams.py, or `--name value`; `--help` lists them. The page listens on 127.0.0.1 and
contacts no other host. It writes caches and, on a click on "This is the answer", feedback.jsonl, both in
the output folder.
"""

import signal
import socket
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

from torch_src import hparams
from torch_src.inputs import LATER, check_data, check_named
from torch_src.runtime.errors import UserError
from torch_src.runtime.libraries import import_library
from torch_src.runtime.log import log, warn
from torch_src.runtime.program import exit_status, exit_with
from torch_src.saved_settings import SAVED, read_saved
from torch_src.tools.demo_hparams import DemoHparams, demo_settings
from torch_src.tools.feedback import Feedback
from torch_src.tools.search_service import SearchService

REQUIREMENTS = "requirements-demo.txt"


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket; UserError if the address is in use or not of this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen()  # now: a second page fails at once
    except OSError as error:
        listening.close()
        raise UserError(f"--host {host} --port {port}: {error.strerror}; pass another --port") from None
    return listening


def check_folders(hp: DemoHparams, options: Mapping[str, Any]) -> None:
    """UserError for a missing path of an option, and for an output folder that does not name its passages."""
    check_named(hp, {*LATER, *(vars(hp).keys() - options.keys())})
    is_known = any(read_saved(hp.output_dir, name) for name in SAVED)
    if "output_dir" in options and not is_known and not Path(hp.passage_dir_path).is_dir():
        exists = Path(hp.output_dir).is_dir()
        what = "no settings of do_dual_infer.py in this folder" if exists else "no such folder"
        fix = "for a page with BM25 alone pass --data_dir as well"
        raise UserError(f"--output_dir {hp.output_dir}: {what}; {fix}")
    check_data(hp, passage_dir_path="passages")


def serve(app: Any, listening: socket.socket) -> None:
    """Serve until Ctrl-C; open requests get a second to finish."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    # Ctrl-C is the normal end of this program: exit status 0, not that of an interrupted job.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        thread.join()
    except KeyboardInterrupt:
        server.should_exit = True
        thread.join(2)
        log("stopped")


def run(options: Mapping[str, Any]) -> None:
    """Open the collection and serve the page; models load meanwhile."""
    for package in ("fastapi", "uvicorn"):
        import_library(package, REQUIREMENTS)
    from script.lib.demo.app import LOOPBACK, build_app

    hp = demo_settings(options)
    check_folders(hp, options)
    listening = bind(hp.host, hp.port)  # first: a port in use is reported before a minute of reading
    service = SearchService(options)
    app = build_app(service, Feedback(service), hp.host)
    service.start()
    if hp.host not in LOOPBACK:
        warn(f"--host {hp.host}: everyone who can reach this machine can read the passages and mark answers")
    host, port = listening.getsockname()[:2]
    log(f"{len(service.collection):,} passages of {hp.data_dir}")
    log(f"open http://{f'[{host}]' if ':' in host else host}:{port}  (Ctrl-C to stop)")
    serve(app, listening)


def parse(argv: list[str]) -> dict[str, Any]:
    """Return the options alone: settings saved in the output folder come before the defaults."""
    hparams.parse(DemoHparams, argv)  # checks the values; prints --help
    return hparams.parse_options(DemoHparams, argv)


def main(argv: list[str]) -> int:
    """Return the exit status."""
    return exit_status(lambda: run(parse(argv)))


if __name__ == "__main__":
    exit_with(lambda: main(sys.argv[1:]))
