"""What only a GPU gets, tried on a CPU: weights in bf16 where results agree, the size of forward passes."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    DebertaV2Config,
    LlamaConfig,
    ModernBertConfig,
    RobertaConfig,
    T5Config,
)

from torch_src.models.cross_encoder import build_cross_encoder
from torch_src.models.dual_encoder import LAYERS, build_backbone, embed
from torch_src.models.tokenization import TextRules
from torch_src.retrieval import gpu_inference
from torch_src.retrieval.encoding import Encoder
from torch_src.retrieval.engines.openvino import smallest_cosine
from torch_src.retrieval.gpu_inference import (
    PASSAGES,
    QUESTIONS,
    activation_bytes,
    encoder_in_bf16,
    encoder_on_gpu,
    scorer_in_bf16,
    scorer_on_gpu,
    tokens_that_fit,
)
from torch_src.retrieval.reranking import PairScorer
from torch_src.runtime.devices import autocast

CPU = torch.device("cpu")
TEXTS = ["", *QUESTIONS, *PASSAGES]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
CONFIGS = {
    "bert": lambda **more: BertConfig(**SIZES, **more),
    "roberta": lambda **more: RobertaConfig(**SIZES, **more, max_position_embeddings=200),
    "modernbert": lambda **more: ModernBertConfig(**SIZES, **more, global_attn_every_n_layers=2),
    "deberta": lambda **more: DebertaV2Config(**SIZES, **more, relative_attention=True),
    "llama": lambda **more: LlamaConfig(**SIZES, **more),
    "t5": lambda **more: T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, **more),
}


def config_of(family, tokenizer):
    ids = {"pad_token_id": tokenizer.pad_token_id, "cls_token_id": 2, "sep_token_id": 3}
    return CONFIGS[family](vocab_size=len(tokenizer), **ids)


def build_encoder(tokenizer, family, precision="bf16", pooling="mean", device=CPU):
    torch.manual_seed(0)
    tower = build_backbone(config_of(family, tokenizer), pooling).eval().to(device)
    return Encoder(tower, tokenizer, TextRules(120), pooling, False, device, precision, 64, 4096)


def build_scorer(tokenizer, family, precision="bf16", device=CPU):
    torch.manual_seed(0)
    model = build_cross_encoder(config_of(family, tokenizer)).eval().to(device)
    return PairScorer(model, tokenizer, TextRules(120), device, precision, 64, 4096)


def masked_row_states(encoder):
    """Return the vectors of three rows; all tokens of the second are masked."""
    ids = torch.full((3, 5), 7, device=encoder.device)
    mask = torch.tensor([[1] * 5, [0] * 5, [1] * 2 + [0] * 3], device=encoder.device)
    with torch.inference_mode(), autocast(encoder.device, encoder.precision):
        return embed(encoder.tower, ids, mask, "cls", False).cpu()


@pytest.fixture
def make_encoder(tokenizer):
    return partial(build_encoder, tokenizer)


@pytest.fixture
def make_scorer(tokenizer):
    return partial(build_scorer, tokenizer)


def dtypes(model):
    return {parameter.dtype for parameter in model.parameters()}


@pytest.mark.parametrize("family", CONFIGS)
def test_an_encoder_in_bf16_gives_the_vectors_of_fp32(make_encoder, family):
    expected = make_encoder(family, precision="fp32").encode(TEXTS)
    encoder = encoder_in_bf16(make_encoder(family))
    assert encoder.bf16_weights and dtypes(encoder.tower) == {torch.bfloat16}
    vectors = encoder.encode(TEXTS)
    assert vectors.dtype == np.float32 and smallest_cosine(vectors, expected) > 0.999


@pytest.mark.parametrize("family", [family for family in CONFIGS if family != "t5"])
def test_a_scorer_in_bf16_gives_the_logits_of_fp32(make_scorer, family):
    texts = ([QUESTIONS[0]] * 5, ["", *PASSAGES])
    plain = make_scorer(family, precision="fp32")
    expected = plain.score(plain.tokenize(*texts))
    scorer = scorer_in_bf16(make_scorer(family))
    assert scorer.bf16_weights and dtypes(scorer.model) == {torch.bfloat16, torch.float32}  # the head
    logits = scorer.score(scorer.tokenize(*texts))
    assert logits.dtype == np.float32 and np.abs(logits - expected).max() < 0.05


def test_layers_after_the_pooling_and_buffers_stay_in_fp32(make_encoder):
    encoder = make_encoder("llama")
    setattr(encoder.tower, LAYERS, torch.nn.Linear(32, 32))
    buffers = {name: values.clone() for name, values in encoder.tower.named_buffers()}
    assert encoder_in_bf16(encoder).bf16_weights and buffers
    assert dtypes(getattr(encoder.tower, LAYERS)) == {torch.float32}
    for name, values in encoder.tower.named_buffers():
        assert torch.equal(values, buffers[name]) and values.dtype == buffers[name].dtype


def test_a_tower_of_both_sides_is_converted_once(make_encoder, monkeypatch):
    encoder = make_encoder("bert")
    one = encoder_in_bf16(encoder)
    monkeypatch.setattr(Encoder, "encode_tokens", None)  # no second probe
    assert encoder_in_bf16(replace(encoder, rules=TextRules(8))).bf16_weights and one.bf16_weights


@pytest.mark.parametrize("kind", ["encoder", "scorer"])
@pytest.mark.parametrize("failure", ["differs", "raises"])
def test_other_results_leave_the_model_unchanged(
    make_encoder, make_scorer, monkeypatch, capsys, kind, failure
):
    inference = make_encoder("bert") if kind == "encoder" else make_scorer("bert")
    convert = encoder_in_bf16 if kind == "encoder" else scorer_in_bf16
    model = inference.tower if kind == "encoder" else inference.model
    before = {name: values.clone() for name, values in model.state_dict().items()}
    if failure == "differs":
        monkeypatch.setattr(gpu_inference, "MIN_COSINE", 1.01)
        monkeypatch.setattr(gpu_inference, "LOGIT_TOLERANCE", -1.0)
    else:
        layer = next(module for module in model.modules() if isinstance(module, torch.nn.LayerNorm))
        layer.register_forward_hook(lambda _, inputs, output: output.float())  # bf16 weights cannot follow
    assert convert(inference) is inference and not inference.bf16_weights
    after = model.state_dict()
    assert all(torch.equal(values, after[name]) for name, values in before.items())
    assert dtypes(model) == {torch.float32} and capsys.readouterr().out.count("autocast is used") == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_masked_row_does_not_disturb_the_others(make_encoder, family, precision):
    vectors = masked_row_states(make_encoder(family, precision))
    # T5 has no masked rows: its tokenizer ends every text with a token. Up to torch 2.11 they are NaN.
    assert (vectors[[0, 2]] if family == "t5" else vectors).isfinite().all()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_other_precisions_keep_their_weights(make_encoder, precision):
    encoder = make_encoder("bert", precision=precision)
    assert encoder_in_bf16(encoder) is encoder and dtypes(encoder.tower) == {torch.float32}


def test_nothing_changes_on_a_cpu(make_encoder, make_scorer):
    encoder, scorer = make_encoder("bert"), make_scorer("bert")
    assert encoder_on_gpu(encoder) is encoder and scorer_on_gpu(scorer) is scorer
    assert dtypes(encoder.tower) == dtypes(scorer.model) == {torch.float32}


@pytest.mark.parametrize("build", [build_encoder, build_scorer])
def test_the_size_of_passes_is_set_and_logged(tokenizer, monkeypatch, capsys, build):
    inference = build(tokenizer, "bert", "fp32")
    inference.device = torch.device("cuda", 0)  # nothing is computed
    monkeypatch.setattr(gpu_inference, "available_gpu_memory", lambda device: 3e9)
    if build is build_encoder:
        name, on_gpu = "query encoder", encoder_on_gpu(inference, "query encoder")
    else:
        name, on_gpu = "re-ranker", scorer_on_gpu(inference)
    config = config_of("bert", tokenizer)
    config._attn_implementation = "sdpa"
    fits = 1.5e9 / activation_bytes(config, 120, 4)
    assert on_gpu.tokens_per_batch == min(131072, 2 ** int(np.log2(fits))) and not on_gpu.bf16_weights
    printed = capsys.readouterr().out
    assert (
        f"{name}: " in printed and f"{on_gpu.tokens_per_batch:,} tokens per forward pass (3.0 GB" in printed
    )


def test_forward_passes_follow_the_free_memory():
    per_token = 50_000
    sizes = [tokens_that_fit(int(gb * 1e9), per_token) for gb in (0.0, 1.0, 6.0, 7.0, 13.0, 14.0, 140.0)]
    assert sizes == [32768, 32768, 32768, 65536, 65536, 131072, 131072]


def test_bytes_of_a_token(tokenizer):
    base = BertConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    base._attn_implementation = "sdpa"
    assert activation_bytes(base, 384, 2) == 2 * (8 * 768 + 3 * 3072 + 2 * 384)
    base._attn_implementation = "eager"
    assert activation_bytes(base, 384, 4) == 4 * (8 * 768 + 3 * 3072 + 2 * 384 + 3 * 12 * 384)
    assert activation_bytes(config_of("t5", tokenizer), 100, 2) > 0
