"""Mining of negatives in cases worked by hand: the passages that are dropped, chosen and written."""

import json

import pytest
from toy_world import lines, make_world, options, write

from script import mine_negatives
from script.mine_negatives import against_positive
from torch_src.data.collection import PassageCollection
from torch_src.data.mined_files import COLUMNS
from torch_src.runtime.errors import UserError
from torch_src.runtime.stamps import checksum_files
from torch_src.tools import mining, mining_inputs
from torch_src.tools.mining import Miner, Rules
from torch_src.tools.mining_hparams import MiningHparams

PASSAGES = [f"文{number}" for number in range(12)]


def rules(**changed) -> Rules:
    plain = dict(
        topk=10, negatives=2, max_score=0.1, against_positive=False, select="top", rank_from=1, rank_to=0,
        too_few="original", promote_score=0.0, seed=1,
    )  # fmt: skip
    return Rules(**{**plain, **changed})


@pytest.fixture
def world(tmp_path):
    """Query 甲 has the positives 文3 and 无 (not in the collection), query 乙 has 文0; passages 文0..文11."""
    rows = [("甲", "文3", "旧1"), ("甲", "文3", "旧2"), ("甲", "无", "旧3"), ("乙", "文 0", "旧4")]
    write(tmp_path / "train.tsv", [f"{q}\t\t{p}\t\t{n}\t0" for q, p, n in rows])
    write(tmp_path / "c/part-00", [f"-\t\t{text}\t0" for text in PASSAGES])
    data = mining_inputs.open_training_set(str(tmp_path / "train.tsv"))
    collection = PassageCollection(tmp_path / "c")
    return data, collection, mining_inputs.locate_positives(data, collection)


def run_file(path, first: list[int], second: list[int]):
    write(path, [f"{q}\t{row}\t{rank}\t{9 - rank}" for q, rows in (("甲", first), ("乙", second))
                 for rank, row in enumerate(rows, start=1)])  # fmt: skip
    return path


def mined(world, tmp_path, logits=None, first=(5, 3, 6, 7, 8), second=(1, 0, 2, 4, 9), **changed):
    """Return ({query: (positives' texts, negatives' texts)}, counts)."""
    miner = Miner(*world, rules(**changed))
    run = run_file(tmp_path / "run", list(first), list(second))
    found = {q: ([x.text for x in p], [x.text for x in n]) for q, p, n in miner.mine(run, logits)}
    return found, miner.counts


def test_positives_are_found_by_text_without_spaces(world):
    data, _, located = world
    assert sorted(located.values()) == [[0], [3]]
    assert mining_inputs.positive_rows(data, data.groups[0], located) == [3]
    assert mining_inputs.positive_rows(data, data.groups[1], located) == [0]


def test_highest_ranked_first_without_known_positives(world, tmp_path):
    found, counts = mined(world, tmp_path)
    assert found == {"甲": (["文3", "无"], ["文5", "文6", "文7", "文8"]), "乙": (["文 0"], ["文1", "文2"])}
    assert (counts.queries, counts.candidates, counts.known, counts.chosen) == (2, 10, 2, 6)
    assert counts.ranks[1] == 6 and sum(counts.ranks.values()) == 6


def test_logits_compared_with_the_best_positive(world, tmp_path):
    # 甲: its positive 文3 has logit 9; the others -3, 7, 6, 9.1: sigmoid(-12, -2, -3, 0.1) = 0, .12, .05, .52
    logits = [-3, 9, 7, 6, 9.1, 2, 4, 1, 2, 3]  # 乙: 文0 has 4; sigmoid(-2, -3, -2, -1)
    found, counts = mined(world, tmp_path, logits, against_positive=True, too_few="fewer")
    assert found == {"甲": (["文3", "无"], ["文5", "文7"]), "乙": (["文 0"], ["文2"])}
    assert (counts.false_negatives, counts.known) == (5, 2)
    found, _ = mined(
        world, tmp_path, logits, too_few="fewer"
    )  # against zero all but one are likely positives
    assert found == {"甲": (["文3", "无"], ["文5"])}


