"""Search page on this machine: ask a question, see the results of the retriever and of the re-ranker.

    python -m pip install -r requirements-demo.txt
    python script/demo.py               # the models and vectors in output/
    python script/demo.py --debug       # the sample, after sh script/quickstart.sh

Settings: torch_src/tools/demo_hparams.py, or `--name value`; `--help` lists them. The page listens on
127.0.0.1 and contacts no other host. Nothing is written to the output folder except cache/, when the offsets
of the collection or the passage ids are not cached yet.
"""

import html
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

from torch_src import hparams
from torch_src.data.formats import read_query_texts
from torch_src.data.terms import places, terms
from torch_src.runtime.errors import UserError
from torch_src.runtime.libraries import import_library
from torch_src.runtime.log import log, warn
from torch_src.runtime.program import exit_status, exit_with
from torch_src.tools.demo_hparams import DemoHparams

if TYPE_CHECKING:
    from torch_src.tools.search_service import Answer, Hit, SearchService

REQUIREMENTS = "requirements-demo.txt"
MAX_SHOWN = 2000  # characters of a passage
EXAMPLES, MAX_EXAMPLE = 4, 24  # example questions; characters of one
TRIAL_TOPK = 4  # passages for the trial question before the page opens
LOOPBACK = ("127.0.0.1", "localhost", "::1")
ALL_ADDRESSES = ("0.0.0.0", "::")  # with these --host values the page answers to any host name
FONTS = ("system-ui", "PingFang SC", "Noto Sans CJK SC", "Microsoft YaHei", "sans-serif")  # installed fonts
# The browser may contact this server only, whatever the scripts of the page try.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:"
)
CSS = """
#answer .html-container { padding: 0; }
.search-times { margin: 0.25rem 0 0.75rem; }
.search-times b { font-weight: 600; }
.search-times span { white-space: nowrap; margin-right: 1.25rem; }
.search-columns { display: grid; gap: 1.25rem;
  grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); }
.search-columns h3 { margin: 0 0 0.5rem; font-size: 1rem; }
.search-columns ol { list-style: none; margin: 0; padding: 0; }
.search-columns li { border-top: 1px solid var(--border-color-primary); padding: 0.5rem 0; margin: 0; }
.search-head { display: flex; gap: 0.75rem; align-items: baseline; font-size: 0.8rem; }
.search-rank { font-weight: 700; font-size: 1rem; min-width: 1.6rem; }
.search-head code { font-size: 0.75rem; background: none; border: 0; padding: 0; margin-left: auto;
  opacity: 0.7; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; max-width: 9rem; }
.search-up { color: #15803d; } .search-down { color: #b91c1c; }
.dark .search-up { color: #4ade80; } .dark .search-down { color: #f87171; }
.search-columns summary { cursor: pointer; list-style: none; overflow: hidden; overflow-wrap: anywhere;
  display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3; }
.search-columns details[open] summary { -webkit-line-clamp: unset; display: block; }
.search-columns mark { background: rgba(250, 204, 21, 0.35); color: inherit; padding: 0; }
.search-error { color: #b91c1c; } .dark .search-error { color: #f87171; }
"""


def load_gradio() -> Any:
    """Return the gradio module; UserError if it cannot be imported or has another major version."""
    gradio = import_library("gradio", REQUIREMENTS)
    if gradio.__version__.split(".")[0] != "6":
        fix = f"run python -m pip install -r {REQUIREMENTS}"
        raise UserError(f"gradio {gradio.__version__} is installed (expected 6); {fix}")
    return gradio


def marked(text: str, wanted: set[str]) -> str:
    """Return the text as HTML, with the terms in `wanted` in <mark>."""
    hit = bytearray(len(text))
    for begin, end, term in places(text):
        if term in wanted:
            hit[begin:end] = b"\1" * (end - begin)
    parts, start = [], 0
    while start < len(text):
        end = hit.find(1 - hit[start], start)
        end = len(text) if end < 0 else end
        shown = html.escape(text[start:end])
        parts.append(f"<mark>{shown}</mark>" if hit[start] else shown)
        start = end
    return "".join(parts)


