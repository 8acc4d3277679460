"""Re-rankers of other kinds as pretrained models: two labels, yes or no of a language model, prompts."""

import json

import pytest
import torch
import transformers
from token_lists import pair_lists
from toy_folders import PACKAGE, write_json
from transformers import BertConfig, BertForSequenceClassification, Qwen3Config, Qwen3ForCausalLM

from torch_src import cross_train
from torch_src.inference import find_cross_model, load_cross_model, pair_rules, pair_scorer
from torch_src.inference_cross_hparams import InferenceCrossHparams
from torch_src.models.backbones import load_config
from torch_src.models.pair_template import INSTRUCTION, PairTemplate, chat_template
from torch_src.models.tokenization import TextRules, load_tokenizer
from torch_src.runtime.errors import UserError

WORDS = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] yes no 水 油 鱼 查 询 ： < > : Query Document Instruct . a b c".split()
)
QUERIES, PASSAGES = ["水油", "鱼", "水"], ["油 a", "鱼鱼鱼 b 水", "c"]
CPU = torch.device("cpu")
SIZES = {
    "vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 512, "initializer_range": 0.5,
}  # fmt: skip
DECODER = {**SIZES, "num_key_value_heads": 2, "head_dim": 16}


@pytest.fixture
def folder(tmp_path):
    """An empty folder with a tokenizer whose words are WORDS."""
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    tokenizer = transformers.BertTokenizer(vocab=str(tmp_path / "vocab.txt"), do_lower_case=False)
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def save(model, folder, **config):
    torch.manual_seed(0)
    model.init_weights()
    model.eval().save_pretrained(folder)
    stated = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**stated, **config})
    return model


def source(folder):
    hp = InferenceCrossHparams(cross_params="none", pretrained_model_path=str(folder))
    return find_cross_model(hp)


def scores(folder):
    found = source(folder)
    scorer = pair_scorer(found, load_cross_model(found), 8, CPU, "fp32")
    return torch.from_numpy(scorer.score(scorer.tokenize(QUERIES, PASSAGES)))


def reranker_modules(folder, *after, general=None, **lengths):
    kinds = {"": "Transformer", **{f"{at}_{kind}": kind for at, kind in enumerate(after, start=1)}}
    modules = [{"type": f"{PACKAGE}.{kind}", "path": path} for path, kind in kinds.items()]
    write_json(folder / "modules.json", modules)
    write_json(folder / "sentence_bert_config.json", lengths)
    if general:
        write_json(folder / "config_sentence_transformers.json", general)


