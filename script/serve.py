"""HTTP service on this machine: search, embeddings and re-ranking as JSON, for software of your own.

    python -m pip install -r requirements-service.txt
    python script/serve.py --output_dir output   # the models and vectors there, with the settings saved there
    python script/serve.py --debug               # the sample, after sh script/quickstart.sh

Endpoints, formats and clients: docs/service_and_api.md. Settings: torch_src/tools/serve_hparams.py, or
`--name value`; `--help` lists them. It listens on 127.0.0.1 and contacts no other host. With the environment
variable SERVE_API_KEY every request needs this key; without it another --host is refused. Ctrl-C and SIGTERM
finish the requests that run. It writes nothing but caches in the output folder.
"""

import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

from torch_src import hparams
from torch_src.runtime.errors import UserError
from torch_src.runtime.libraries import import_library
from torch_src.runtime.log import log
from torch_src.runtime.program import exit_status, exit_with
from torch_src.tools.demo_hparams import check_folders, search_settings
from torch_src.tools.search_service import SearchService
from torch_src.tools.serve_hparams import ServeHparams

REQUIREMENTS, KEY = "requirements-service.txt", "SERVE_API_KEY"


def run(options: Mapping[str, Any]) -> None:
    """Open the collection and serve; models load meanwhile."""
    for package in ("fastapi", "uvicorn"):
        import_library(package, REQUIREMENTS)
    from script.lib.serve.app import build_app
    from script.lib.server import LOOPBACK, address, bind, serve

    hp, key = search_settings(ServeHparams, options), os.getenv(KEY, "")
    check_folders(hp, options, "run do_dual_infer.py first")
    if hp.host not in LOOPBACK and not key:
        raise UserError(f"--host {hp.host}: needs a key; put {KEY}=... in front of the command")
    listening = bind(hp.host, hp.port)  # first: a port in use is reported before a minute of reading
    service = SearchService(options, ServeHparams)
    app = build_app(service, hp, key)
    service.start()
    log(f"{len(service.collection):,} passages of {hp.data_dir}")
    log(f"{address(listening)}  (state: /health, schema: /openapi.json; Ctrl-C to stop)")
    serve(app, listening, seconds=math.ceil(hp.timeout_s))


def parse(argv: list[str]) -> dict[str, Any]:
    """Return the options alone: settings saved in the output folder come before the defaults."""
    hparams.parse(ServeHparams, argv)  # checks the values; prints --help
    return hparams.parse_options(ServeHparams, argv)


def main(argv: list[str]) -> int:
    """Return the exit status."""
    return exit_status(lambda: run(parse(argv)))


if __name__ == "__main__":
    exit_with(lambda: main(sys.argv[1:]))
