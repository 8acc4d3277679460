"""Settings of script/serve.py. Edit a default here, or pass `--name value`."""

from dataclasses import dataclass

from torch_src.hparams import NONE
from torch_src.runtime.options import COUNT
from torch_src.tools.demo_hparams import DemoHparams


@dataclass(frozen=True)
class ServeHparams(DemoHparams):
    """HTTP service: what the programs wrote to output_dir -> JSON answers at http://127.0.0.1:8000."""

    # main options
    host: str = "127.0.0.1"  # address to listen on; another one needs the key in SERVE_API_KEY
    port: int = 8000  # port to listen on; 0: any free one

    # search
    bm25: str = NONE  # folder of bm25.py, fused with the retriever's list; none: the retriever alone

    # run
    max_texts: int = 256  # questions, texts or documents in a request
    max_chars: int = 10_000  # characters of one of them; the models read far fewer
    max_requests: int = 64  # requests at a time; others are refused with status 503
    timeout_s: float = 60.0  # seconds until a request ends with status 504

    RANGES = {"max_texts": COUNT, "max_chars": COUNT, "max_requests": COUNT, "timeout_s": (0.001, 86400)}