@pytest.mark.parametrize(("labels", "relevant"), [
    (None, 1), (["irrelevant", "relevant"], 1), (["yes", "no"], 0), (["RELEVANT", "x"], 0),
])  # fmt: skip
def test_two_labels_give_the_difference_of_their_logits(folder, labels, relevant):
    names = {"id2label": dict(enumerate(labels))} if labels else {"num_labels": 2}
    model = save(BertForSequenceClassification(BertConfig(**SIZES, **names)), folder)
    tokenizer = load_tokenizer(str(folder), kind="cross")
    batch = tokenizer(QUERIES, PASSAGES, padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits = model(**batch).logits
    assert torch.allclose(scores(folder), logits[:, relevant] - logits[:, 1 - relevant], atol=1e-5)


def test_three_labels_are_refused(folder):
    save(BertForSequenceClassification(BertConfig(**SIZES, num_labels=3)), folder)
    with pytest.raises(UserError, match="no trained head with one logit"):
        scores(folder)


def answers(model, ids, yes=5, no=6):
    """The logit of yes minus that of no after each list of tokens, one at a time."""
    with torch.inference_mode():
        last = [model(torch.tensor([tokens])).logits[0, -1] for tokens in ids]
    return torch.stack([logits[yes] - (0 if no is None else logits[no]) for logits in last])


def test_yes_and_no_of_qwen3_with_the_template_of_its_model_card(folder):
    model = save(Qwen3ForCausalLM(Qwen3Config(**DECODER)), folder)
    tokenizer = load_tokenizer(str(folder), kind="cross")
    before = (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the "
        'Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    )
    after = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    ids = []
    for query, passage in zip(QUERIES, PASSAGES, strict=True):
        body = f"<Instruct>: {INSTRUCTION}\n<Query>: {query}\n<Document>: {passage}"
        texts = (before, body, after)
        ids.append([t for text in texts for t in tokenizer(text, add_special_tokens=False)["input_ids"]])
    assert torch.allclose(scores(folder), answers(model, ids), atol=1e-4)


@pytest.mark.parametrize("no", [6, None])
def test_yes_and_no_tokens_of_the_folder(folder, no):
    model = save(Qwen3ForCausalLM(Qwen3Config(**DECODER, tie_word_embeddings=True)), folder)
    reranker_modules(folder, "LogitScore", transformer_task="text-generation")
    write_json(folder / "1_LogitScore/config.json", {"true_token_id": 5, "false_token_id": no})
    tokenizer = load_tokenizer(str(folder), kind="cross")
    ids = tokenizer(QUERIES, PASSAGES)["input_ids"]
    assert torch.allclose(scores(folder), answers(model, ids, no=no), atol=1e-4)


@pytest.mark.parametrize("prompt", ["", "询"])
def test_the_chat_template_of_the_folder(folder, prompt):
    model = save(Qwen3ForCausalLM(Qwen3Config(**DECODER)), folder)
    general = {"prompts": {"web": prompt}, "default_prompt_name": "web"}
    message = {"method": "forward", "method_output_name": "logits", "format": "flat"}
    reranker_modules(
        folder, "LogitScore", general=general, transformer_task="text-generation",
        modality_config={"message": message},
    )  # fmt: skip
    write_json(folder / "1_LogitScore/config.json", {"true_token_id": 5, "false_token_id": 6})
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}a {{ m.content }} {% elif m.role == 'query' %}"
        "b {{ m.content }} {% else %}: {{ m.content }} .{% endif %}{% endfor %}"
    )
    tokenizer = load_tokenizer(str(folder), kind="cross")
    system = f"a {prompt} " if prompt else ""
    texts = [f"{system}b {q} : {p} ." for q, p in zip(QUERIES, PASSAGES, strict=True)]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert torch.allclose(scores(folder), answers(model, ids), atol=1e-4)


def test_a_chat_template_without_the_document_is_refused(folder):
    save(Qwen3ForCausalLM(Qwen3Config(**DECODER)), folder)
    reranker_modules(folder, "LogitScore", modality_config={"message": {}})
    write_json(folder / "1_LogitScore/config.json", {"true_token_id": 5})
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(UserError, match="chat template does not contain"):
        source(folder)


def test_logits_that_are_capped_are_refused(folder):
    config = transformers.Gemma2Config(**DECODER, final_logit_softcapping=1.0, pad_token_id=0)
    save(transformers.Gemma2ForCausalLM(config), folder)
    reranker_modules(folder, "LogitScore")
    write_json(folder / "1_LogitScore/config.json", {"true_token_id": 5, "false_token_id": 6})
    with pytest.raises(UserError, match="causal gemma2 model is not supported"):
        scores(folder)


def test_the_pad_token_comes_from_the_tokenizer(folder):
    kind = transformers.Qwen3ForSequenceClassification
    model = save(kind(Qwen3Config(**DECODER, num_labels=1)), folder)
    assert json.loads((folder / "config.json").read_text())["pad_token_id"] is None
    assert load_config(str(folder), kind="cross").pad_token_id == 0
    tokenizer = load_tokenizer(str(folder), kind="cross")
    ids = tokenizer(QUERIES, PASSAGES)["input_ids"]
    with torch.inference_mode():
        expected = torch.stack([model(torch.tensor([tokens])).logits[0, 0] for tokens in ids])
    assert torch.allclose(scores(folder), expected, atol=1e-5)


def test_the_default_prompt_is_put_before_the_query(folder, capsys):
    model = save(BertForSequenceClassification(BertConfig(**SIZES, num_labels=1)), folder)
    general = {"prompts": {"q": "查询：", "other": "水"}, "default_prompt_name": "q"}
    reranker_modules(folder, general=general, max_seq_length=20)
    tokenizer = load_tokenizer(str(folder), kind="cross")
    batch = tokenizer([f"查询：{query}" for query in QUERIES], PASSAGES, padding=True, return_tensors="pt")
    with torch.inference_mode():
        expected = model(**batch).logits[:, 0]
    assert torch.allclose(scores(folder), expected, atol=1e-5)
    assert "other" in capsys.readouterr().err
    assert source(folder).settings["max_seq_len"] == 17  # and three tokens of the prompt
    hp = cross_train.settings(["--pretrained_model_path", str(folder)])
    assert hp.max_seq_len == 17
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 500})
    assert cross_train.settings(["--pretrained_model_path", str(folder)]).max_seq_len == 384


