"""A search page over a file of your own: BM25 answers within seconds, the encoder follows in the background.

    sh script/try.sh passages.csv
    sh script/try.sh train.jsonl --model BAAI/bge-small-zh-v1.5
    sh script/try.sh notes.txt --port 8000

FILE: passages in JSON lines, CSV, TSV or text (a passage a line, or paragraphs between blank lines); rows of
FlagEmbedding ({query, pos, neg}), Tevatron, DPR or DuReader; a folder in the layout of BEIR, MS MARCO or
T2Ranking, of text files, or the official one. Gzipped or not, in UTF-8, GB18030 (GBK) or UTF-16.

    --model M          folder or hub name of the encoder; default: script/sample_data/tiny_encoder
    --reranker M       folder or hub name of the re-ranker; default: the head of the same; none: no re-ranker
    --columns C        text=NAME,title=NAME,id=NAME, or in order without a header: id,-,text; default: guessed
    --encoding E       of the file, such as big5; default: as found
    --port P           of the page; default: 7860

Other options go to do_dual_infer.py, such as --pooling or --query_prefix. Everything is written to
output/try/NAME: data/ in the official layout, and a folder for each model. The same command again uses what
is there; a file that has changed is converted and encoded again. Ctrl-C stops the page and the encoding.
"""

import math
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

from script import convert_dataset
from script.lib.foreign_files import Source, plain_name
from script.lib.foreign_layouts import OFFICIAL, recognize
from script.lib.server import bind
from torch_src import hparams
from torch_src.data.collection import PassageCollection
from torch_src.data.lines import raw_lines
from torch_src.inference_de_hparams import InferenceDeHparams
from torch_src.inputs import check_inputs
from torch_src.models.hub import is_hub_name
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import ROOT
from torch_src.runtime.locks import folder_lock
from torch_src.runtime.log import error, log
from torch_src.runtime.options import OptionParser, integer
from torch_src.runtime.program import exit_status
from torch_src.runtime.stamps import checksum_files, checksum_text, read_stamp, up_to_date, write_stamp

TRIALS = ROOT / "output/try"
ENCODER = ROOT / hparams.TINY_ENCODER
IDS = "passage-collection/passage2id.map.json"  # the last file that a conversion writes; carries the stamp
LOG = "encode.log"
HOST = "127.0.0.1"
POLL_SECONDS = 0.5
SHOWN_BLOCKS, SMALLEST_BLOCK = 64, 1024  # blocks of vectors by which the page shows the progress; passages
STOP_SECONDS = 10  # for a program to end


class Trial(NamedTuple):
    """Where a file was converted, and where its vectors are."""

    data: Path
    output: Path

    @property
    def folders(self) -> list[str]:
        """Return the options of both programs that name the folders."""
        return ["--data_dir", str(self.data), "--output_dir", str(self.output)]


def convert(source: Path, model: str, columns: str, encoding: str) -> Trial:
    """Return the folders of a file or folder, which is converted unless that is up to date."""
    # its files count as opened, so that only the conversion logs their encoding
    kind, found = recognize(source, Source(encoding=encoding, opened=set(files_of(source))))
    folder = trial_folder(source, kind)
    output = folder / (Path(model).name or "model")
    if kind == OFFICIAL:
        return Trial(found, output)
    data, files = folder / "data", files_of(source)
    options = {"columns": columns, "encoding": encoding}
    stamp = {"stage": "try", "source": str(source), **options, "files": checksum_files(files)}
    if up_to_date(data / IDS, stamp, log):
        log(f"{data}: up to date")
        return Trial(data, output)
    with folder_lock(folder):  # no page shows the passages that are replaced
        rewrite(source, kind, data, options)
        write_stamp(data / IDS, stamp)
    return Trial(data, output)


def rewrite(source: Path, kind: str, data: Path, options: dict[str, str]) -> None:
    """Convert a file or folder of a `kind` anew; delete the vectors of the passages that are replaced."""
    for old in (data, *data.parent.glob("*/para_emb")):
        shutil.rmtree(old, ignore_errors=True)
    words = ["auto", str(source), "--to", str(data), "--skip_duplicates", "--skip_dangling"]
    words += [word for name, value in options.items() if value for word in (f"--{name}", value)]
    if kind == "flagembedding" and source.is_file():
        words += ["--split", "dev"]  # its queries are examples on the page
    if convert_dataset.main(words):
        raise UserError(f"{source}: not converted, see above")


def trial_folder(source: Path, kind: str) -> Path:
    """Return the folder of a source of a `kind`: its name, where needed with a checksum of its path.

    That is where another source has the name, and for the official layout, of which nothing here tells whose
    vectors they are.
    """
    name = plain_name(source)
    if source.is_file():
        name = name.rpartition(".")[0] or name
    name = name.strip(".") or "file"  # of ...txt it would be the folder above
    folder = TRIALS / name
    known = (read_stamp(folder / "data" / IDS) or {}).get("source", str(source))
    if known == str(source) and kind != OFFICIAL:
        return folder
    return TRIALS / f"{name}-{checksum_text(str(source))[:6]}"


def files_of(source: Path) -> list[Path]:
    """Return the files whose contents decide whether a source has changed."""
    if source.is_file():
        return [source]
    folders = [folder for folder in (source, source / "qrels") if folder.is_dir()]
    return [path for folder in folders for path in sorted(folder.iterdir()) if path.is_file()]


