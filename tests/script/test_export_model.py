"""Exported folders load in transformers and sentence-transformers, with the same vectors and scores."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from toy_folders import write_dense, write_json, write_modules
from toy_world import SAMPLE, lines, make_world, options, train_options
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from script import export_model
from script.lib import export
from torch_src import cross_infer, cross_train, dual_infer, dual_train
from torch_src.models.model_folder import read_model_folder
from torch_src.models.tokenization import load_tokenizer

pytestmark = pytest.mark.tools

WAYS = {
    "tied": ["--share_encoder", "--pooling", "mean", "--normalize", "--temperature", "0.05"],
    "untied": ["--pooling", "cls"],
}
PREFIXES = ["--query_prefix", "问：", "--passage_prefix", "文：", "--q_max_seq_len", "12"]


@pytest.fixture(scope="module", params=list(WAYS))
def exported(request, tmp_path_factory):
    """A trained world, its exported dual encoder, and how it was trained."""
    world = make_world(tmp_path_factory.mktemp(request.param))
    words = [*train_options(world, world / "out"), *WAYS[request.param], *PREFIXES]
    assert dual_train.main(words) == 0
    assert dual_infer.main(options(world, world / "out"), topk=50) == 0
    assert export_model.main(["dual", "--output_dir", str(world / "out"), "--to", str(world / "st")]) == 0
    return world, request.param


def texts(world) -> tuple[list[str], list[str]]:
    queries = [line.split("\t")[0] for line in lines(world / "data/dev/dev.q.format")]
    parts = sorted((world / "data/passage-collection").glob("part-*"))
    return queries, [line.split("\t")[2] for part in parts for line in lines(part)]


def test_vectors_are_the_same(exported):
    from sentence_transformers import SentenceTransformer

    world, way = exported
    model = SentenceTransformer(str(world / "st"), device="cpu")
    queries, passages = texts(world)
    ours = np.load(world / "out/query.emb.npy")
    assert np.abs(model.encode_query(queries) - ours).max() < 1e-5
    stored = np.concatenate([np.load(path) for path in sorted((world / "out/para_emb").glob("*.npy"))])
    theirs = model.encode_document(passages)
    assert np.abs(theirs - stored.astype(np.float32)).max() < 2e-3 * max(1, np.abs(theirs).max())  # fp16
    assert model.similarity_fn_name == ("cosine" if way == "tied" else "dot")


def test_the_ranking_is_the_same(exported):
    from sentence_transformers import SentenceTransformer

    world, _ = exported
    model = SentenceTransformer(str(world / "st"), device="cpu")
    queries, passages = texts(world)
    scores = model.similarity(model.encode_query(queries), model.encode_document(passages)).numpy()
    rows = [int(line.split("\t")[1]) for line in lines(world / "out/res.top50")]
    for at in range(len(queries)):
        first = rows[at * 50 : (at + 1) * 50]
        rounding = 1e-3 * np.abs(scores[at]).max()  # of the stored vectors, to fp16
        assert scores[at, first[0]] > scores[at].max() - rounding
        assert (np.diff(scores[at, first]) < rounding).all()


def test_transformers_loads_the_tower(exported):
    world, way = exported
    places = {"tied": ["."], "untied": ["query_0_Transformer", "document_0_Transformer"]}[way]
    state = torch.load(world / "out/dual_params.bin", weights_only=True)
    for place, tower in zip(places, ["query_encoder", "passage_encoder"], strict=False):
        loaded = AutoModel.from_pretrained(world / "st" / place).state_dict()
        name = "embeddings.word_embeddings.weight"
        assert torch.equal(loaded[name], state[f"{tower}.{name}"])
        assert AutoTokenizer.from_pretrained(world / "st" / place).tokenize("清蒸鱼") == ["清", "蒸", "鱼"]


def test_the_model_card_has_usage_and_settings(exported):
    world, _ = exported
    card = (world / "st/README.md").read_text(encoding="utf-8")
    assert "encode_query" in card and '"q_max_seq_len": 12' in card and '"weights": ' in card


def test_an_exported_folder_works_as_pretrained_model(exported):
    """It includes towers, pooling, prefixes and lengths: the same vectors without options."""
    world, way = exported
    own = read_model_folder(str(world / "st")).knobs()
    if way == "tied":
        assert own == {"pooling": "mean", "normalize": True, "query_prefix": "问：", "passage_prefix": "文："}
    words = [*options(world, world / "back"), "--pretrained_model_path", str(world / "st")]
    assert dual_infer.main([*words, "--dual_params", "none"], topk=50) == 0
    for name in ("query.emb.npy", "para_emb/block-00000.npy"):
        ours, back = (np.load(world / place / name).astype(np.float32) for place in ("out", "back"))
        assert np.abs(ours - back).max() < 1e-6 * max(1, np.abs(ours).max())


def test_an_exported_folder_is_a_warm_start(exported):
    """Before the first update, the weights are those that were exported."""
    world, way = exported
    words = [
        *options(world, world / "warm"),
        "--pretrained_model_path",
        str(world / "st"),
        "--batch_size",
        "8",
    ]
    hp = dual_train.settings(words)
    assert (hp.q_max_seq_len, hp.p_max_seq_len) == (12, 64)
    task = dual_train.training_stage(hp).task
    task.load()
    state = torch.load(world / "out/dual_params.bin", weights_only=True)
    for side in ("query", "passage"):
        for name, value in task.model.tower(side).state_dict().items():
            stored = state.get(f"{side}_encoder.{name}", state[f"query_encoder.{name}"])
            assert torch.equal(value, stored), (side, name)


@pytest.mark.parametrize("kind", ["vocab.txt", "tokenizer.json"])
def test_cross_encoder_scores_are_the_same(kind, tmp_path, tiny_encoder):
    """By default only a tokenizer that was made from a vocab.txt returns segment ids."""
    from sentence_transformers import CrossEncoder

    world = make_world(tmp_path)
    start = world / "model" if kind == "vocab.txt" else tiny_encoder
    both, model = options(world, world / "out"), ["--pretrained_model_path", str(start)]
    assert dual_infer.main([*both, *model, "--dual_params", "none"], topk=10) == 0
    short = ["--epoch", "1", "--batch_size", "16", "--max_seq_len", "96", "--lr", "1e-3", "--max_steps", "4"]
    assert cross_train.main([*both, *model, *short]) == 0
    assert cross_infer.main([*both, "--retrieval_result", str(world / "out/res.top10")]) == 0
    results = [
        "--results",
        str(world / "out/cross_res.json"),
        "--reference",
        str(world / "data/dev/dev.json"),
    ]
    words = ["cross", "--output_dir", str(world / "out"), "--to", str(world / "ce"), *results]
    assert export_model.main(words) == 0
    loaded = CrossEncoder(str(world / "ce"), device="cpu")
    rows = [line.split("\t") for line in lines(world / "out/res.top10")]
    _, passages = texts(world)
    logits = loaded.predict([(query, passages[int(row)]) for query, row, _, _ in rows])
    ours = np.array([float(line) for line in lines(world / "out/cross_scores.txt")])
    assert np.abs(logits - ours).max() < 1e-5
    assert "| MRR@10 | " in (world / "ce/README.md").read_text(encoding="utf-8")


def model_with(folder: Path, kind: str) -> Path:
    """Write a tiny pretrained model with a vocabulary of single characters."""
    tokenizer = load_tokenizer("", str(SAMPLE.parents[1] / "tests/tiny_bert/vocab.txt"))
    tokenizer.chat_template = "{% for m in messages %}x {{ m.content }}{% endfor %}"  # not for this use
    sizes = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 1024, "initializer_range": 0.3,
    }  # fmt: skip
    decoder = Qwen3Config(**sizes, num_key_value_heads=2, head_dim=16)
    torch.manual_seed(0)
    if kind == "reranker":
        tokenizer.chat_template = None
        Qwen3ForCausalLM(decoder).save_pretrained(folder)
    elif kind == "decoder":
        Qwen3Model(decoder).save_pretrained(folder)
        pooling = {"pooling_mode": "lasttoken", "embedding_dimension": 32}
        write_modules(folder, pooling, prompts={"query": "问："}, lengths={"max_seq_length": 40})
        tokenizer.padding_side = "left"
    else:
        BertModel(BertConfig(**sizes)).save_pretrained(folder)
        pooling = {
            "pooling_mode": "weightedmean", "include_prompt": False, "embedding_dimension": 32,
        }  # fmt: skip
        after = ("Dense", "LayerNorm", "Normalize")
        write_modules(
            folder, pooling, after, {"max_seq_length": 40}, prompts={"query": "问：", "document": "文："}
        )
        write_dense(folder / "2_Dense", 32, 24)
        write_json(folder / "3_LayerNorm/config.json", {"dimension": 24})
        save_file({"norm.weight": torch.rand(24), "norm.bias": torch.rand(24)},
                  str(folder / "3_LayerNorm/model.safetensors"))  # fmt: skip
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["decoder", "layers"])
def test_a_retriever_of_another_kind_through_all_programs(tmp_path, kind):
    """Zero-shot, trained and exported: each equal to sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    world = make_world(tmp_path)
    folder, both = model_with(world / kind, kind), options(world, world / "out")
    queries, passages = texts(world)

    def equal(path: Path) -> None:
        model = SentenceTransformer(str(path), device="cpu")
        ours = np.load(world / "out/query.emb.npy"), np.load(world / "out/para_emb/block-00000.npy")
        for one, other in zip(
            ours, (model.encode_query(queries), model.encode_document(passages)), strict=True
        ):
            one = one.astype(np.float64) / np.linalg.norm(one.astype(np.float64), axis=1, keepdims=True)
            other = other / np.linalg.norm(other, axis=1, keepdims=True)
            assert (one * other).sum(1).min() > 0.99999

    start = ["--pretrained_model_path", str(folder)]
    assert dual_infer.main([*both, *start, "--dual_params", "none"], topk=10) == 0
    equal(folder)
    short = ["--epoch", "1", "--batch_size", "8", "--lr", "1e-3", "--temperature", "0.05"]
    assert dual_train.main([*both, *start, *short]) == 0
    assert dual_infer.main(both, topk=10) == 0
    assert export_model.main(["dual", "--output_dir", str(world / "out"), "--to", str(world / "st")]) == 0
    equal(world / "st")
    again = [*both, "--pretrained_model_path", str(world / "st"), "--dual_params", "none"]
    before = np.load(world / "out/query.emb.npy")
    assert dual_infer.main(again, topk=10) == 0
    assert np.abs(np.load(world / "out/query.emb.npy") - before).max() < 1e-6


