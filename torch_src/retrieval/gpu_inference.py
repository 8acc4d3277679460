"""An encoder or scorer set up for a GPU: weights in bf16, forward passes as large as its memory allows."""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from torch_src.models.cross_encoder import Float32Linear
from torch_src.models.dual_encoder import LAYERS
from torch_src.retrieval.encoding import Encoder
from torch_src.retrieval.engines.openvino import smallest_cosine
from torch_src.retrieval.reranking import PairScorer
from torch_src.runtime.devices import available_gpu_memory
from torch_src.runtime.errors import first_line
from torch_src.runtime.log import log

MIN_COSINE = 0.999  # of a probe's vectors with weights in bf16 and under autocast
LOGIT_TOLERANCE = 0.05  # difference of a probe's logits, relative to 1 + the largest of them
MIN_TOKENS, MAX_TOKENS = 32768, 131072  # padded, in a forward pass
ACTIVATION_FRACTION = 0.5  # of the free memory, for the activations of a forward pass
QUESTIONS = ("银杏从小苗到挂果得等多少年", "How many moons does Mars have?")
PASSAGES = (
    "水",
    "银杏生长较慢，在自然条件下从栽种到结果要二十多年，四十年后才能大量结果，因此又称公孙树。",
    "Mars has two small natural satellites, Phobos and Deimos, which were discovered in August 1877.",
    "火星有两颗卫星，都很小，形状不规则，距离火星很近。" * 12,
)

Inference = TypeVar("Inference", Encoder, PairScorer)


def encoder_on_gpu(encoder: Encoder, name: str = "encoder") -> Encoder:
    """Return the encoder as it runs fastest on its device; on a CPU unchanged. The tower may be converted.

    name: for the log.
    """
    if encoder.device.type != "cuda":
        return encoder
    return _largest_passes(encoder_in_bf16(encoder), encoder.tower.config, name)


def scorer_on_gpu(scorer: PairScorer) -> PairScorer:
    """Return the scorer as it runs fastest on its device; on a CPU unchanged. The model may be converted."""
    if scorer.device.type != "cuda":
        return scorer
    return _largest_passes(scorer_in_bf16(scorer), scorer.model.model.config, "re-ranker")


# Weights in bf16: no casts in a forward pass, half the memory traffic


def encoder_in_bf16(encoder: Encoder) -> Encoder:
    """Return the encoder with its tower converted in place; unchanged unless the precision is bf16."""
    table = encoder.tokenize([*QUESTIONS, *PASSAGES])

    def difference(one: np.ndarray, other: np.ndarray) -> str:
        cosine = smallest_cosine(one, other)
        return "" if cosine >= MIN_COSINE else f"cosine {cosine:.4f} with the vectors of autocast"

    return _in_bf16(encoder, encoder.tower, lambda encoder: encoder.encode_tokens(table), difference)


def scorer_in_bf16(scorer: PairScorer) -> PairScorer:
    """Return the scorer with its model converted in place; unchanged unless the precision is bf16."""
    pairs = scorer.tokenize([question for question in QUESTIONS for _ in PASSAGES], [*PASSAGES] * 2)

    def difference(one: np.ndarray, other: np.ndarray) -> str:
        largest = np.abs(one - other).max()
        limit = LOGIT_TOLERANCE * (1 + np.abs(other).max())
        return "" if largest <= limit else f"logits differ by {largest:.3f} from those of autocast"

    return _in_bf16(scorer, scorer.model.model.base_model, lambda scorer: scorer.score(pairs), difference)


def _in_bf16(
    inference: Inference,
    model: PreTrainedModel,
    results: Callable[[Inference], np.ndarray],
    difference: Callable[[np.ndarray, np.ndarray], str],
) -> Inference:
    """Return `inference` with the weights of `model` in bf16, or as it was where its results differ."""
    if inference.precision != "bf16":
        return inference
    converted = replace(inference, bf16_weights=True)
    if model.dtype == torch.bfloat16:
        return converted  # a tower of both sides
    expected, weights = results(inference), _convertible(model)
    try:
        for parameter, values in weights:
            parameter.data = values.to(torch.bfloat16)
        reason = difference(results(converted), expected)
    except (RuntimeError, ValueError, TypeError) as error:  # e.g. a layer that needs its inputs in fp32
        reason = first_line(error)[:150]
    if not reason:
        return converted
    for parameter, values in weights:
        parameter.data = values
    log(f"weights in bf16 are not usable for this model ({reason}); autocast is used")
    return inference


def _convertible(model: PreTrainedModel) -> list[tuple[nn.Parameter, Tensor]]:
    """Return the parameters to convert and their fp32 values.

    Layers after the pooling and those of a head stay in fp32, and buffers: inverse frequencies of rotary
    positions would lose digits.
    """
    layers: list[nn.Module] = [layer for layer in model.modules() if isinstance(layer, Float32Linear)]
    layers.append(getattr(model, LAYERS, nn.Identity()))
    kept = {id(parameter) for layer in layers for parameter in layer.parameters()}
    parameters = [p for p in model.parameters() if p.dtype == torch.float32 and id(p) not in kept]
    return [(parameter, parameter.data) for parameter in parameters]


# Size of a forward pass


def _largest_passes(inference: Inference, config: PretrainedConfig, name: str) -> Inference:
    """Return `inference` with the token budget that the free memory of the GPU allows; logs it."""
    free = available_gpu_memory(inference.device)
    element = 2 if inference.bf16_weights else 4
    length = inference.rules.max_tokens(inference.tokenizer)
    tokens = tokens_that_fit(free, activation_bytes(config, length, element))
    weights = "weights in bf16" if inference.bf16_weights else inference.precision
    free_gb = f"{free / 1e9:.1f} GB of GPU memory free"
    log(f"{name}: {weights}; at most {tokens:,} tokens per forward pass ({free_gb})")
    return replace(inference, tokens_per_batch=tokens)


def tokens_that_fit(free: int, bytes_per_token: int) -> int:
    """Return the padded tokens of a forward pass, a power of two, for this many bytes of free memory."""
    fitting = max(1, int(ACTIVATION_FRACTION * free) // bytes_per_token)
    return min(MAX_TOKENS, max(MIN_TOKENS, 1 << fitting.bit_length() - 1))


def activation_bytes(config: PretrainedConfig, length: int, element: int) -> int:
    """Return an upper estimate of the bytes that are in use at once for one token of a forward pass.

    For texts of `length` tokens and numbers of `element` bytes: the residual stream and what attention and
    feed-forward layer hold of it, the mask of a token, and without a fused kernel its scores in each head.
    """
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    numbers = 8 * hidden + 3 * inner + 2 * length
    if getattr(config, "_attn_implementation", None) == "eager":
        numbers += 3 * config.num_attention_heads * length
    return element * numbers
