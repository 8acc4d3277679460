"""The cross-encoder's losses, FGM, tokenization of pairs, fp32 head and scoring, each against a slow or
hand-computed counterpart.
"""

import copy
import math
import random
from functools import cache

import numpy as np
import pytest
import torch
from token_lists import pair_lists
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, DistilBertConfig

from torch_src.cross_train import perturb, replaced
from torch_src.data.candidates import Candidates
from torch_src.models import tokenization
from torch_src.models.cross_encoder import (
    Float32Linear,
    build_cross_encoder,
    load_cross_encoder,
    start_from_retriever,
)
from torch_src.models.dual_encoder import DualEncoder
from torch_src.models.losses import listwise_loss, pointwise_loss
from torch_src.models.tokenization import MIN_PASSAGE_TOKENS, TextRules, tokenize_pairs
from torch_src.retrieval.reranking import PairScorer, fuse, rank_pairs
from torch_src.runtime.devices import autocast
from torch_src.runtime.errors import UserError

CPU = torch.device("cpu")


# ---- losses


@pytest.mark.parametrize("seed", range(3))
def test_pointwise_loss_equals_the_slow_one(seed):
    draw = random.Random(seed)
    logits = [draw.gauss(0, 4) for _ in range(17)]
    labels = [float(draw.random() < 0.3) for _ in range(17)]
    probabilities = [1 / (1 + math.exp(-logit)) for logit in logits]
    terms = [-math.log(p if label else 1 - p) for p, label in zip(probabilities, labels, strict=True)]
    right = [(logit > 0) == (label == 1) for logit, label in zip(logits, labels, strict=True)]
    loss, accuracy = pointwise_loss(torch.tensor(logits), torch.tensor(labels))
    assert loss.item() == pytest.approx(sum(terms) / 17, rel=1e-4)
    assert accuracy.item() == pytest.approx(sum(right) / 17)


@pytest.mark.parametrize("group_size", [2, 5])
def test_listwise_loss_equals_the_slow_one(group_size):
    draw = random.Random(group_size)
    groups = [[draw.gauss(0, 3) for _ in range(group_size)] for _ in range(7)]
    terms = [math.log(math.fsum(math.exp(v) for v in group)) - group[0] for group in groups]
    right = [group[0] == max(group) for group in groups]
    loss, accuracy = listwise_loss(torch.tensor(sum(groups, [])), group_size)
    assert loss.item() == pytest.approx(sum(terms) / 7, rel=1e-5)
    assert accuracy.item() == pytest.approx(sum(right) / 7)


def test_losses_are_computed_in_fp32():
    logits = torch.tensor([20.0, -20.0], dtype=torch.bfloat16)
    assert pointwise_loss(logits, torch.tensor([1.0, 0.0]))[0].dtype == torch.float32
    assert listwise_loss(logits, 2)[0].dtype == torch.float32


def test_losses_of_huge_logits_are_finite():
    logits = torch.tensor([-300.0, 300.0])
    assert pointwise_loss(logits, torch.tensor([1.0, 0.0]))[0].item() == pytest.approx(300)
    assert listwise_loss(logits, 2)[0].item() == pytest.approx(600)


# ---- FGM by hand: s = w . mean of E[ids], loss = s^2 / 2; dloss/dE[i] = s w n_i / n and dloss/dw = s mean

TABLE = [[0.1, 0.2, -0.3], [0.5, -0.4, 0.2], [-0.2, 0.3, 0.7], [1.0, 1.0, 1.0]]
IDS = [0, 2, 2, 1]
COUNTS = np.array([1, 1, 2, 0])
W = [0.7, -1.1, 0.4]


class Toy:
    """The model above, which counts the calls of its loss."""

    def __init__(self):
        self.table = torch.nn.Parameter(torch.tensor(TABLE, dtype=torch.float64))
        self.w = torch.nn.Parameter(torch.tensor(W, dtype=torch.float64))
        self.calls = 0

    def loss(self):
        self.calls += 1
        score = torch.nn.functional.embedding(torch.tensor(IDS), self.table).mean(0) @ self.w
        return score**2 / 2, score.detach()

    def fgm(self, epsilon: float):
        gradient = torch.autograd.grad(self.loss()[0], self.table)[0]
        with replaced(self.table, perturb(self.table.detach(), gradient, epsilon)):
            loss = self.loss()[0]
            loss.backward()
        return loss.item(), self.table.grad.numpy(), self.w.grad.numpy()


