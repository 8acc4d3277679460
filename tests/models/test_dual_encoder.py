"""The dual encoder: pooling, towers, loading of model folders and of trained weights, what is refused."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from torch_src.hparams import POOLINGS
from torch_src.models.backbones import check_fits, load_config, load_weights, model_checksum
from torch_src.models.dual_encoder import DualEncoder, embed, load_backbone, pool
from torch_src.models.tokenization import TextRules
from torch_src.runtime.errors import UserError

IDS = torch.tensor([[2, 10, 11, 12, 3], [2, 20, 3, 0, 0], [2, 30, 31, 3, 0]])
MASK = (IDS != 0).long()


@pytest.fixture
def folder(tmp_path, tiny_bert):
    """A model folder with weights and without a pooling layer."""
    tiny_bert(1).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(path, pooling="cls", seed=0):
    return load_backbone(str(path), load_config(str(path)), pooling, seed)


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_pool_against_plain_sums():
    hidden = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pool(hidden, MASK, "cls"), hidden[:, 0])
    for at, length in enumerate((5, 3, 4)):
        expected = sum(hidden[at, position] for position in range(length)) / length
        assert torch.allclose(pool(hidden, MASK, "mean")[at], expected, atol=1e-6)
    assert pool(hidden.bfloat16(), MASK, "mean").dtype == torch.float32


def test_other_poolings_against_plain_loops():
    hidden = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    for skipped in (0, 1):
        found = {kind: pool(hidden, MASK, kind, skipped) for kind in POOLINGS if kind != "pooler"}
        for at, length in enumerate((5, 3, 4)):
            kept = range(skipped, length)
            states = hidden[at, skipped:length]
            weighted = sum((position + 1) * hidden[at, position] for position in kept)
            expected = {
                "cls": states[0], "lasttoken": states[-1], "mean": states.mean(0),
                "max": torch.stack([max(states[:, i]) for i in range(4)]),
                "mean_sqrt_len_tokens": states.sum(0) / len(kept) ** 0.5,
                "weightedmean": weighted / sum(position + 1 for position in kept),
            }  # fmt: skip
            for kind, value in expected.items():
                assert torch.allclose(found[kind][at], value, atol=1e-6), (kind, skipped)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("normalize", [False, True])
def test_padding_does_not_change_a_vector(tiny_bert, pooling, normalize):
    tower = tiny_bert(0, add_pooling_layer=True)
    with torch.inference_mode():
        batch = embed(tower, IDS, MASK, pooling, normalize)
        assert batch.shape == (3, 32) and batch.dtype == torch.float32
        for at, length in enumerate((5, 3, 4)):
            alone = embed(tower, IDS[at : at + 1, :length], MASK[at : at + 1, :length], pooling, normalize)
            assert (batch[at] - alone[0]).abs().max() < 1e-5
    assert (batch[0] - batch[1]).abs().max() > 0.1  # other texts have other vectors
    lengths = batch.norm(dim=1)
    assert torch.allclose(lengths, torch.ones(3), atol=1e-5) == normalize


def test_poolings_differ(tiny_bert):
    tower = tiny_bert(0, add_pooling_layer=True)
    with torch.inference_mode():
        cls, mean, pooler = (embed(tower, IDS, MASK, kind, False) for kind in ("cls", "mean", "pooler"))
        assert torch.allclose(pooler, tower.pooler(tower(IDS, attention_mask=MASK)[0]), atol=1e-6)
    assert (cls - mean).abs().max() > 0.1 and (cls - pooler).abs().max() > 0.1


def test_shared_towers_are_one_and_separate_towers_start_equal(tiny_bert):
    backbone = tiny_bert()
    count = sum(p.numel() for p in backbone.parameters())
    shared = DualEncoder(tiny_bert(), True, "cls", False)
    assert shared.tower("query") is shared.tower("passage")
    assert sum(p.numel() for p in shared.parameters()) == count
    apart = DualEncoder(backbone, False, "cls", False).eval()
    assert sum(p.numel() for p in apart.parameters()) == 2 * count
    assert same_weights(apart.tower("query"), apart.tower("passage"))
    ids = {id(p) for p in apart.tower("query").parameters()}
    assert not ids & {id(p) for p in apart.tower("passage").parameters()}
    before = apart("passage", IDS, MASK)
    with torch.no_grad():
        apart.tower("query").embeddings.word_embeddings.weight.add_(1.0)
    assert torch.equal(apart("passage", IDS, MASK), before)
    assert not torch.allclose(apart("query", IDS, MASK), before)


def test_dropout_option_replaces_every_probability(folder):
    config = load_config(str(folder), dropout=0.0)
    assert config.hidden_dropout_prob == config.attention_probs_dropout_prob == 0.0
    assert load_config(str(folder)).hidden_dropout_prob == 0.1


def test_loads_its_own_weights(folder, tiny_bert):
    assert same_weights(load(folder), tiny_bert(1))
    assert same_weights(load(folder, "mean"), tiny_bert(1))


def test_fp16_file_is_loaded_as_fp32(folder, tiny_bert):
    tiny_bert(1).half().save_pretrained(folder)
    assert load_file(folder / "model.safetensors")["embeddings.word_embeddings.weight"].dtype == torch.float16
    model = load(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert same_weights(model, tiny_bert(1).half().float())


def test_missing_config_or_folder(tmp_path, folder):
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="model: contains no config.json"):
        load_config(str(folder))
    with pytest.raises(UserError, match="nowhere: no such folder"):
        load_config(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("text", ["", "{", '{"model_type": "no such kind"}', "{}"])
def test_unreadable_config(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match="model: .*configuration"):
        load_config(str(folder))


def test_missing_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model: contains no weights"):
        load(folder)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights(folder, keep):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(UserError, match="model: the weights cannot be read"):
        load(folder)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_truncated_pickle_weights(folder, keep, tiny_bert):
    torch.save(tiny_bert(1).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert same_weights(load(folder), tiny_bert(1))
    data = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(UserError, match="model: the weights cannot be read"):
        load(folder)


def test_an_index_without_one_of_its_shards(folder):
    state = load_file(folder / "model.safetensors")
    names = sorted(state)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for part, held in parts.items():
        save_file({name: state[name] for name in held}, folder / part, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: part for part, held in parts.items() for name in held}}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    load(folder)
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(UserError, match="model: the weights cannot be read"):
        load(folder)


def test_weights_that_lack_a_part_or_have_another_shape(folder):
    # copies: the loaded tensors may still be mapped to the file that is replaced
    state = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    first = state.pop("encoder.layer.1.output.dense.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="1 weights are missing.*layer.1.output.dense"):
        load(folder)
    state["encoder.layer.1.output.dense.weight"] = first[:, :-1].contiguous()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="model: "):
        load(folder)


def test_pooler_needs_trained_pooler_weights(folder, tmp_path, tiny_bert):
    with pytest.raises(UserError, match=r"--pooling pooler: .*has no trained pooling layer \(pooler\."):
        load(folder, "pooler")
    tiny_bert(1, add_pooling_layer=True).save_pretrained(tmp_path / "with")
    assert same_weights(load(tmp_path / "with", "pooler"), tiny_bert(1, add_pooling_layer=True))
    assert load(tmp_path / "with", "cls").pooler is None


def small(name, **more):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return getattr(transformers, name)(vocab_size=99, **sizes, **more)


def test_cls_of_a_decoder_is_refused_and_its_last_token_is_pooled(tmp_path):
    config = small("Qwen2Config", num_key_value_heads=2)
    tower = transformers.Qwen2Model(config).eval()
    tower.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="--pooling cls: .*decoder"):
        load(tmp_path, "cls")
    loaded = load(tmp_path, "lasttoken").eval()
    with torch.inference_mode():
        found = embed(loaded, IDS, MASK, "lasttoken", False)
        for at, length in enumerate((5, 3, 4)):
            assert torch.allclose(found[at], tower(IDS[at : at + 1, :length])[0][0, -1], atol=1e-5)


def test_the_encoder_of_t5_is_loaded_without_its_decoder(tmp_path):
    config = transformers.T5Config(vocab_size=99, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    whole = transformers.T5Model(config).eval()
    whole.save_pretrained(tmp_path)
    with torch.inference_mode():
        expected = whole.encoder(IDS, attention_mask=MASK)[0]
        found = load(tmp_path, "mean").eval()(input_ids=IDS, attention_mask=MASK)[0]
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(("made", "named"), [
    (lambda: transformers.BartConfig(vocab_size=99, d_model=16), "bart"),
    (lambda: transformers.CLIPConfig(), "clip"), (lambda: transformers.ChineseCLIPConfig(), "chinese_clip"),
    (lambda: transformers.Qwen3VLConfig(), "qwen3_vl"),
    (lambda: transformers.DPRQuestionEncoder(small("DPRConfig")), "dpr"),
])  # fmt: skip
def test_other_kinds_of_models_are_refused_by_name(tmp_path, made, named):
    made().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"a {named} model is not supported"):
        load(tmp_path, "mean")


def test_a_model_whose_vectors_depend_on_padding_is_named(tmp_path, capsys):
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}
    transformers.FNetModel(transformers.FNetConfig(**sizes)).save_pretrained(tmp_path / "fnet")
    load(tmp_path / "fnet", "mean")
    assert "padding changes the vectors" in capsys.readouterr().err
    transformers.BertModel(small("BertConfig")).save_pretrained(tmp_path / "bert")
    load(tmp_path / "bert", "mean")
    assert "padding" not in capsys.readouterr().err


def test_an_adapter_is_refused_with_its_base_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    with pytest.raises(UserError, match="an adapter .* of owner/base"):
        load_config(str(tmp_path))


def test_pooler_of_a_kind_without_one(tmp_path):
    config = transformers.DistilBertConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=64)
    transformers.DistilBertModel(config).save_pretrained(tmp_path)
    assert load(tmp_path, "mean").config.dim == 32
    with pytest.raises(UserError, match="--pooling pooler: a distilbert model has no pooling layer"):
        load(tmp_path, "pooler")


@pytest.mark.parametrize("share", [True, False])
def test_state_dict_round_trip(tmp_path, tiny_bert, share):
    saved = DualEncoder(tiny_bert(1), share, "cls", False).eval()
    if not share:
        saved.passage_encoder.load_state_dict(tiny_bert(2).state_dict())
    torch.save(saved.state_dict(), tmp_path / "dual_params.bin")
    other = DualEncoder(tiny_bert(5), share, "cls", False).eval()
    load_weights(str(tmp_path / "dual_params.bin"), other, "do_dual_train.py")
    assert same_weights(other, saved)
    for side in ("query", "passage"):
        assert torch.equal(other(side, IDS, MASK), saved(side, IDS, MASK))
    assert torch.equal(other("query", IDS, MASK), other("passage", IDS, MASK)) == share


def test_a_shared_encoder_is_stored_once_and_its_copies_must_agree(tmp_path, tiny_bert):
    saved, path = DualEncoder(tiny_bert(1), True, "cls", False), tmp_path / "dual_params.bin"
    stored = saved.stored_state()
    assert len(stored) == len(saved.query_encoder.state_dict()) == len(saved.state_dict()) / 2
    other_names = {name.replace("query_encoder", "passage_encoder"): v for name, v in stored.items()}
    for state in (stored, saved.state_dict(), other_names):
        other = DualEncoder(tiny_bert(5), True, "cls", False)
        torch.save(state, path)
        load_weights(str(path), other, "do_dual_train.py")
        assert same_weights(other, saved)
    name = "embeddings.LayerNorm.weight"
    for side in ("query", "passage"):
        both = {key: value.clone() for key, value in saved.state_dict().items()}
        both[f"{side}_encoder.{name}"][0] += 1
        torch.save(both, path)
        with pytest.raises(UserError, match=f"dual_params.bin: .*{name} has two different copies"):
            load_weights(str(path), DualEncoder(tiny_bert(5), True, "cls", False), "do_dual_train.py")
    apart = DualEncoder(tiny_bert(1), False, "cls", False)
    assert list(apart.stored_state()) == list(apart.state_dict())


def test_weights_of_another_model_are_refused(tmp_path, tiny_bert, tiny_config):
    from transformers import BertModel

    model, path = DualEncoder(tiny_bert(), False, "cls", False), tmp_path / "dual_params.bin"
    wider = DualEncoder(tiny_bert(0, add_pooling_layer=True), False, "pooler", False)
    tiny_config.num_hidden_layers = 1
    shallow = DualEncoder(BertModel(tiny_config, add_pooling_layer=False), False, "cls", False)
    tiny_config.intermediate_size = 48
    narrow = DualEncoder(BertModel(tiny_config, add_pooling_layer=False), False, "cls", False)
    for state in (wider.state_dict(), shallow.state_dict(), narrow.state_dict(), {}, [1, 2], 3, None):
        torch.save(state, path)
        with pytest.raises(UserError, match="dual_params.bin: weights of another model"):
            load_weights(str(path), model, "do_dual_train.py")


def test_truncated_or_missing_weights_file(tmp_path, tiny_bert):
    model, path = DualEncoder(tiny_bert(), True, "cls", False), tmp_path / "dual_params.bin"
    with pytest.raises(UserError, match="dual_params.bin: no such file.*do_dual_train.py"):
        load_weights(str(path), model, "do_dual_train.py")
    torch.save(model.state_dict(), path)
    data = path.read_bytes()
    for keep in (0, 1, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:keep])
        with pytest.raises(UserError, match="dual_params.bin: damaged"):
            load_weights(str(path), model, "do_dual_train.py")


def test_weights_that_would_run_code_are_refused(tmp_path, tiny_bert):
    torch.save({"a": Exploding(tmp_path / "ran")}, tmp_path / "dual_params.bin")
    with pytest.raises(UserError, match="dual_params.bin: damaged"):
        tied = DualEncoder(tiny_bert(), True, "cls", False)
        load_weights(str(tmp_path / "dual_params.bin"), tied, "do_dual_train.py")
    assert not (tmp_path / "ran").exists()


class Exploding:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_vocabulary_and_positions_must_fit(tiny_config):
    tokens = range(tiny_config.vocab_size)  # without a prefix only its length is used
    check_fits(tiny_config, tokens, {"q_max_seq_len": TextRules(64), "p_max_seq_len": TextRules(64)}, "m")
    with pytest.raises(UserError, match="m: .*2,559 tokens.* 2,558"):
        check_fits(tiny_config, range(tiny_config.vocab_size + 1), {}, "m")
    with pytest.raises(UserError, match=r"--p_max_seq_len 65: .* 64 positions of m; .* 64 or less"):
        check_fits(tiny_config, tokens, {"q_max_seq_len": TextRules(8), "p_max_seq_len": TextRules(65)}, "m")


def test_the_tokens_of_the_prefix_need_positions_as_well(tiny_config, tokenizer):
    check_fits(tiny_config, tokenizer, {"q_max_seq_len": TextRules(61, "水油鱼")}, "m")
    with pytest.raises(UserError, match=r"--q_max_seq_len 62: .* 64 positions of m; .* 61 or less"):
        check_fits(tiny_config, tokenizer, {"q_max_seq_len": TextRules(62, "水油鱼")}, "m")


@pytest.mark.parametrize("name", ["RobertaConfig", "CamembertConfig", "MPNetConfig", "XLMRobertaConfig"])
def test_roberta_and_others_have_two_positions_less(name):
    config = getattr(transformers, name)(max_position_embeddings=66)
    check_fits(config, range(10), {"q_max_seq_len": TextRules(64)}, "m")
    with pytest.raises(UserError, match=r"--q_max_seq_len 65: .* 64 positions of m"):
        check_fits(config, range(10), {"q_max_seq_len": TextRules(65)}, "m")


def test_checksum_follows_the_content(folder, tiny_bert):
    first = model_checksum(str(folder))
    tiny_bert(1).save_pretrained(folder)
    assert model_checksum(str(folder)) == first
    tiny_bert(2).save_pretrained(folder)
    assert model_checksum(str(folder)) != first