def test_a_re_ranker_that_considers_everything_relevant_is_reported(world, tmp_path):
    _, counts = mined(world, tmp_path, [0.0] * 10)
    assert counts.false_negatives == 8 and "100% of the candidates" in counts.warning()
    _, counts = mined(world, tmp_path, [5, 5, 5, 0, -5, -5, 5, 5, -5, -5])
    assert counts.false_negatives == 4 and counts.warning() is None  # half of eight: not most


def test_without_a_positive_nothing_is_denoised(world, tmp_path):
    # no candidate of 甲 is its positive; 乙's, 文0, has 1: the others .9997 (promoted), .5, .5, .5
    logits = [9, 9, 9, 9, 9, 9, 1, 1, 1, 1]
    found, counts = mined(
        world,
        tmp_path,
        logits,
        first=(5, 4, 6, 7, 8),
        against_positive=True,
        too_few="fewer",
        promote_score=0.9,
    )
    assert found["甲"] == (["文3", "无"], ["文5", "文4", "文6", "文7"])
    assert (counts.unjudged_queries, counts.promoted, counts.false_negatives) == (1, 1, 4)


def test_a_run_with_two_queries_that_differ_in_spaces_only(world, tmp_path):
    rows = [("甲", 5), (" 甲", 6), ("乙", 1)]
    write(tmp_path / "run", [f"{query}\t{row}\t1\t1" for query, row in rows])
    found = mining_inputs.candidates_by_group(world[0], tmp_path / "run")
    assert [(query, [row.row for row in rows]) for _, (query, rows) in found] == [("甲", [5]), ("乙", [1])]


def test_the_training_loss_of_the_re_ranker_decides_the_comparison(tmp_path, capsys):
    def against(**changed) -> bool:
        return against_positive(MiningHparams(cross_params=str(tmp_path / "cross_params.bin"), **changed))

    (tmp_path / "cross_params.bin").write_bytes(b"weights")
    assert not against()  # a re-ranker without a record
    weights = checksum_files([tmp_path / "cross_params.bin"])
    for loss, listwise in (("pointwise", False), ("listwise", True)):
        (tmp_path / "cross_hparams.json").write_text(json.dumps({"loss": loss, "weights": weights}))
        assert against() == listwise
    (tmp_path / "cross_params.bin").write_bytes(b"others")  # the record is of other weights
    assert not against() and "WARNING" in capsys.readouterr().err
    assert against(score_against="positive") and not against(score_against="zero")


def test_likely_positives_are_dropped_and_optionally_promoted(world, tmp_path):
    # probabilities: logit 5 -> .993, 0 -> .5, -5 -> .007
    logits = [5, 5, -5, 0, -5, -5, 5, -5, -5, -5]
    found, counts = mined(world, tmp_path, logits)
    assert found == {"甲": (["文3", "无"], ["文6", "文8", "旧1", "旧2"]), "乙": (["文 0"], ["文1", "文2"])}
    assert (counts.false_negatives, counts.known, counts.promoted, counts.filled) == (2, 2, 0, 2)
    found, counts = mined(world, tmp_path, logits, promote_score=0.9, too_few="fewer")
    assert found["甲"] == (["文3", "无", "文5"], ["文6", "文8"])
    assert counts.promoted == 1 and counts.short_queries == 1


def test_the_probability_itself_is_the_limit(world, tmp_path):
    logits = [-2.1972245773362196] * 10  # sigmoid: 0.1
    assert mining.sigmoid(logits[0]) == pytest.approx(0.1, abs=1e-15)
    found, _ = mined(world, tmp_path, logits, max_score=0.1001, negatives=1)
    assert found["乙"][1] == ["文1"]
    found, counts = mined(world, tmp_path, logits, max_score=0.0999, negatives=1)
    assert found["乙"][1] == ["旧4"] and counts.false_negatives == 8