def by_hand(table: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """(loss, its gradient on the table, its gradient on w)."""
    mean = (COUNTS[:, None] * table).sum(0) / 4
    score = mean @ np.array(W)
    return score**2 / 2, score * np.outer(COUNTS / 4, W), score * mean


def test_fgm_is_the_hand_computed_case():
    toy, epsilon = Toy(), 0.5
    before = toy.table.detach().numpy().tobytes()
    gradient = by_hand(np.array(TABLE))[1]
    moved = np.array(TABLE) + epsilon * gradient / np.sqrt((gradient**2).sum())
    for found, expected in zip(toy.fgm(epsilon), by_hand(moved), strict=True):
        assert np.allclose(found, expected, rtol=1e-6, atol=1e-12)
    assert toy.table.detach().numpy().tobytes() == before
    assert not np.allclose(
        toy.w.grad.numpy(), by_hand(np.array(TABLE))[2], rtol=1e-2
    )  # and not the plain one


def test_fgm_moves_by_epsilon_towards_a_higher_loss():
    losses = [Toy().fgm(epsilon)[0] for epsilon in (0.0, 0.01, 0.1, 1.0)]
    assert losses == sorted(losses) and len(set(losses)) == 4


def test_fgm_with_epsilon_zero_changes_nothing():
    for found, expected in zip(Toy().fgm(0.0), by_hand(np.array(TABLE)), strict=True):
        assert np.allclose(found, expected, rtol=1e-12, atol=0)


def test_fgm_with_no_gradient_gives_the_plain_loss():
    toy = Toy()
    with torch.no_grad():
        toy.w.zero_()
    loss, table, w = toy.fgm(0.5)
    assert loss == 0 and not table.any() and np.isfinite(w).all() and toy.calls == 2


def test_fgm_restores_the_table_after_an_error():
    toy = Toy()
    gradient = torch.autograd.grad(toy.loss()[0], toy.table)[0]
    with pytest.raises(KeyboardInterrupt), replaced(toy.table, perturb(toy.table.detach(), gradient, 0.5)):
        assert toy.table.detach().numpy().tolist() != TABLE
        raise KeyboardInterrupt
    assert toy.table.detach().numpy().tolist() == TABLE


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 1e-5)])
def test_fgm_of_a_cross_encoder_is_the_gradient_at_the_moved_table(tiny_config, precision, tolerance):
    """Compared with a second model whose table is permanently moved; both run the same casts under bf16."""
    torch.manual_seed(0)
    tiny_config.initializer_range = 0.1
    model = build_cross_encoder(tiny_config).eval()
    ids, mask = torch.randint(5, 500, (6, 20)), torch.ones(6, 20, dtype=torch.long)
    labels = torch.tensor([1.0, 0, 0, 1, 0, 0])

    def loss_of(some):
        return pointwise_loss(some(ids, mask, torch.zeros_like(ids)), labels)

    moved = copy.deepcopy(model)
    with autocast(CPU, precision):
        step = torch.autograd.grad(loss_of(model)[0], model.word_embeddings)[0]
    moved.word_embeddings.data.add_(step, alpha=0.5 / step.norm().item())
    with autocast(CPU, precision):
        expected = loss_of(moved)[0]
    expected = gradients(moved, expected)
    with replaced(model.word_embeddings, perturb(model.word_embeddings.detach(), step, 0.5)):
        with autocast(CPU, precision):
            loss = loss_of(model)[0]
        found = gradients(model, loss)
    with autocast(CPU, precision):
        plain = loss_of(model)[0]
    plain = gradients(model, plain)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=tolerance), name
    assert any((found[name] - plain[name]).abs().max() > 100 * tolerance for name in plain)


# ---- pairs of texts to token ids


@cache
def han_characters(tokenizer) -> list[str]:
    return sorted(t for t in tokenizer.get_vocab() if len(t) == 1 and "\u4e00" <= t <= "\u9fff")


def characters(tokenizer, count: int, seed: int) -> str:
    """Text of `count` characters: nine in ten a Han character of the vocabulary, else space, 1 or comma."""
    known, draw = han_characters(tokenizer), random.Random(seed)
    return "".join(draw.choice(known if draw.random() < 0.9 else " 1，") for _ in range(count))


