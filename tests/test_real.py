"""Real data in ../shared: known zero-shot figures check the whole chain at once."""

import json
from pathlib import Path

import pytest

from metric import convert_recall_res_to_json, evaluation
from torch_src import dual_infer
from torch_src.data.collection import PassageCollection
from torch_src.data.formats import read_candidates, read_dev, read_q2qid, read_queries
from torch_src.data.passage_ids import read_passage_ids

SHARED = Path(__file__).resolve().parents[2] / "shared"
STARD = SHARED / "data/stard"
ENCODER = Path(__file__).resolve().parents[1] / "script/sample_data/tiny_encoder"
pytestmark = pytest.mark.real


@pytest.mark.parametrize("name", ["stard", "cmrc2018", "dureader2_demo"])
def test_reads_every_file_of_the_official_layout(name):
    folder = SHARED / "data" / name
    stats = json.loads((folder / "stats.json").read_text(encoding="utf-8"))
    collection = PassageCollection(folder / "passage-collection")
    pids = read_passage_ids(folder / "passage-collection/passage2id.map.json")
    assert len(collection) == len(pids) == stats["passages"]
    dev, queries = read_dev(folder / "dev/dev.json"), read_queries(folder / "dev/dev.q.format")
    assert [query.query for query in dev] == queries
    assert [query.qid for query in dev] == list(map(read_q2qid(folder / "dev/q2qid.dev.json").get, queries))
    row_of = {pid.decode(): row for row, pid in enumerate(pids)}
    for query in dev:
        for pid, text in query.answers.items():
            assert collection[row_of[pid]] == text


def test_auxiliary_candidates_name_passages_of_the_collection():
    pids = set(read_passage_ids(STARD / "passage-collection/passage2id.map.json").tolist())
    auxiliary = STARD / "auxiliary"
    texts, ids = (auxiliary / f"dev.retrieval.top50.{end}.tsv" for end in ("res", "res.id_map"))
    rows = list(read_candidates(texts, ids))
    assert len(rows) == 306 * 50 and all(pid.encode() in pids for _, pid, _, _ in rows)


def test_zero_shot_figures_of_stard(tmp_path):
    """MRR@10 .5094, recall@1 .3889, recall@50 .9118: the chain with the settings of the model folder."""
    model = ["--dual_params", "none", "--pretrained_model_path", str(ENCODER), "--precision", "fp32"]
    assert dual_infer.main(["--data_dir", str(STARD), "--output_dir", str(tmp_path), *model]) == 0
    maps = [str(STARD / "dev/q2qid.dev.json"), str(STARD / "passage-collection/passage2id.map.json")]
    assert convert_recall_res_to_json.main([*maps, str(tmp_path / "res.top50"), "50"]) == 0
    reference = evaluation.load_reference(STARD / "dev/dev.json")
    metrics = evaluation.compute_metrics(reference, evaluation.load_result(tmp_path / "dual_res.json"))
    assert metrics["MRR@10"] == pytest.approx(0.5094, abs=0.004)
    assert metrics["recall@1"] == pytest.approx(0.3889, abs=0.004)
    assert metrics["recall@50"] == pytest.approx(0.9118, abs=0.004)