def test_a_language_model_as_re_ranker_through_all_programs(tmp_path):
    """Zero-shot, trained and exported with its template: the export equals sentence-transformers."""
    from sentence_transformers import CrossEncoder

    world = make_world(tmp_path)
    folder, both = model_with(world / "lm", "reranker"), options(world, world / "out")
    dual = [*both, "--pretrained_model_path", str(world / "model"), "--dual_params", "none"]
    assert dual_infer.main(dual, topk=10) == 0
    start, run = (
        ["--pretrained_model_path", str(folder)],
        ["--retrieval_result", str(world / "out/res.top10")],
    )
    assert cross_infer.main([*both, *start, *run, "--cross_params", "none"]) == 0
    zero_shot = np.array([float(line) for line in lines(world / "out/cross_scores.txt")])
    short = ["--epoch", "1", "--batch_size", "16", "--max_seq_len", "260", "--lr", "1e-3", "--max_steps", "2"]
    assert cross_train.main([*both, *start, *short]) == 0
    assert cross_infer.main([*both, *run]) == 0
    ours = np.array([float(line) for line in lines(world / "out/cross_scores.txt")])
    assert np.abs(ours - zero_shot).max() > 1e-3
    assert export_model.main(["cross", "--output_dir", str(world / "out"), "--to", str(world / "ce")]) == 0
    rows = [line.split("\t") for line in lines(world / "out/res.top10")]
    _, passages = texts(world)
    loaded = CrossEncoder(str(world / "ce"), device="cpu")
    pairs = [(query, passages[int(row)]) for query, row, _, _ in rows]
    logits = loaded.predict(pairs)
    assert np.abs(logits - ours).max() < 1e-4
    again = [*both, *run, "--pretrained_model_path", str(world / "ce"), "--cross_params", "none"]
    assert cross_infer.main(again) == 0
    back = np.array([float(line) for line in lines(world / "out/cross_scores.txt")])
    assert np.abs(back - ours).max() < 1e-5


def test_a_failed_export_leaves_nothing(exported, monkeypatch, capsys):
    world, _ = exported

    def fail(*_):
        raise OSError(28, "No space left on device", "README.md")

    monkeypatch.setattr(export, "write_card", fail)
    before = sorted(path.name for path in world.iterdir())
    words = ["dual", "--output_dir", str(world / "out"), "--to", str(world / "failed")]
    assert export_model.main(words) == 2
    assert sorted(path.name for path in world.iterdir()) == before
    monkeypatch.undo()
    (world / "failed").mkdir()  # an empty folder is filled
    assert export_model.main(words) == 0 and (world / "failed/README.md").exists()
    assert export_model.main(words) == 2 and "not empty" in capsys.readouterr().err