def test_rank_window(world, tmp_path):
    found, counts = mined(world, tmp_path, rank_from=4, rank_to=5, negatives=1)
    assert found == {"甲": (["文3", "无"], ["文7", "文8"]), "乙": (["文 0"], ["文4"])}
    assert counts.outside == 4  # ranks 1 and 3 of both; rank 2 is a known positive of both


def test_only_topk_ranks_are_candidates(world, tmp_path):
    found, counts = mined(world, tmp_path, topk=3, negatives=1)
    assert counts.candidates == 6 and found["甲"][1] == ["文5", "文6"]


@pytest.mark.parametrize(
    ("too_few", "expected"),
    [
        ("original", {"甲": ["文5", "旧1", "旧2", "旧3"], "乙": ["文1", "旧4"]}),
        ("fewer", {"甲": ["文5"], "乙": ["文1"]}),
        ("drop", {}),
    ],
)
def test_queries_with_too_few_negatives(world, tmp_path, too_few, expected):
    found, counts = mined(world, tmp_path, first=(5,), second=(1,), too_few=too_few)
    assert {query: negatives for query, (_, negatives) in found.items()} == expected
    assert counts.short_queries == 2 and counts.dropped_queries == (2 if too_few == "drop" else 0)


def test_a_duplicate_text_is_chosen_once(world, tmp_path):
    data, _, located = world
    write(tmp_path / "d/part-00", [f"-\t\t{text}\t0" for text in ["文0", "同", "同 ", "文3", *PASSAGES[4:]]])
    collection = PassageCollection(tmp_path / "d")
    miner = Miner(data, collection, located, rules(negatives=1))
    run = run_file(tmp_path / "run", [1, 2, 4], [2, 1, 5])
    found = {q: [x.text for x in n] for q, _, n in miner.mine(run, None)}
    assert found == {"甲": ["同", "文4"], "乙": ["同 "]}


def test_sampling_is_by_seed_and_within_the_window(world, tmp_path):
    wide = dict(first=(1, 2, 4, 5, 6, 7, 8, 9), second=(1, 2, 4, 5, 6, 7, 8, 9), negatives=1, select="sample")
    one, again = (mined(world, tmp_path, **wide, seed=3)[0] for _ in range(2))
    others = [mined(world, tmp_path, **wide, seed=seed)[0] for seed in range(4, 12)]
    assert one == again and any(other != one for other in others)
    found, _ = mined(world, tmp_path, **wide, rank_from=3, rank_to=3)
    assert found["乙"][1] == ["文4"]


def test_a_run_of_other_queries_is_refused(world, tmp_path):
    write(tmp_path / "run", ["乙\t1\t1\t0.5", "甲\t1\t1\t0.5"])
    with pytest.raises(UserError, match="expected the queries of"):
        list(Miner(*world, rules()).mine(tmp_path / "run", None))


def test_a_query_missing_from_the_run_keeps_its_negatives(world, tmp_path):
    write(tmp_path / "run", ["乙\t1\t1\t0.5", "乙\t2\t2\t0.4"])  # BM25 found nothing for 甲
    found = {q: [x.text for x in n] for q, _, n in Miner(*world, rules()).mine(tmp_path / "run", None)}
    assert found == {"甲": ["旧1", "旧2", "旧3"], "乙": ["文1", "文2"]}
    mining_inputs.write_with_positives(world[0], world[2], tmp_path / "run", tmp_path / "pairs")
    assert lines(tmp_path / "pairs")[0] == "甲\t3\t1\t0"


@pytest.mark.parametrize(
    ("rows", "what"), [(["甲\t12\t1\t0.5"], "row 12 is outside the collection"), ([], "no results")]
)
def test_a_run_of_another_collection_is_refused(world, tmp_path, rows, what):
    write(tmp_path / "run", rows)
    with pytest.raises(UserError, match=what):
        list(Miner(*world, rules()).mine(tmp_path / "run", None))