def passage(hit: "Hit", wanted: set[str], reranked: bool) -> str:
    """Return one hit as a list item."""
    moved = ""
    if reranked:
        change = hit.recall_rank - hit.rank
        way, arrow = ("up", "▲") if change > 0 else ("down", "▼")
        by = f' <span class="search-{way}">{arrow} {abs(change)}</span>' if change else ""
        moved = f"<span>was {hit.recall_rank}{by}</span>"
    name = html.escape(hit.pid) or f"row {hit.row}"
    more = len(hit.text) - MAX_SHOWN
    rest = f" … ({more:,} more characters)" if more > 0 else ""
    return (
        f'<li><div class="search-head"><span class="search-rank">{hit.rank}</span>'
        f'<span>{hit.score:.4f}</span>{moved}<code title="{name}, row {hit.row}">{name}</code></div>'
        f"<details><summary>{marked(hit.text[:MAX_SHOWN], wanted)}{rest}</summary></details></li>"
    )


def column(title: str, hits: "list[Hit]", wanted: set[str], reranked: bool) -> str:
    """Return one ranking as a column."""
    items = "".join(passage(hit, wanted, reranked) for hit in hits)
    return f"<section><h3>{title}</h3><ol>{items}</ol></section>"


def answer_html(answer: "Answer", waiting: bool = False) -> str:
    """Return the times and both rankings; `waiting`: the re-ranker is still running."""
    wanted = set(terms(answer.question))
    times = [f"<span>{step} <b>{1000 * took:,.1f} ms</b></span>" for step, took in answer.seconds.items()]
    if answer.cut:
        times.append("<span>the question is truncated for the retriever</span>")
    if answer.warning:
        times.append(f'<div class="search-error">{html.escape(answer.warning)}</div>')
    columns = [column("Recall: dual encoder", answer.recall, wanted, False)]
    if answer.reranked is not None:
        columns.append(column("Re-ranked: cross-encoder", answer.reranked, wanted, True))
    elif waiting:
        columns.append("<section><h3>Re-ranked: cross-encoder</h3>scoring …</section>")
    head, body = " ".join(times), "".join(columns)
    return f'<div class="search-times">{head}</div><div class="search-columns">{body}</div>'


def respond(service: "SearchService", question: str) -> Iterator[str]:
    """Yield the answer as HTML, first without the slow re-ranker; an error becomes one line."""
    try:
        answer = service.retrieve(question or "")
        if service.scorer:
            yield answer_html(answer, waiting=True)
        yield answer_html(service.rerank(answer))
    except UserError as error:
        yield f'<div class="search-error">{html.escape(str(error))}</div>'


def example_questions(hp: DemoHparams) -> list[str]:
    """Return the first short dev queries; empty without such a file."""
    if hp.dev_q == hparams.NONE or not Path(hp.dev_q_path).exists():
        return []
    try:
        short = [query for query in read_query_texts(hp.dev_q_path) if len(query) <= MAX_EXAMPLE]
    except UserError as error:
        warn(f"no example questions: {error}")
        return []
    return short[:EXAMPLES]