def serve(trial: Trial, port: int, page: list[str], encode: list[str]) -> int:
    """Serve the page in the foreground, encode in the background; return the exit status of the page."""
    running = [subprocess.Popen([*program(page), "--host", HOST, "--port", str(port)])]
    for number in (signal.SIGTERM, signal.SIGHUP):  # a closed terminal must not leave the encoder behind
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup does
            signal.signal(number, signal.default_int_handler)
    try:
        wait_until_it_answers(running[0], port)
        if running[0].poll() is None:
            running.append(start_encoder(trial, encode))
            watch(running[0], running[1], trial.output / LOG)
        return running[0].wait()
    except KeyboardInterrupt:
        return 0
    finally:
        stop(running)


def wait_until_it_answers(page: "subprocess.Popen[bytes]", port: int) -> None:
    """Wait until the page answers or has ended: an encoder that starts with it would slow it down."""
    while page.poll() is None:
        try:
            # not by urllib, which would ask a proxy
            with closing(HTTPConnection(HOST, port, timeout=POLL_SECONDS)) as connection:
                connection.request("GET", "/")
                connection.getresponse()
                return
        except (OSError, HTTPException):  # nothing listens yet, or it does not answer in time
            time.sleep(POLL_SECONDS)


def start_encoder(trial: Trial, words: list[str]) -> "subprocess.Popen[bytes]":
    """Start do_dual_infer.py; its output goes to the log."""
    trial.output.mkdir(parents=True, exist_ok=True)
    model = trial.output.name
    log(f"encoding in the background with {model} what is not encoded yet; log: {trial.output / LOG}")
    with open(trial.output / LOG, "wb") as file:
        # in a session of its own: Ctrl-C would end it with a message on the terminal
        return subprocess.Popen(program(words), stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


def watch(page: "subprocess.Popen[bytes]", encoder: "subprocess.Popen[bytes]", log_path: Path) -> None:
    """Wait for the end of the page; report the end of the encoding."""
    begun, reported = time.monotonic(), False
    while page.poll() is None:
        time.sleep(POLL_SECONDS)
        if not reported and (status := encoder.poll()) is not None:
            reported = True
            if status:
                error(f"the encoding failed, the page stays with BM25: {last_error(log_path)}")
            else:
                log(f"all passages are encoded after {time.monotonic() - begun:.0f} s: dense search is ready")


def last_error(path: Path) -> str:
    """Return the last line with ERROR of a log, else the last line."""
    with open(path, "rb") as file:
        lines = [raw.decode(errors="replace").strip() for _, raw in raw_lines(file, path)]
    errors = [line.partition("ERROR ")[2] for line in lines if "ERROR " in line]
    return (errors or lines or ["no output"])[-1]


def program(words: list[str]) -> list[str]:
    """Return the command of a program of the repository; its relative paths start at the current folder."""
    return [sys.executable, str(ROOT / words[0]), *words[1:]]


def stop(running: list["subprocess.Popen[bytes]"]) -> None:
    """End the programs that still run."""
    for process in running:
        if process.poll() is None:
            process.terminate()
    for process in running:
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()


def page_command(trial: Trial, reranker: str) -> list[str]:
    """Return the command that serves the page, without the interpreter."""
    queries = trial.data / "dev/dev.q.format"  # examples; the encoder saves that it searched none
    examples = ["--dev_q", str(queries)] if queries.exists() else []
    return ["script/demo.py", *trial.folders, "--reranker", reranker, *examples]


def encode_command(trial: Trial, model: str, options: list[str]) -> list[str]:
    """Return the command that encodes the passages, without the interpreter."""
    rows = len(PassageCollection(trial.data / "passage-collection", trial.output / "cache"))
    # small enough to show progress on the page; an option comes after it and wins
    block = ["--block_rows", str(max(SMALLEST_BLOCK, math.ceil(rows / SHOWN_BLOCKS)))]
    return ["do_dual_infer.py", *trial.folders, *block, *model_options(model, options)]


def model_options(model: str, options: list[str]) -> list[str]:
    """Return the options of do_dual_infer.py that do not depend on the file."""
    return ["--dev_q", "none", "--dual_params", "none", "--pretrained_model_path", model, *options]


def run(argv: list[str]) -> int:
    """Convert, serve and encode; return the exit status of the page."""
    parser = OptionParser(__doc__, prog="try.sh")
    parser.add_argument("source", metavar="FILE")
    parser.add_argument("--model", default=str(ENCODER))
    parser.add_argument("--reranker", default=str(ENCODER))
    parser.add_argument("--columns", default="")
    parser.add_argument("--encoding", type=convert_dataset.encoding)
    parser.add_argument("--port", type=integer(1, 65535), default=7860)
    args, options = parser.parse_known_args(argv)
    source = Path(args.source).resolve()
    model, reranker = full_path(args.model), full_path(args.reranker)
    # A wrong option and a port in use are reported before anything is written.
    check_inputs(hparams.parse(InferenceDeHparams, model_options(model, options)), model)
    bind(HOST, args.port).close()
    trial = convert(source, model, args.columns, args.encoding or "")
    encode = encode_command(trial, model, options)
    with folder_lock(trial.output.parent, shared=True):
        return serve(trial, args.port, page_command(trial, reranker), encode)


def full_path(model: str) -> str:
    """Return the path of a model's folder from the root, a hub name (or none) as it is."""
    if Path(model).is_dir():
        return str(Path(model).resolve())
    if model != hparams.NONE and not is_hub_name(model):
        raise UserError(f"{model}: no such folder (model); pass a folder, or a hub name such as owner/name")
    return model


def main(argv: list[str]) -> int:
    """Return the exit status."""
    return exit_status(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