@pytest.mark.parametrize("count", [9, 11])
def test_scores_of_another_length_are_refused(world, tmp_path, count):
    with pytest.raises(UserError, match="re-ranker scores"):
        mined(world, tmp_path, [-5.0] * count)


def test_positives_are_added_to_the_run_for_the_teacher(world, tmp_path):
    data, _, located = world
    run = run_file(tmp_path / "run", [5, 6], [0, 2])
    mining_inputs.write_with_positives(data, located, run, tmp_path / "pairs")
    assert lines(tmp_path / "pairs") == [
        "甲\t5\t1\t8",
        "甲\t6\t2\t7",
        "甲\t3\t3\t7",
        "乙\t0\t1\t8",
        "乙\t2\t2\t7",
    ]


def test_the_written_files(world, tmp_path):
    logits = [-5, 4, -5, -5, -5, -5, 3, -5, -5, -5]
    miner = Miner(*world, rules(negatives=2))
    run = run_file(tmp_path / "run", [5, 3, 6, 7, 8], [1, 0, 2, 4, 9])
    mining.write_mined(miner.mine(run, logits), tmp_path, lambda row: f"p{row}")
    assert lines(tmp_path / "dual.train.tsv") == [
        "甲\t\t文3\t\t文5\t0", "甲\t\t文3\t\t文7\t0", "甲\t\t无\t\t文6\t0", "甲\t\t无\t\t文8\t0",
        "乙\t\t文 0\t\t文1\t0", "乙\t\t文 0\t\t文2\t0",
    ]  # fmt: skip
    assert lines(tmp_path / "cross.train.tsv")[:3] == ["甲\t\t文3\t1", "甲\t\t无\t1", "甲\t\t文5\t0"]
    header, *ids = [line.split("\t") for line in lines(tmp_path / mining.SIDECAR)]
    assert header == COLUMNS
    assert ids[0] == ["3", "p3", "", "", "4", "5", "p5", "1", "8", "-5"]
    assert ids[2] == ["", "", "", "", "", "6", "p6", "3", "6", "-5"]  # this positive is in no row
    assert ids[4] == ["0", "p0", "", "", "3", "1", "p1", "1", "8", "-5"]


@pytest.fixture
def program(programs, tmp_path):
    """Return program(name, *options), which runs a program and returns its output."""

    def run(name: str, *words, status: int = 0) -> str:
        done = programs.run(name, list(map(str, words)), tmp_path / "log")
        assert done.returncode == status, done.output()
        return done.output()

    return run


@pytest.mark.slow
def test_mining_with_trained_models(trained_copy, tmp_path, program):
    """With and without a re-ranker; a second run changes nothing. Rounds that train on it: run_rounds.py."""
    world = trained_copy
    (world / "output").rename(tmp_path / "out")
    shared = options(world, tmp_path / "out")
    program("do_cross_train.py", *shared, "--pretrained_model_path", world / "model", "--epoch", 1)
    encoded = (tmp_path / "out/para_emb/block-00000.npy").stat().st_mtime_ns
    mine = ("script/mine_negatives.py", *shared, "--topk", 15)
    assert "chosen as negatives" in program(*mine)
    first = (tmp_path / "out/mined/dual.train.tsv").read_bytes()
    assert "dual.train.tsv: up to date" in program(*mine)
    cross = ("--cross_params", tmp_path / "out/cross_params.bin", "--max_score", 1)
    assert "cross_params" in program(*mine, *cross)
    assert (tmp_path / "out/mined/dual.train.tsv").read_bytes() == first  # max_score 1 keeps all
    assert (tmp_path / "out/para_emb/block-00000.npy").stat().st_mtime_ns == encoded  # not recomputed
    _, *ids = lines(tmp_path / "out/mined" / mining.SIDECAR)
    assert len(ids) == len(first.splitlines()) and all(line.split("\t")[-1] for line in ids)
    counts = json.loads((tmp_path / "out/mined/mining.json").read_text())["counts"]
    assert counts["queries"] == 24 and counts["chosen"] + counts["filled"] > 24
    own = ("--retrieval_result", tmp_path / "out/mined/res.top15", "--mined_dir", tmp_path / "own")
    (tmp_path / "out/dual_params.bin").unlink()  # a given run needs no retriever
    program(*mine, *own)
    assert (tmp_path / "own/dual.train.tsv").read_bytes() == first
    assert "bm25.py search" in program(*mine, *own[:1], tmp_path / "nowhere", status=2)