def build_page(service: "SearchService", examples: list[str]) -> Any:
    """Return the gradio page."""
    gradio = load_gradio()
    rows = len(service.retriever.collection)
    reranker = "" if service.scorer else " · no re-ranker"
    from torch_src.tools.search_service import LONGEST_QUESTION

    with gradio.Blocks(title="Passage search", analytics_enabled=False) as page:
        truncated = "".join(f" · {found}" for found in service.truncation if not found.is_tolerated)
        gradio.Markdown(f"## Passage search\n{rows:,} passages · {service.how}{reranker}{truncated}")
        with gradio.Row(equal_height=True):
            question = gradio.Textbox(
                placeholder="Type a question and press Enter", show_label=False, container=False,
                autofocus=True, max_lines=1, max_length=LONGEST_QUESTION, scale=8, elem_id="question",
            )  # fmt: skip
            button = gradio.Button("Search", variant="primary", scale=1, min_width=90)
        shown = gradio.HTML(elem_id="answer", padding=False, render=False)

        def ask(text: str) -> Iterator[str]:
            yield from respond(service, text)

        if examples:
            gradio.Examples(
                examples, question, shown, ask, run_on_click=True, cache_examples=False, label="Examples",
                api_visibility="private",
            )  # fmt: skip
        shown.render()
        asked = [question.submit, button.click]
        gradio.on(
            asked, ask, question, shown, api_visibility="private", concurrency_limit=1,
            trigger_mode="always_last",
        )  # fmt: skip
    return page


def allowed_hosts(host: str) -> list[str]:
    """Return the accepted values of the Host header for a page on --host, without ports."""
    if host in ALL_ADDRESSES:
        return ["*"]
    return [f"[{name}]" if ":" in name else name for name in dict.fromkeys((host, *LOOPBACK))]


def build_app(page: Any, host: str) -> Any:
    """Return the page as an ASGI application that restricts the browser to this server.

    Requests with other Host headers are refused: otherwise a foreign page whose name resolves to 127.0.0.1
    (DNS rebinding) could read the answers.
    """
    gradio = load_gradio()
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    outer = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    outer.add_middleware(TrustedHostMiddleware, allowed_hosts=allowed_hosts(host), www_redirect=False)

    @outer.middleware("http")
    async def add_policy(request: Any, call_next: Callable[[Any], Awaitable[Any]]) -> Any:
        reply = await call_next(request)
        reply.headers["Content-Security-Policy"] = POLICY
        return reply

    theme = gradio.themes.Default(font=FONTS, font_mono=("ui-monospace", "monospace"))
    return gradio.mount_gradio_app(
        outer, page, "/", theme=theme, css=CSS, footer_links=[], ssr_mode=False, mcp_server=False,
        show_error=False, max_file_size=1,
    )  # fmt: skip


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket; UserError if the address is in use or not of this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen()  # now: clients wait while the models load, and a second page fails at once
    except OSError as error:
        listening.close()
        raise UserError(f"--host {host} --port {port}: {error.strerror}; pass another --port") from None
    return listening


def serve(app: Any, listening: socket.socket) -> None:
    """Serve until Ctrl-C; open requests get two seconds to finish."""
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


def run(hp: DemoHparams) -> None:
    """Load everything, answer a trial question, and serve the page."""
    load_gradio()
    from torch_src.tools.search_service import SearchService  # here: --help takes no second

    listening = bind(hp.host, hp.port)  # first: a port in use is reported before a minute of loading
    service = SearchService(hp)
    if not service.scorer:
        log(f"no re-ranker: {hp.cross_params_path} does not exist")
    for found in service.truncation:
        found.report()
    examples = example_questions(hp)
    trial = service.answer(examples[0] if examples else "问题", TRIAL_TOPK)
    times = ", ".join(f"{step} {1000 * took:,.0f} ms" for step, took in trial.seconds.items())
    log(f"{service.how}; trial question with {TRIAL_TOPK} passages: {times}")
    if hp.host not in LOOPBACK:
        warn(f"--host {hp.host}: everyone who can reach this machine can read the passages")
    host, port = listening.getsockname()[:2]
    app = build_app(build_page(service, examples), hp.host)
    log(f"open http://{f'[{host}]' if ':' in host else host}:{port}  (Ctrl-C to stop)")
    serve(app, listening)


def main(argv: list[str]) -> int:
    """Return the exit status."""
    return exit_status(lambda: run(hparams.parse(DemoHparams, argv)))


if __name__ == "__main__":
    exit_with(lambda: main(sys.argv[1:]))