def own(tokenizer, query: str, passage: str, limit: int) -> tuple[list[int], list[int]]:
    """Return the token and segment ids of the tokenizer's own truncation."""
    options = {"truncation": "only_second", "max_length": limit, "return_token_type_ids": True}
    batch = tokenizer([query], [passage], **options)
    return batch["input_ids"][0], batch["token_type_ids"][0]


def pair(tokenizer, query: str, passage: str, limit: int):
    return pair_lists(tokenizer, [query], [passage], TextRules(limit))


def parts(tokenizer, pairs, at: int = 0) -> tuple[list[int], list[int]]:
    """The token ids of query and passage, without the special ones."""
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    both = list(zip(pairs.ids[at], pairs.types[at], strict=True))
    return tuple([token for token, kind in both if kind == side and token not in special] for side in (0, 1))


def plain(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, truncation=False)["input_ids"]


def test_pairs_equal_the_tokenizers_own_truncation(tokenizer):
    lengths = [(1, 1), (5, 10), (12, 43), (12, 44), (12, 45), (30, 200), (3, 2000), (0, 5), (7, 0)]
    texts = [
        (characters(tokenizer, q, at), characters(tokenizer, p, 100 + at))
        for at, (q, p) in enumerate(lengths)
    ]
    pairs = pair_lists(tokenizer, *map(list, zip(*texts, strict=True)), TextRules(56))
    for at, (query, passage) in enumerate(texts):
        assert (pairs.ids[at], pairs.types[at]) == own(tokenizer, query, passage, 56)
    whole = [len(plain(tokenizer, q)) + len(plain(tokenizer, p)) + 3 for q, p in texts]
    assert pairs.cut == sum(length > 56 for length in whole) and 0 < pairs.cut < len(texts)
    assert pairs.lengths == [min(length, 56) for length in whole]


def test_more_pairs_than_fit_in_one_call(tokenizer):
    passages = [characters(tokenizer, at % 40, at) for at in range(1100)]
    pairs = pair_lists(tokenizer, ["问"] * 1100, passages, TextRules(24))
    for at in range(0, 1100, 20):
        alone = pair(tokenizer, "问", passages[at], 24)
        assert pairs.ids[at] == alone.ids[0] and pairs.types[at] == alone.types[0]


def test_a_long_query_with_a_long_passage_is_not_cut(tokenizer):
    query, passage = characters(tokenizer, 44, 1), characters(tokenizer, 900, 2)
    pairs = pair(tokenizer, query, passage, 64)
    found, rest = parts(tokenizer, pairs)
    assert found == plain(tokenizer, query) and rest == plain(tokenizer, passage)[: 61 - len(found)]
    assert len(pairs.ids[0]) == 64 and pairs.cut == 1