def test_a_model_that_was_not_trained_is_taken_from_the_settings_of_its_vectors(tmp_path, monkeypatch):
    hp = MiningHparams(output_dir=str(tmp_path), dual_params="none", data_dir="data", topk=7)
    with pytest.raises(UserError, match="do_dual_infer.py --dual_params none"):
        mine_negatives.retrieve(hp, tmp_path / "mined/train.q.format")
    of_vectors = {
        "dual_params": "none", "pretrained_model_path": str(tmp_path / "model"), "vocab_path": None,
        "pooling": "mean", "normalize": True, "query_prefix": "query: ", "passage_prefix": "",
        "q_max_seq_len": 9, "p_max_seq_len": 19, "remove_spaces": False, "share_encoder": None,
        "seed": 7,
    }  # fmt: skip
    write(tmp_path / "dual_infer_hparams.json", [json.dumps({**of_vectors, "topk": 3})])
    searched = []
    monkeypatch.setattr("torch_src.dual_infer.run", lambda *given: searched.append(given))
    assert mine_negatives.retrieve(hp, tmp_path / "mined/train.q.format") == tmp_path / "mined/res.top7"
    ((settings, topk, _),) = searched
    assert topk == 7 and {name: getattr(settings, name) for name in of_vectors} == of_vectors


@pytest.mark.slow
def test_vectors_of_another_run_are_not_deleted(tmp_path, program):
    """With `--para_emb` of another run, its vectors are refused and kept."""
    world = make_world(tmp_path)
    untrained = (
        *options(world, tmp_path / "a"),
        "--dual_params",
        "none",
        "--pretrained_model_path",
        world / "model",
    )
    program("do_dual_infer.py", *untrained)
    words = [*options(world, tmp_path / "b"), *untrained[-4:], "--para_emb", tmp_path / "a/para_emb"]
    program("do_dual_infer.py", *words)
    output = program("do_dual_infer.py", *words, "--p_max_seq_len", "20", status=2)
    assert "another run" in output and "--para_emb" in output
    program("do_dual_infer.py", *words)  # still there


def test_dropped_texts_are_not_added_back_from_the_training_file(tmp_path):
    rows = [("甲", "文3", "文5"), ("甲", "文3", "文 6"), ("甲", "文3", "旧1")]
    write(tmp_path / "train.tsv", [f"{q}\t\t{p}\t\t{n}\t0" for q, p, n in rows])
    write(tmp_path / "c/part-00", [f"-\t\t{text}\t0" for text in [*PASSAGES, "文5 "]])
    write(tmp_path / "run", [f"甲\t{row}\t{rank}\t0" for rank, row in enumerate((5, 6, 12, 7), start=1)])
    data = mining_inputs.open_training_set(str(tmp_path / "train.tsv"))
    collection = PassageCollection(tmp_path / "c")
    located, logits = mining_inputs.locate_positives(data, collection), [5.0, 0.0, 5.0, -5.0]
    miner = Miner(data, collection, located, rules(negatives=3))
    [(_, positives, negatives)] = miner.mine(tmp_path / "run", logits)
    assert [x.text for x in positives] == ["文3"] and [x.text for x in negatives] == ["文7", "旧1"]
    miner = Miner(data, collection, located, rules(negatives=3, promote_score=0.9))
    [(_, positives, negatives)] = miner.mine(tmp_path / "run", logits)
    assert [x.text for x in positives] == ["文3", "文5"]  # once, though the collection has it twice
    assert [x.text for x in negatives] == ["文7", "旧1"] and miner.counts.promoted == 1
