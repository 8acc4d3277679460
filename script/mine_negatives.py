"""Mine hard negatives from a retriever's results: new dual.train.tsv and cross.train.tsv for the next round.

    python script/mine_negatives.py                                            # with the retriever alone
    python script/mine_negatives.py --cross_params output/cross_params.bin     # denoised by the re-ranker
    python script/mine_negatives.py --retrieval_result output/bm25/train.top50 # from any run, such as BM25's
    python script/mine_negatives.py --dual_params none    # with the model of do_dual_infer.py, not fine-tuned

Settings: torch_src/tools/mining_hparams.py, or `--name value`; `--help` lists them. Writes to output/mined:
dual.train.tsv, cross.train.tsv, dual.train.ids.tsv (rows, pids, ranks and scores, aligned with
dual.train.tsv), and their inputs (train.q.format, the run, the re-ranker's scores).
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

from torch_src import hparams
from torch_src.data.collection import PassageCollection
from torch_src.data.formats import read_scores
from torch_src.data.kinds import RUN as RUN_KIND
from torch_src.data.kinds import check_kinds
from torch_src.data.passage_ids import check_length, read_passage_ids
from torch_src.data.results import check_collection
from torch_src.dual_hparams import MODEL_SETTINGS
from torch_src.inference_cross_hparams import InferenceCrossHparams
from torch_src.inference_de_hparams import InferenceDeHparams
from torch_src.inputs import check_named
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import read_json, require, write_json
from torch_src.runtime.locks import folder_lock
from torch_src.runtime.log import log, warn
from torch_src.runtime.outputs import RUN, Output, begins, check_outputs, settings_of
from torch_src.runtime.program import exit_status, exit_with
from torch_src.runtime.stamps import checksum_files, clear_stamp, up_to_date, write_stamp
from torch_src.saved_settings import WINDOWS, read_saved
from torch_src.tools import mining, mining_inputs
from torch_src.tools.mining_hparams import MiningHparams

OUTPUTS = ("dual.train.tsv", "cross.train.tsv", mining.SIDECAR)


def retrieve(hp: MiningHparams, queries: Path) -> Path:
    """Return the run of the training queries: --retrieval_result, or that of do_dual_infer.py."""
    from torch_src import dual_infer  # here: --help takes no second

    if hp.retrieval_result:
        fix = f"search the queries of {queries} first (script/bm25.py search --dev_q)"
        run = Path(require(hp.retrieval_result, "a run of the training queries", fix))
        check_kinds((run, RUN_KIND))
        return run
    path = Path(hp.para_emb_path) / "manifest.json"
    manifest = read_json(path) if path.exists() else {}
    names = ("block_rows", "vector_dims", "encoder_engine", *WINDOWS)
    existing = {name: manifest[name] for name in names if name in manifest}  # existing vectors stay valid
    if hp.dual_params == hparams.NONE:
        saved = read_saved(hp.output_dir, "dual_infer_hparams.json")
        if saved.get("dual_params") != hparams.NONE:
            raise UserError(
                f"--dual_params none: {hp.output_dir} has no vectors of a model as it was downloaded; "
                "run do_dual_infer.py --dual_params none --pretrained_model_path MODEL with this folder first"
            )
        existing |= {name: saved[name] for name in ("pretrained_model_path", "seed", *MODEL_SETTINGS)}
    settings = InferenceDeHparams(
        dual_params=hp.dual_params_path, topk=hp.topk, bs=hp.bs, data_dir=hp.data_dir, dev_q=str(queries),
        dev_q2qid=hparams.NONE, passage_dir=hp.passage_dir_path, passage_ids=hp.passage_ids_path,
        para_emb=hp.para_emb_path, output_dir=str(queries.parent), precision=hp.precision, device=hp.device,
        threads=hp.threads, force=hp.force, debug=hp.debug, **existing,
    )  # fmt: skip
    dual_infer.run(settings, hp.topk, hp.bs)
    return queries.parent / f"res.top{hp.topk}"


def rerank(hp: MiningHparams, queries: Path, run: Path) -> Path:
    """Score the candidates with do_cross_infer.py; return the file of their logits."""
    from torch_src import cross_infer

    saved = read_saved(hp.output_dir, "cross_infer_hparams.json")
    windows = {name: saved[name] for name in WINDOWS if name in saved}
    settings = InferenceCrossHparams(
        retrieval_result=str(run), cross_params=hp.cross_params, topk=hp.topk, data_dir=hp.data_dir,
        dev_q=str(queries), dev_q2qid=hparams.NONE, dev_set=hparams.NONE, passage_dir=hp.passage_dir_path,
        passage_ids=hp.passage_ids_path, output_dir=str(queries.parent), precision=hp.precision,
        device=hp.device, threads=hp.threads, force=hp.force, debug=hp.debug, **windows,
    )  # fmt: skip
    cross_infer.run(settings)
    return queries.parent / cross_infer.SCORES


def against_positive(hp: MiningHparams) -> bool:
    """Return whether logits are compared with the best positive's; `auto`: if the re-ranker is listwise."""
    if hp.score_against != "auto" or hp.cross_params == hparams.NONE:
        return hp.score_against == "positive"
    path = Path(hp.cross_params).with_name("cross_hparams.json")
    trained = read_json(path) if path.exists() else {}
    if trained.get("weights") != checksum_files([hp.cross_params]):
        warn(f"{path}: missing, or of other weights; --score_against zero is used (a pointwise re-ranker)")
        return False
    listwise = trained["loss"] == "listwise"
    base = "the best positive" if listwise else "zero"
    log(f"the re-ranker was trained {trained['loss']}: logits are compared with {base}")
    return listwise


