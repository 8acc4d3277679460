"""Search page on this machine: ask a question, compare BM25, the retriever, both together and the re-ranker.

    python -m pip install -r requirements-demo.txt
    python script/demo.py --output_dir output   # the models and vectors there, with the settings saved there
    python script/demo.py --debug               # the sample, after sh script/quickstart.sh

The page starts with what exists and grows: while do_dual_infer.py encodes, BM25 answers. Settings:
torch_src/tools/demo_hparams.py, or `--name value`; `--help` lists them. The page listens on 127.0.0.1 and
contacts no other host. It writes caches and, on a click on "This is the answer", feedback.jsonl, both in
the output folder.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

from torch_src import hparams
from torch_src.runtime.libraries import import_library
from torch_src.runtime.log import log, warn
from torch_src.runtime.program import exit_status, exit_with
from torch_src.tools.demo_hparams import DemoHparams, check_folders, demo_settings
from torch_src.tools.feedback import Feedback
from torch_src.tools.search_service import SearchService

REQUIREMENTS = "requirements-demo.txt"


def run(options: Mapping[str, Any]) -> None:
    """Open the collection and serve the page; models load meanwhile."""
    for package in ("fastapi", "uvicorn"):
        import_library(package, REQUIREMENTS)
    from script.lib.demo.app import build_app
    from script.lib.server import LOOPBACK, address, bind, serve

    hp = demo_settings(options)
    check_folders(hp, options, "for a page with BM25 alone pass --data_dir as well")
    listening = bind(hp.host, hp.port)  # first: a port in use is reported before a minute of reading
    service = SearchService(options)
    app = build_app(service, Feedback(service), hp.host)
    service.start()
    if hp.host not in LOOPBACK:
        warn(f"--host {hp.host}: everyone who can reach this machine can read the passages and mark answers")
    log(f"{len(service.collection):,} passages of {hp.data_dir}")
    log(f"open {address(listening)}  (Ctrl-C to stop)")
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