def test_training_counts_the_positions_of_the_prompt(folder, tmp_path):
    save(BertForSequenceClassification(BertConfig(**SIZES, num_labels=1)), folder)
    general = {"prompts": {"q": "查询："}, "default_prompt_name": "q"}
    reranker_modules(folder, general=general, max_seq_length=20)
    positions = load_config(str(folder), kind="cross").max_position_embeddings

    def stage(length):
        words = ["--pretrained_model_path", str(folder), "--output_dir", str(tmp_path / "out")]
        return cross_train.training_stage(cross_train.settings([*words, "--max_seq_len", str(length)]))

    assert stage(positions - 3).setup.rules["max_seq_len"].pair.before == "查询："
    with pytest.raises(UserError, match=f"--max_seq_len {positions - 2}.* {positions - 3} or less"):
        stage(positions - 2)


def test_the_passage_is_cut_between_the_parts_of_a_template(folder):
    save(BertForSequenceClassification(BertConfig(**SIZES, num_labels=1)), folder)
    tokenizer = load_tokenizer(str(folder), kind="cross")
    rules = TextRules(8, pair=PairTemplate("a b ", " : ", " . c", special_tokens=False))
    assert rules.max_tokens(tokenizer) == 8 + 5
    pairs = pair_lists(tokenizer, ["水油", "水"], ["鱼" * 30, "鱼"], rules)
    words = [tokenizer.convert_ids_to_tokens(ids) for ids in pairs.ids]
    assert words[0] == [*"ab水油:", *"鱼" * 6, ".", "c"] and words[1] == [*"ab水:鱼.c"]
    assert pairs.cut == 1 and [len(types) for types in pairs.types] == [len(ids) for ids in pairs.ids]


def test_a_template_survives_its_chat_template(folder):
    tokenizer = load_tokenizer(str(folder), kind="cross")
    template = PairTemplate('a\n"b" {{ ', " \\ '", "\n</c>\n\n", special_tokens=False)
    tokenizer.chat_template = chat_template(template)
    messages = [{"role": "query", "content": "{Q}"}, {"role": "document", "content": "P"}]
    found = tokenizer.apply_chat_template(messages, tokenize=False)
    assert found == f"{template.before}{{Q}}{template.between}P{template.after}"


@pytest.mark.parametrize("kind", ["Pooling", "StaticEmbedding", "MultiVectorMask"])
def test_modules_of_other_models(folder, kind):
    """A re-ranker may start from a retriever's folder, but has no head then."""
    save(BertForSequenceClassification(BertConfig(**SIZES, num_labels=2)).bert, folder)
    reranker_modules(folder, kind)
    message = "no trained head" if kind == "Pooling" else f"the module {kind} is not supported"
    with pytest.raises(UserError, match=message):
        scores(folder)


def test_rules_of_a_model_without_template(folder):
    save(BertForSequenceClassification(BertConfig(**SIZES, num_labels=1)), folder)
    assert pair_rules(source(folder)) == TextRules(384)


def test_one_segment_type_and_padding(folder, capsys):
    """A model with one type of segments takes no other; XLNet reads the last position, padding or not."""
    config = transformers.RobertaConfig(**SIZES, type_vocab_size=1, pad_token_id=0, num_labels=1)
    model = save(transformers.RobertaForSequenceClassification(config), folder)
    tokenizer = load_tokenizer(str(folder), kind="cross")
    batch = tokenizer(QUERIES, PASSAGES, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.inference_mode():
        expected = model(**batch).logits[:, 0]
    assert torch.allclose(scores(folder), expected, atol=1e-5)
    assert "padding" not in capsys.readouterr().err
    sizes = {"vocab_size": len(WORDS), "d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 32}
    xlnet = transformers.XLNetConfig(**sizes, initializer_range=0.5, num_labels=1)
    save(transformers.XLNetForSequenceClassification(xlnet), folder)
    scores(folder)
    assert "padding changes the scores" in capsys.readouterr().err
