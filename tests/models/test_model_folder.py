"""What model folders say: pooling, layers, similarity, prompts, lengths; what is refused by name."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from toy_folders import PACKAGE, write_dense, write_json, write_modules

from torch_src import dual_train, inference
from torch_src.inference_de_hparams import InferenceDeHparams
from torch_src.models import hub
from torch_src.models.backbones import folder_settings, load_config, model_checksum
from torch_src.models.dual_encoder import embed, load_backbone, load_query_backbone, vector_width
from torch_src.models.hub import is_hub_name
from torch_src.models.model_folder import is_decoder, read_model_folder
from torch_src.models.tokenization import (
    TextRules,
    count_prompt_tokens,
    exclude_prompt,
    load_tokenizer,
    tokenize,
)
from torch_src.runtime.errors import UserError

IDS = torch.tensor([[2, 10, 11, 12, 3], [2, 20, 3, 0, 0]])
MASK = (IDS != 0).long()


@pytest.fixture
def folder(tmp_path, tiny_bert, tokenizer):
    """A folder with weights and tokenizer, without modules.json."""
    tiny_bert(1).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def vectors(path, pooling, normalize=False, side="passage", skipped=0):
    tower = load_backbone(str(path), load_config(str(path)), pooling, 0, side).eval()
    with torch.inference_mode():
        return embed(tower, IDS, MASK, pooling, normalize, skipped)


@pytest.mark.parametrize(("config", "expected"), [
    ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
    ({"pooling_mode_mean_tokens": True}, "mean"), ({"pooling_mode": "cls"}, "cls"),
    ({"pooling_mode_max_tokens": True}, "max"), ({"pooling_mode": "lasttoken"}, "lasttoken"),
    ({"pooling_mode_weightedmean_tokens": True}, "weightedmean"), ({"pooling_mode": ["mean"]}, "mean"),
    ({"pooling_mode_mean_sqrt_len_tokens": True}, "mean_sqrt_len_tokens"), ({}, None),
    ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, None),
    ({"pooling_mode": ["cls", "max"]}, None), ({"pooling_mode": "attention"}, None),
])  # fmt: skip
def test_poolings_of_foreign_folders(tmp_path, config, expected):
    write_modules(tmp_path, config)
    if expected is None:
        with pytest.raises(UserError, match="1_Pooling/config.json: pooling .* is not supported"):
            read_model_folder(str(tmp_path)).knobs()
    else:
        assert read_model_folder(str(tmp_path)).knobs() == {"pooling": expected, "normalize": True}


@pytest.mark.parametrize(("similarity", "after", "expected"), [
    ("cosine", (), True), ("cosine", ("Normalize",), True), (None, (), True), ("dot", (), False),
    ("dot", ("Normalize",), True), ("euclidean", ("Normalize",), True), ("euclidean", (), None),
    ("manhattan", ("Normalize",), None),
])  # fmt: skip
def test_similarity_decides_whether_vectors_are_normalized(tmp_path, similarity, after, expected):
    write_modules(tmp_path, after=after, similarity_fn_name=similarity)
    if expected is None:
        with pytest.raises(UserError, match=f"similarity_fn_name {similarity} is not supported"):
            read_model_folder(str(tmp_path)).knobs()
    else:
        assert read_model_folder(str(tmp_path)).knobs()["normalize"] is expected


def test_prompts_belong_to_queries_and_passages(tmp_path, folder, capsys):
    prompts = {"query": "问：", "passage": "文：", "document": "档：", "sts": "x"}
    write_modules(folder, prompts=prompts)
    own = folder_settings(str(folder))
    assert (own["query_prefix"], own["passage_prefix"]) == ("问：", "档：")
    assert "sts" in capsys.readouterr().err


@pytest.mark.parametrize(("lengths", "inference", "training"), [
    ({"max_seq_length": 20}, (20, 20), (20, 20)),
    ({"max_seq_length": 60, "query_length": 50, "document_length": 60}, (50, 60), (50, 60)),
    ({"max_seq_length": 9000}, (64, 64), (32, 64)), (None, (40, 40), (32, 40)),
])  # fmt: skip
def test_lengths_of_the_folder(folder, lengths, inference, training):
    """Training takes a general limit as the longest text, its own recipe's length as the usual one."""
    write_modules(folder, lengths=lengths)
    stated = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", {**stated, "model_max_length": 40})
    own = folder_settings(str(folder))
    assert (own["q_max_seq_len"], own["p_max_seq_len"]) == inference
    hp = dual_train.settings(["--pretrained_model_path", str(folder)])
    assert (hp.q_max_seq_len, hp.p_max_seq_len) == training
    words = ["--pretrained_model_path", str(folder), "--p_max_seq_len", "11"]
    assert dual_train.settings(words).p_max_seq_len == 11