@pytest.mark.parametrize("limit", [8, 24, 64])
def test_a_query_longer_than_the_limit_is_cut_for_the_passage(tokenizer, limit):
    query, passage = characters(tokenizer, 500, 3).replace(" ", ""), characters(tokenizer, 500, 4)
    pairs = pair(tokenizer, query, passage, limit)
    found, rest = parts(tokenizer, pairs)
    room = min(MIN_PASSAGE_TOKENS, limit // 2)
    assert len(pairs.ids[0]) == limit
    assert found == plain(tokenizer, query)[: limit - room]
    assert rest == plain(tokenizer, passage)[: room - 3] and rest


def test_only_the_long_query_of_a_batch_is_cut(tokenizer):
    queries = [characters(tokenizer, 300, 5), characters(tokenizer, 20, 6), characters(tokenizer, 300, 5)]
    pairs = pair_lists(tokenizer, queries, ["文"] * 3, TextRules(64))
    assert pairs.ids[0] == pairs.ids[2] and len(pairs.ids[0]) < 64
    assert parts(tokenizer, pairs, 1)[0] == plain(tokenizer, queries[1])


def test_a_passage_of_60975_characters(tokenizer):
    query, passage = "问题", characters(tokenizer, 60975, 7)
    pairs = pair(tokenizer, query, passage, 384)
    assert (pairs.ids[0], pairs.types[0]) == own(tokenizer, query, passage, 384) and pairs.cut == 1


@pytest.mark.parametrize("passage", ["前" + " " * 3000 + "后", "a" * 3000 + " 后", " " * 1200 + "后" * 90])
def test_few_tokens_from_many_characters(tokenizer, passage):
    """The early cut by characters must not remove what the limit in tokens keeps."""
    pairs = pair(tokenizer, "问题", passage, 64)
    assert (pairs.ids[0], pairs.types[0]) == own(tokenizer, "问题", passage, 64)
    assert pairs.cut == (len(plain(tokenizer, passage)) > 59)


def test_spaces_are_removed_on_both_sides(tokenizer):
    pairs = pair_lists(tokenizer, ["1 1"], ["2 2 2"], TextRules(32, "", True))
    assert pairs.ids == pair_lists(tokenizer, ["11"], ["222"], TextRules(32)).ids
    assert pairs.ids != pair_lists(tokenizer, ["1 1"], ["2 2 2"], TextRules(32)).ids


def test_a_query_whose_characters_give_many_tokens_each():
    """Byte-level tokenizers (RoBERTa's, ModernBERT's) give three or four tokens a character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: at for at, token in enumerate(["<pad>", "<s>", "</s>"])}
    for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[byte] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 1), add_prefix_space=False)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names, cls_token="<s>")
    pairs = pair(tokenizer, "问" * 24, "passage " * 20, 64)  # 72 tokens
    text = tokenizer.decode(pairs.ids[0])
    assert len(pairs.ids[0]) == 64 and text.count("问") == 16 and "passage" in text


# ---- the head


def random_pairs(config, count: int, seed: int = 0):
    torch.manual_seed(seed)
    ids = torch.randint(5, config.vocab_size, (count, 16))
    return ids, torch.ones_like(ids), torch.zeros_like(ids)


def test_the_head_is_computed_in_fp32_under_bf16(tiny_config):
    ids, mask, types = random_pairs(tiny_config, 1000)
    tiny_config.num_labels, tiny_config.initializer_range = 1, 0.05
    torch.manual_seed(0)
    usual = AutoModelForSequenceClassification.from_config(tiny_config).eval()
    with torch.inference_mode(), autocast(CPU, "bf16"):
        half = usual(input_ids=ids, attention_mask=mask, token_type_ids=types).logits[:, 0]
    model = build_cross_encoder(tiny_config).eval()
    model.model.load_state_dict(usual.state_dict())
    with torch.inference_mode():
        exact = model(ids, mask, types)
        with autocast(CPU, "bf16"):
            logits = model(ids, mask, types)

    def ties(values) -> int:
        return len(values) - len(values.unique())

    assert half.dtype == torch.bfloat16 and logits.dtype == exact.dtype == torch.float32
    assert ties(half) > 300  # the head that the modules replace
    assert ties(logits) <= ties(exact) + 3  # two of 1000 fp32 numbers may be equal by chance
    assert (logits - exact).abs().max() < 0.05 and not torch.equal(logits, exact)


def test_only_the_head_is_in_fp32_and_no_weight_is_renamed(tiny_config):
    tiny_config.num_labels = 1
    usual = AutoModelForSequenceClassification.from_config(tiny_config)
    model = build_cross_encoder(tiny_config)
    changed = {name for name, module in model.model.named_modules() if isinstance(module, Float32Linear)}
    assert changed == {"bert.pooler.dense", "classifier"}
    assert set(model.model.state_dict()) == set(usual.state_dict())


def test_a_model_without_segments_gets_no_segment_ids(tokenizer):
    config = DistilBertConfig(vocab_size=len(tokenizer), dim=32, n_layers=1, n_heads=2, hidden_dim=64)
    model = build_cross_encoder(config).eval()
    logits = model(*random_pairs(config, 3))
    assert logits.shape == (3,) and not model.takes_types
    assert model.word_embeddings.shape == (len(tokenizer), 32)


def test_segment_ids_change_the_scores_of_a_model_that_has_them(tiny_config):
    model = build_cross_encoder(tiny_config).eval()
    ids, mask, types = random_pairs(tiny_config, 4)
    assert (model(ids, mask, types) - model(ids, mask, types + 1)).abs().min() > 1e-4


def test_a_missing_head_is_drawn_from_the_seed_or_refused(tiny_config, tmp_path, capsys):
    torch.manual_seed(1)
    BertModel(tiny_config, add_pooling_layer=True).save_pretrained(tmp_path)
    one, again, other = (load_cross_encoder(str(tmp_path), tiny_config, s, False) for s in (5, 5, 6))
    assert "classifier.weight" in capsys.readouterr().out
    assert torch.equal(one.model.classifier.weight, again.model.classifier.weight)
    assert not torch.equal(one.model.classifier.weight, other.model.classifier.weight)
    assert torch.equal(one.word_embeddings, other.word_embeddings)
    with pytest.raises(UserError, match="no trained head.*classifier"):
        load_cross_encoder(str(tmp_path), tiny_config, 5, trained=True)


def test_missing_weights_of_the_encoder_are_refused(tiny_config, tmp_path):
    deeper = copy.deepcopy(tiny_config)
    deeper.num_hidden_layers = 3
    BertModel(tiny_config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="encoder weights are missing.*encoder.layer"):
        load_cross_encoder(str(tmp_path), deeper, 5, trained=False)


# ---- scoring


@pytest.fixture
def model(tiny_config):
    torch.manual_seed(3)
    return build_cross_encoder(tiny_config).eval()


def scorer(
    model, tokenizer, batch_size: int = 256, tokens: int = 16384, precision: str = "fp32"
) -> PairScorer:
    return PairScorer(model, tokenizer, TextRules(48), CPU, precision, batch_size, tokens)


def listed(tokenizer, queries: int, depth: int, seed: int = 0) -> Candidates:
    """Candidates of random texts of many lengths."""
    draw = random.Random(seed)
    texts = [characters(tokenizer, draw.randrange(2, 60), 1000 + at) for at in range(queries * depth)]
    names = [characters(tokenizer, draw.randrange(2, 20), at) + str(at) for at in range(queries)]
    query_of = np.repeat(np.arange(queries, dtype=np.int32), depth)
    scores = -np.tile(np.arange(1, depth + 1), queries).astype(np.float32)
    return Candidates(names, query_of, np.arange(len(texts)), scores, None, None, texts)


def orders(candidates, scores) -> list[list[int]]:
    return [order.tolist() for _, order in rank_pairs(candidates, scores)]


@pytest.mark.parametrize("batch_size, tokens", [(1, 16384), (7, 16384), (256, 100), (256, 1), (3, 60)])
def test_scores_do_not_depend_on_batch_size_or_token_budget(model, tokenizer, batch_size, tokens):
    candidates = listed(tokenizer, 6, 10)
    usual = scorer(model, tokenizer).score_all(candidates)
    other = scorer(model, tokenizer, batch_size, tokens).score_all(candidates)
    assert usual.std() > 0.1 and np.abs(usual - other).max() < 1e-4
    assert orders(candidates, usual) == orders(candidates, other)


def test_out_of_memory_halves_the_budget_of_the_scorer(model, tokenizer, monkeypatch, capsys):
    candidates = listed(tokenizer, 3, 10)
    usual = scorer(model, tokenizer).score_all(candidates)

    class TooLittleMemory(torch.nn.Module):
        """The model on a device that has room for 150 tokens."""

        def forward(self, input_ids, *rest):
            if input_ids.numel() > 150:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return model(input_ids, *rest)

    monkeypatch.setattr(tokenization, "MIN_TOKENS_PER_BATCH", 10)
    one = scorer(TooLittleMemory(), tokenizer, tokens=1000)
    assert np.abs(one.score_all(candidates) - usual).max() < 1e-4
    assert one.tokens_per_batch == 125 and capsys.readouterr().err.count("halved to") == 3


def test_scores_do_not_depend_on_the_order_of_the_pairs(model, tokenizer):
    candidates = listed(tokenizer, 6, 10)
    usual = scorer(model, tokenizer).score_all(candidates)
    shuffled = np.random.default_rng(0).permutation(60)
    queries = [candidates.queries[at] for at in candidates.query_of[shuffled]]
    passages = [candidates.texts[at] for at in shuffled]
    one = scorer(model, tokenizer)
    assert np.abs(one.score(one.tokenize(queries, passages)) - usual[shuffled]).max() < 1e-4


def test_scores_are_those_of_each_pair_alone(model, tokenizer):
    candidates = listed(tokenizer, 2, 6)
    usual = scorer(model, tokenizer).score_all(candidates)
    for at in range(12):
        query = candidates.queries[candidates.query_of[at]]
        batch = tokenizer(query, candidates.texts[at], truncation="only_second", max_length=48)
        inputs = {name: torch.tensor([values]) for name, values in batch.items()}
        assert model.model(**inputs).logits.item() == pytest.approx(usual[at], abs=1e-4)


def test_chunks_are_joined_in_order(model, tokenizer, monkeypatch):
    candidates = listed(tokenizer, 5, 7)
    usual = scorer(model, tokenizer).score_all(candidates)
    monkeypatch.setattr("torch_src.retrieval.reranking.TOKENIZE_AHEAD", 4)
    monkeypatch.setattr("torch_src.retrieval.tokenizing.TOKENIZE_AHEAD", 4)
    chunks = list(scorer(model, tokenizer).score_candidates(candidates, [(3, 20), (20, 30)]))
    spans = [(3, 7), (7, 11), (11, 15), (15, 19), (19, 20), (20, 24), (24, 28), (28, 30)]
    assert [span for span, _, _ in chunks] == spans
    assert np.abs(np.concatenate([logits for _, logits, _ in chunks]) - usual[3:30]).max() < 1e-4
    assert np.abs(scorer(model, tokenizer).score_all(candidates) - usual).max() < 1e-4


def test_worker_processes_give_the_same_scores(model, tokenizer, monkeypatch):
    candidates, spans = listed(tokenizer, 5, 7), [(0, 20), (20, 35)]
    monkeypatch.setattr("torch_src.retrieval.tokenizing.TEXTS_PER_TASK", 7)
    usual, others = (
        list(scorer(model, tokenizer).score_candidates(candidates, spans, workers)) for workers in (0, 2)
    )
    assert [span for span, _, _ in usual] == [span for span, _, _ in others] == spans
    for (_, one, pairs), (_, other, again) in zip(usual, others, strict=True):
        assert one.tobytes() == other.tobytes() and pairs.cut == again.cut
        assert np.array_equal(pairs.ids, again.ids) and np.array_equal(pairs.types, again.types)


def test_logits_are_copied_once(model, tokenizer, host_copies):
    batches = []
    one = scorer(model, tokenizer, batch_size=4)
    queries, passages = listed(tokenizer, 2, 10).texts_of(list(range(20)))
    one.score(one.tokenize(queries, passages), lambda *batch: batches.append(batch))
    assert host_copies == ["cpu", "numpy"] and [pairs for pairs, _ in batches] == [4] * 5


def test_scoring_restores_the_mode_of_the_model_and_has_no_dropout(model, tokenizer):
    candidates = listed(tokenizer, 2, 5)
    usual = scorer(model, tokenizer).score_all(candidates)
    model.train()
    assert np.array_equal(scorer(model, tokenizer).score_all(candidates), usual) and model.training


def test_scores_that_are_not_finite_are_refused(model, tokenizer):
    with torch.no_grad():
        model.model.classifier.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        scorer(model, tokenizer).score_all(listed(tokenizer, 1, 3))


def test_scores_under_bf16_have_no_ties(model, tokenizer):
    candidates = listed(tokenizer, 4, 50)
    scores = scorer(model, tokenizer, precision="bf16").score_all(candidates)
    assert scores.dtype == np.float32 and len(np.unique(scores)) == 200


def test_pairs_are_padded_alike(tokenizer):
    texts = (["1", "1 1"], ["2", "2 2 2"], TextRules(32))
    pairs = pair_lists(tokenizer, *texts)
    table = tokenize_pairs(tokenizer, *texts)
    ids, mask, types = table.padded([1, 0], tokenizer.pad_token_id)
    assert mask.tolist() == [[1] * 8, [1] * 5 + [0] * 3]
    assert ids[1].tolist() == pairs.ids[0] + [tokenizer.pad_token_id] * 3
    assert types.tolist() == [[0] * 4 + [1] * 4, [0] * 3 + [1] * 2 + [0] * 3]


# ---- ranking and fusion


def three_queries(scores) -> Candidates:
    query_of = np.array([0, 0, 0, 0, 1, 2, 2], dtype=np.int32)
    scores = np.array(scores, dtype=np.float32)
    return Candidates(["甲", "乙", "丙"], query_of, np.arange(7), scores, None, None, [])


def test_pairs_are_ranked_by_score_and_ties_by_the_retrievers_rank():
    candidates = three_queries([9, 8, 7, 6, 5, 4, 3])
    scores = np.array([1, 2, 1, 2, 0, -1, -1], dtype=np.float32)
    assert orders(candidates, scores) == [[1, 3, 0, 2], [4], [5, 6]]
    assert orders(candidates, np.zeros(7, dtype=np.float32)) == [[0, 1, 2, 3], [4], [5, 6]]


def test_adjacent_floats_are_no_tie():
    scores = np.zeros(7, dtype=np.float32)
    scores[:2] = 1, np.nextafter(np.float32(1), np.float32(2))
    assert orders(three_queries([0] * 7), scores)[0] == [1, 0, 2, 3]


def test_fusion_with_weight_zero_gives_the_logits_themselves():
    logits = np.array([1, 2, 3, 4, 5, 6, 7], dtype=np.float32)
    assert fuse(three_queries([9, 8, 7, 6, 5, 4, 3]), logits, 0.0) is logits


def test_fusion_by_hand():
    """甲: mean 4, deviation 2; 乙: one candidate, nothing to add; 丙: equal scores, nothing to add."""
    candidates = three_queries([6, 2, 6, 2, 5, 3, 3])
    logits = np.array([0.5, 1.0, -1.0, 0.0, 0.25, 2.0, 1.0], dtype=np.float32)
    fused = fuse(candidates, logits, 1.0)
    assert fused.tolist() == [1.5, 0.0, 0.0, -1.0, 0.25, 2.0, 1.0] and fused.dtype == np.float32
    assert fuse(candidates, logits, 0.5).tolist() == [1.0, 0.5, -0.5, -0.5, 0.25, 2.0, 1.0]
    assert logits.tolist() == [0.5, 1.0, -1.0, 0.0, 0.25, 2.0, 1.0]  # the logits stay
    assert orders(candidates, fused)[0] == [0, 1, 2, 3]  # the tie of the second and third by rank


def test_the_encoder_starts_from_the_retrievers_passage_tower(tiny_config, tokenizer, tmp_path):
    dual = DualEncoder(BertModel(tiny_config, add_pooling_layer=False), False, "cls", False)
    with torch.no_grad():
        for parameter in dual.query_encoder.parameters():
            parameter.zero_()
    torch.save(dual.state_dict(), tmp_path / "dual_params.bin")
    cross = build_cross_encoder(tiny_config)
    pooler = cross.model.bert.pooler.dense.weight.clone()
    start_from_retriever(cross, str(tmp_path / "dual_params.bin"), "model", tokenizer)
    for name, value in dual.passage_encoder.state_dict().items():
        assert torch.equal(cross.model.bert.state_dict()[name], value), name
    assert torch.equal(cross.model.bert.pooler.dense.weight, pooler)


def test_the_encoder_starts_from_a_shared_encoder(tiny_config, tokenizer, tmp_path):
    dual = DualEncoder(BertModel(tiny_config, add_pooling_layer=False), True, "cls", False)
    torch.save(dual.stored_state(), tmp_path / "dual_params.bin")
    cross = build_cross_encoder(tiny_config)
    start_from_retriever(cross, str(tmp_path / "dual_params.bin"), "model", tokenizer)
    for name, value in dual.passage_encoder.state_dict().items():
        assert torch.equal(cross.model.bert.state_dict()[name], value), name


def test_weights_that_are_no_retriever_are_refused(tiny_config, tokenizer, tmp_path):
    cross = build_cross_encoder(tiny_config)
    torch.save(cross.model.state_dict(), tmp_path / "cross_params.bin")
    with pytest.raises(UserError, match="has no passage_encoder"):
        start_from_retriever(cross, str(tmp_path / "cross_params.bin"), "model", tokenizer)
    other = BertModel(BertConfig(**{**tiny_config.to_dict(), "hidden_size": 16}), add_pooling_layer=False)
    torch.save(DualEncoder(other, True, "cls", False).state_dict(), tmp_path / "dual_params.bin")
    with pytest.raises(UserError, match="dual_params.bin: .*shapes"):
        start_from_retriever(cross, str(tmp_path / "dual_params.bin"), "model", tokenizer)
    torch.save(torch.zeros(3), tmp_path / "tensor.bin")
    with pytest.raises(UserError, match="not a state dict"):
        start_from_retriever(cross, str(tmp_path / "tensor.bin"), "model", tokenizer)