def run(hp: MiningHparams) -> None:
    """Retrieve, score, choose and write; each step is skipped if it is up to date."""
    hparams.announce("mine negatives", hp)
    check_named(hp, ["retrieval_result"])  # the queries to search for it are written first
    if not hp.retrieval_result and hp.dual_params != hparams.NONE:
        require(
            hp.dual_params_path, "trained weights", "run do_dual_train.py first, or pass --dual_params none"
        )
    check_mined(hp)
    with folder_lock(hp.mined_dir_path, name="mining.lock"):
        mine(hp)


def check_mined(hp: MiningHparams) -> None:
    """UserError when a file to write is an input, or not of an earlier mining."""
    folder = Path(hp.mined_dir_path)
    mined = begins("\t".join(mining.COLUMNS).encode())
    outputs = [
        Output(folder / name, lambda _: mined(folder / mining.SIDECAR), ("mine_negatives",))
        for name in OUTPUTS[:2]
    ]
    outputs += [
        Output(folder / mining.SIDECAR, mined, ("mine_negatives",)),
        Output(folder / "train.q.format", begins(rb"[^\t\n]*\t-\t-\t0\n")),
        Output(folder / "mining.json", settings_of(folder / mining.SIDECAR)),
        Output(folder / "res.pairs", RUN),
    ]
    check_outputs(outputs, hp.inputs)


def mine(hp: MiningHparams) -> None:
    folder = Path(hp.mined_dir_path)
    data = mining_inputs.open_training_set(require(hp.train_set_path, "training rows"))
    log(f"{data.rows:,} training rows, {data.queries:,} distinct queries")
    collection = PassageCollection(hp.passage_dir_path, str(folder / "cache"))
    if hp.retrieval_result:
        check_collection(hp.retrieval_result, collection.checksum, hp.passage_dir_path)
    queries = folder / "train.q.format"
    mining_inputs.write_train_queries(data, queries)
    found, scores, located = retrieve(hp, queries), None, None
    if hp.cross_params != hparams.NONE:
        located = mining_inputs.locate_positives(data, collection)
        pairs = folder / "res.pairs"
        mining_inputs.write_with_positives(data, located, found, pairs)
        found, scores = pairs, rerank(hp, queries, pairs)
    rules = mining.Rules(
        hp.topk, hp.negatives, hp.max_score, against_positive(hp), hp.select, hp.rank_from, hp.rank_to,
        hp.too_few, hp.promote_score, hp.seed,
    )  # fmt: skip
    stamp = mined_stamp(hp, rules, collection, [found, *([scores] if scores else [])])
    outputs = [folder / name for name in OUTPUTS]
    if not hp.force and all([up_to_date(output, stamp, log) for output in outputs]):
        return log(f"{outputs[0]}: up to date")
    for output in outputs:
        clear_stamp(output)
    ids = read_passage_ids(hp.passage_ids_path, str(folder / "cache"))
    check_length(hp.passage_ids_path, len(ids), len(collection))
    miner = mining.Miner(data, collection, located or mining_inputs.locate_positives(data, collection), rules)
    logits = read_scores(scores) if scores else None
    mining.write_mined(miner.mine(found, logits), folder, lambda row: ids[row].decode())
    write_json(folder / "mining.json", {**hp.to_save(), "counts": dataclasses.asdict(miner.counts)})
    for output in outputs:
        write_stamp(output, stamp)
    for line in miner.counts.table():
        log(line)
    if warning := miner.counts.warning():
        warn(warning)
    log(f"wrote {outputs[0]} and {outputs[1]}")


def mined_stamp(
    hp: MiningHparams, rules: mining.Rules, collection: PassageCollection, inputs: list[Path]
) -> dict[str, Any]:
    """Return the stamp of the mined files."""
    files = checksum_files([hp.train_set_path, hp.passage_ids_path, *inputs])
    made_from = {"inputs": files, "collection": collection.checksum}
    return {"stage": "mine_negatives", **dataclasses.asdict(rules), **made_from}


def main(argv: list[str]) -> int:
    """Return the exit status."""
    return exit_status(lambda: run(hparams.parse(MiningHparams, argv)))


if __name__ == "__main__":
    exit_with(lambda: main(sys.argv[1:]))