def test_a_folder_without_modules_sets_nothing_but_the_pooling_of_a_decoder(folder, tmp_path):
    from transformers import BertConfig, Qwen3Config

    assert read_model_folder(str(folder)).knobs() == folder_settings(str(folder)) == {}
    config = Qwen3Config(vocab_size=9, hidden_size=8, num_attention_heads=1)
    config.save_pretrained(tmp_path / "decoder")
    assert folder_settings(str(tmp_path / "decoder")) == {"pooling": "lasttoken"}
    assert is_decoder(BertConfig(is_decoder=True)) and not is_decoder(BertConfig())
    config.use_bidirectional_attention = True
    assert not is_decoder(config)


@pytest.mark.parametrize(("kind", "path"), [
    ("StaticEmbedding", ""), ("WordEmbeddings", ""), ("CLIPModel", ""), ("WeightedLayerPooling", "1_W"),
    ("LSTM", "1_L"), ("CNN", "1_C"),
])  # fmt: skip
def test_other_modules_are_refused_by_name(folder, kind, path):
    modules = [] if path == "" else [{"type": f"{PACKAGE}.Transformer", "path": ""}]
    write_json(folder / "modules.json", [*modules, {"type": f"{PACKAGE}.{kind}", "path": path}])
    with pytest.raises(UserError, match=f"modules.json: the module {kind} is not supported"):
        folder_settings(str(folder))


@pytest.mark.parametrize("order", [
    ("Pooling", "Transformer"), ("Transformer",), ("Transformer", "Normalize"),
    ("Transformer", "Dense", "Pooling"), ("Transformer", "Pooling", "Transformer"),
])  # fmt: skip
def test_modules_in_another_order_are_refused(folder, order):
    modules = [{"type": f"{PACKAGE}.{kind}", "path": f"{at}_{kind}"} for at, kind in enumerate(order)]
    write_json(folder / "modules.json", modules)
    with pytest.raises(UserError, match=f"modules.json: the order {', '.join(order)}"):
        read_model_folder(str(folder)).knobs()


def test_a_module_with_its_own_code_is_refused(folder):
    write_modules(folder)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["type"] = "custom_st.Transformer"
    write_json(folder / "modules.json", modules)
    with pytest.raises(UserError, match="custom_st.Transformer needs its own code"):
        read_model_folder(str(folder)).knobs()


@pytest.mark.parametrize(("name", "value"), [
    ("auto_map", {"AutoModel": "modeling_x.Model"}),
    ("auto_map", {"AutoConfig": "owner/name--configuration_x.Config"}),
])  # fmt: skip
def test_a_model_with_its_own_code_is_refused(folder, name, value):
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, name: value})
    for kind in ("dual", "cross"):
        with pytest.raises(UserError, match="config.json: auto_map .*_x"):
            load_config(str(folder), kind=kind)
    write_json(folder / "config.json", config)
    stated = json.loads((folder / "tokenizer_config.json").read_text())
    own = {"AutoTokenizer": ["tokenization_x.Tokenizer", None]}
    write_json(folder / "tokenizer_config.json", {**stated, "auto_map": own})
    with pytest.raises(UserError, match="tokenizer_config.json: auto_map"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize(("name", "value"), [
    ("transformer_task", "fill-mask"), ("query_expansion", {"length": 32}),
    ("config_args", {"is_causal": False}), ("modality_config", {"image": {"method": "forward"}}),
])  # fmt: skip
def test_settings_of_the_transformer_that_are_not_supported(folder, name, value):
    write_modules(folder, lengths={name: value})
    with pytest.raises(UserError, match=f"sentence_bert_config.json: {name}"):
        read_model_folder(str(folder)).knobs()


def test_a_pooling_that_is_named_but_missing_is_refused(folder):
    write_modules(folder)
    shutil.rmtree(folder / "1_Pooling")
    with pytest.raises(UserError, match="1_Pooling/config.json: no such file, but modules.json names"):
        read_model_folder(str(folder)).knobs()


def test_the_transformer_may_lie_in_a_folder(folder, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(folder, old / "0_Transformer")
    write_modules(old, transformer="0_Transformer", lengths={"max_seq_length": 24})
    assert torch.equal(vectors(old, "mean"), vectors(folder, "mean"))
    assert len(load_tokenizer(str(old))) == len(load_tokenizer(str(folder)))
    assert folder_settings(str(old))["p_max_seq_len"] == 24
    before = model_checksum(str(old))
    (old / "0_Transformer/model.safetensors").write_bytes(b"other")
    assert model_checksum(str(old)) != before


@pytest.mark.parametrize(("bias", "safe"), [(True, False), (False, True)])
def test_layers_after_the_pooling_run_in_order(folder, bias, safe):
    """Normalization, a dense layer and a layer normalization, by hand."""
    kinds = ("Normalize", "Dense", "Dropout", "LayerNorm", "Normalize")
    write_modules(folder, after=kinds, similarity_fn_name="dot")
    state = write_dense(folder / "3_Dense", 32, 20, "Tanh" if bias else "Identity", bias, safe)
    write_json(folder / "5_LayerNorm/config.json", {"dimension": 20})
    norm = {"norm.weight": torch.rand(20), "norm.bias": torch.rand(20)}
    torch.save(norm, folder / "5_LayerNorm/pytorch_model.bin")
    assert not (folder / "2_Normalize").exists()  # repositories hold no empty folders
    assert model_checksum(str(folder))
    assert read_model_folder(str(folder)).knobs() == {"pooling": "mean", "normalize": True}
    config = load_config(str(folder))
    assert vector_width(config) == 20
    (folder / "modules.json").rename(folder / "hidden.json")
    pooled = torch.nn.functional.normalize(vectors(folder, "mean"), dim=1)
    (folder / "hidden.json").rename(folder / "modules.json")
    dense = pooled @ state["linear.weight"].T
    if bias:
        dense = torch.tanh(dense + state["linear.bias"])
    centered = dense - dense.mean(1, keepdim=True)
    expected = centered / (dense.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    expected = expected * norm["norm.weight"] + norm["norm.bias"]
    assert torch.allclose(vectors(folder, "mean"), expected, atol=1e-5)


@pytest.mark.parametrize(("name", "value"), [
    ("activation_function", "os.system"), ("activation_function", "torch.load"), ("use_residual", True),
    ("module_input_name", "token_embeddings"),
])  # fmt: skip
def test_a_dense_layer_of_another_kind_is_refused(folder, name, value):
    write_modules(folder, after=("Dense",))
    write_dense(folder / "2_Dense", 32, 32)
    config = json.loads((folder / "2_Dense/config.json").read_text())
    write_json(folder / "2_Dense/config.json", {**config, name: value})
    with pytest.raises(UserError, match=f"2_Dense/config.json: {name}"):
        read_model_folder(str(folder)).knobs()


def test_a_dense_layer_without_weights_is_refused(folder):
    write_modules(folder, after=("Dense",))
    write_dense(folder / "2_Dense", 32, 16)
    (folder / "2_Dense/model.safetensors").unlink()
    with pytest.raises(UserError, match="2_Dense: contains no weights"):
        vectors(folder, "mean")


def test_a_prefix_is_not_pooled_when_the_folder_says_so(folder, tokenizer):
    write_modules(folder, {"pooling_mode": "mean", "include_prompt": False}, prompts={"query": "水油"})
    config = load_config(str(folder))
    assert config.sentence_settings["include_prompt"] is False
    assert count_prompt_tokens(tokenizer, "水油") == 3  # with [CLS]
    assert exclude_prompt(TextRules(32, "水油"), tokenizer).prompt_tokens == 3
    tower = load_backbone(str(folder), config, "mean", 0).eval()
    with torch.inference_mode():
        states = tower(IDS, attention_mask=MASK)[0]
        found = embed(tower, IDS, MASK, "mean", False, skipped=2)
    assert torch.allclose(found[0], states[0, 2:].mean(0), atol=1e-6)
    assert torch.allclose(found[1], states[1, 2], atol=1e-6)


def test_lower_case_of_the_folder(folder, tmp_path):
    write_modules(folder, lengths={"do_lower_case": True})
    stated = json.loads((folder / "tokenizer_config.json").read_text())
    tokens = json.loads((folder / "tokenizer.json").read_text())
    tokens["normalizer"]["lowercase"] = False
    write_json(folder / "tokenizer.json", tokens)
    write_json(folder / "tokenizer_config.json", {**stated, "do_lower_case": False})
    lower = load_tokenizer(str(folder))
    assert tokenize(lower, ["AB"], TextRules(8)) == tokenize(lower, ["ab"], TextRules(8))


def two_towers(folder, place, tiny_bert, tokenizer):
    """A Router with another tower for each side, as sentence-transformers writes it."""
    structure = {}
    for side, seed in (("query", 1), ("document", 2)):
        names = [f"{side}_0_Transformer", f"{side}_1_Pooling"]
        tiny_bert(seed).save_pretrained(place / names[0])
        tokenizer.save_pretrained(place / names[0])
        write_json(place / names[0] / "sentence_bert_config.json", {"max_seq_length": 10 * seed})
        write_json(place / names[1] / "config.json", {"pooling_mode": "mean"})
        structure[side] = names
    kinds = {name: f"{PACKAGE}.{name.split('_')[-1]}" for names in structure.values() for name in names}
    write_json(place / "router_config.json", {"types": kinds, "structure": structure, "parameters": {}})
    write_json(place / "modules.json", [{"type": f"{PACKAGE}.Router", "path": ""}])
    write_json(place / "config_sentence_transformers.json", {"similarity_fn_name": "dot"})


def test_two_towers(tmp_path, tiny_bert, tokenizer):
    place = tmp_path / "two"
    two_towers(None, place, tiny_bert, tokenizer)
    own = folder_settings(str(place))
    assert own == {
        "pooling": "mean", "normalize": False, "share_encoder": False, "q_max_seq_len": 10,
        "p_max_seq_len": 20,
    }  # fmt: skip
    hp = InferenceDeHparams(dual_params="none", pretrained_model_path=str(place))
    model = inference.load_dual_model(inference.find_dual_model(hp)).eval()
    for side, seed in (("query", 1), ("passage", 2)):
        expected = embed(tiny_bert(seed), IDS, MASK, "mean", False)
        assert torch.allclose(model(side, IDS, MASK), expected, atol=1e-6)
    shared = InferenceDeHparams(
        dual_params="none", pretrained_model_path=str(place), share_encoder=True, output_dir=str(tmp_path)
    )
    with pytest.raises(UserError, match="--share_encoder: .*two different towers"):
        inference.load_dual_model(inference.find_dual_model(shared))
    assert load_query_backbone(str(place), load_config(str(place)), "mean", 0) is not None
    before = model_checksum(str(place))
    tiny_bert(3).save_pretrained(place / "query_0_Transformer")
    assert model_checksum(str(place)) != before


def test_towers_of_different_kinds_are_refused(tmp_path, tiny_bert, tokenizer):
    place = tmp_path / "two"
    two_towers(None, place, tiny_bert, tokenizer)
    write_json(place / "query_1_Pooling/config.json", {"pooling_mode": "cls"})
    with pytest.raises(UserError, match="different settings"):
        read_model_folder(str(place))


def test_hub_names_and_local_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for name in ("bert-base-chinese", "owner/name"):
        assert is_hub_name(name)
    local = ("models", "models/missing", "a/b/c", "./a", "/a", "~/a", "torch_pretrained_models/a", "", ".")
    for path in local:
        assert not is_hub_name(path)


@pytest.mark.parametrize("path", ["models/missing", "./missing"])
def test_a_missing_local_path_needs_no_network(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert read_model_folder(path).knobs() == {}
    with pytest.raises(UserError, match="no such folder"):
        load_config(path)


@pytest.fixture
def cached(tmp_path, monkeypatch, folder):
    """Put a snapshot of owner/name into a hub cache without a connection; return a function."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "cache/models--owner--name"

    def publish(commit: str, absent: tuple[str, ...] = hub.OPTIONAL):
        shutil.copytree(folder, root / "snapshots" / commit)
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs/main").write_text(commit)
        for name in absent:
            (root / ".no_exist" / commit).mkdir(parents=True, exist_ok=True)
            (root / ".no_exist" / commit / name).touch()
        return root / "snapshots" / commit

    return publish


def test_a_hub_model_is_known_by_its_contents(cached, folder, tiny_bert):
    cached("1" * 40)
    assert folder_settings("owner/name") == {}
    first = model_checksum("owner/name")
    assert first == model_checksum(str(folder))
    expected = vectors(folder, "mean")
    assert torch.equal(vectors("owner/name", "mean"), expected)
    tiny_bert(5).save_pretrained(folder)
    cached("2" * 40)
    assert model_checksum("owner/name") not in (first, "owner/name")
    assert not torch.equal(vectors("owner/name", "mean"), expected)


def test_a_hub_model_whose_modules_are_not_known_is_refused(cached):
    cached("1" * 40, absent=())
    with pytest.raises(UserError, match="owner/name: modules.json is not in the cache"):
        folder_settings("owner/name")


def test_a_hub_model_that_is_not_cached_is_refused():
    with pytest.raises(UserError, match="owner/name: .*hub cannot be reached"):
        load_config("owner/name")
    assert model_checksum("owner/name") == "owner/name"


@pytest.mark.parametrize(("place", "change"), [
    ("2_Dense", {"in_features": 30}), ("2_Dense", {"out_features": "x"}), ("2_Dense", {"in_features": None}),
    ("", {"max_seq_length": "long"}), ("", {"max_seq_length": -4}), ("", {"max_seq_length": 4}),
])  # fmt: skip
def test_numbers_that_do_not_fit_are_refused(folder, place, change):
    write_modules(folder, after=("Dense",), lengths={"max_seq_length": 40}, prompts={"query": "水油水油"})
    write_dense(folder / "2_Dense", 32, 16)
    assert folder_settings(str(folder))["q_max_seq_len"] == 36
    path = folder / (place or ".") / ("config.json" if place else "sentence_bert_config.json")
    write_json(path, {**json.loads(path.read_text()), **change})
    with pytest.raises(UserError):
        folder_settings(str(folder))


@pytest.mark.parametrize("router", [
    {}, {"structure": {"query": ["a"]}, "types": {}},
    {"structure": {"query": ["a"], "document": ["a"]}, "types": {"a": f"{PACKAGE}.CNN"}},
    {"structure": {}, "types": {}, "parameters": {"route_mappings": {"x": "y"}}},
])  # fmt: skip
def test_routers_that_are_not_known_are_refused(folder, router):
    write_json(folder / "modules.json", [{"type": f"{PACKAGE}.Router", "path": ""}])
    write_json(folder / "router_config.json", router)
    with pytest.raises(UserError, match="router_config.json|modules.json"):
        folder_settings(str(folder))


@pytest.mark.parametrize("path", ["../other", "/etc"])
def test_a_module_outside_of_the_folder_is_refused(folder, path):
    write_json(folder / "modules.json", [{"type": f"{PACKAGE}.Transformer", "path": path}])
    with pytest.raises(UserError, match="leaves the model's folder"):
        read_model_folder(str(folder)).knobs()


def test_a_hub_model_is_downloaded_once_and_a_failed_request_uses_the_cache(cached, monkeypatch):
    import huggingface_hub as library
    from huggingface_hub import constants

    snapshot, asked, down = cached("1" * 40), [], []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    files = [SimpleNamespace(rfilename=name) for name in ("config.json", "model.safetensors", "x/y.onnx")]

    def answer(_, name):
        asked.append(name)
        if down:
            raise ConnectionError("no route")
        return SimpleNamespace(siblings=files)

    def download(name, allow_patterns=None, local_files_only=False):
        assert local_files_only or allow_patterns == ["model.safetensors", "config.json"]
        if name == "owner/absent":
            raise FileNotFoundError
        return str(snapshot)

    monkeypatch.setattr(library.HfApi, "model_info", answer)
    monkeypatch.setattr(library, "snapshot_download", download)
    hub._download.cache_clear()
    assert {hub.local_folder("owner/name") for _ in range(3)} == {str(snapshot)} and asked == ["owner/name"]
    hub._download.cache_clear()
    down.append(True)
    assert hub.local_folder("owner/name") == str(snapshot)
    with pytest.raises(UserError, match="owner/absent: .*no route"):
        hub.local_folder("owner/absent")
    hub._download.cache_clear()
