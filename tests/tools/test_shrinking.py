"""Smaller encoders: tokens, layers and neurons that are kept compute what the teacher computes."""

import pytest
import torch
from transformers import BertConfig, BertModel

from torch_src.models.tokenization import load_tokenizer
from torch_src.runtime.errors import UserError
from torch_src.tools.shrinking import shrink_model, shrink_tokenizer

TEXTS = ["清蒸鱼的腥味主要来自血水和内脏", "ABC abc 蒸鱼 12 分钟", "整条鱼清蒸前，在背部划几刀"]
IDS = torch.tensor([[2, 7, 9, 11, 3], [2, 8, 8, 3, 0]])
MASK = (IDS > 0).long()


@pytest.fixture
def teacher() -> BertModel:
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, initializer_range=0.5,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False).eval()


def states(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=MASK).last_hidden_state


def every(count: int) -> list[list[int]]:
    return [[at] for at in range(count)]


def test_all_layers_neurons_and_tokens_are_the_teacher(teacher):
    student = shrink_model(teacher, [0, 1, 2], 24, every(50), [(IDS, MASK)]).eval()
    assert torch.equal(states(student.base_model), states(teacher))
    assert student.config.num_labels == 1


def test_the_neurons_that_matter_are_kept(teacher):
    with torch.no_grad():
        for layer in teacher.encoder.layer:
            layer.output.dense.weight[:, ::2] = 0  # the even ones have no effect
    student = shrink_model(teacher, [0, 1, 2], 12, every(50), [(IDS, MASK)]).eval()
    assert student.config.intermediate_size == 12
    assert torch.allclose(states(student.base_model), states(teacher), atol=1e-5)


def test_layers_are_those_that_were_asked_for(teacher):
    student = shrink_model(teacher, [0, 2], 24, every(50), [(IDS, MASK)]).eval()
    del teacher.encoder.layer[1]
    assert torch.equal(states(student.base_model), states(teacher))


def test_a_token_is_the_mean_of_its_sources(teacher):
    embeddings = [*every(10), [20, 30], [40]]
    student = shrink_model(teacher, [0], 24, embeddings, [(IDS, MASK)])
    words, old = student.get_input_embeddings().weight, teacher.get_input_embeddings().weight
    assert torch.equal(words[10], (old[20] + old[30]) / 2)
    assert torch.equal(words[11], old[40])


@pytest.mark.parametrize(("layers", "neurons"), [([0, 3], 24), ([1, 0], 24), ([1, 1], 24), ([0], 25)])
def test_sizes_that_the_teacher_does_not_have(teacher, layers, neurons):
    with pytest.raises(UserError):
        shrink_model(teacher, layers, neurons, every(50), [(IDS, MASK)])


def test_another_kind_of_model_is_refused():
    from transformers import DistilBertConfig, DistilBertModel

    model = DistilBertModel(DistilBertConfig(vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=24))
    with pytest.raises(UserError, match="distilbert"):
        shrink_model(model, [0], 8, every(50), [])


def test_wordpiece_tokens(tokenizer):
    small, sources = shrink_tokenizer(tokenizer, TEXTS, 120)
    assert len(small) == len(sources) == 120
    names = small.convert_ids_to_tokens(range(120))
    assert names == [tokenizer.convert_ids_to_tokens(ids[0]) for ids in sources]
    for text in TEXTS:  # every token of the texts is kept
        assert small.tokenize(text) == tokenizer.tokenize(text)
    pair = small("蒸鱼", "清蒸", return_token_type_ids=True)
    assert small.convert_ids_to_tokens(pair["input_ids"]) == [
        "[CLS]",
        "蒸",
        "鱼",
        "[SEP]",
        "清",
        "蒸",
        "[SEP]",
    ]
    assert pair["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]


def test_unigram_tokens_lower_case_and_prefixes(tiny_encoder):
    teacher = load_tokenizer(str(tiny_encoder))
    small, sources = shrink_tokenizer(teacher, TEXTS, 400, ["question: ", "passage: "])
    assert len(small) == len(sources) == 400
    assert small.tokenize("question: 蒸鱼")[0] == "▁question:"
    assert small("ABC")["input_ids"] == small("abc")["input_ids"]
    assert not {small.unk_token_id} & {at for text in TEXTS for at in small(text)["input_ids"]}
    assert sources[small.convert_tokens_to_ids("鱼")] == [teacher.convert_tokens_to_ids("鱼")]
    assert sources[small.convert_tokens_to_ids("▁question:")] == teacher("question: ")["input_ids"][1:-1]


def test_folded_characters(tiny_encoder, tmp_path):
    pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    table = tmp_path / "folds.txt"
    table.write_text("魚\t鱼\n淸\t清 青\n", encoding="utf-8")
    small, _ = shrink_tokenizer(load_tokenizer(str(tiny_encoder)), TEXTS, 400, folds=str(table))
    assert small("淸蒸魚")["input_ids"] == small("清蒸鱼")["input_ids"]
    table.write_text("nothing here\n", encoding="utf-8")
    with pytest.raises(UserError, match="folds.txt"):
        shrink_tokenizer(load_tokenizer(str(tiny_encoder)), TEXTS, 400, folds=str(table))


def test_a_vocabulary_without_room_for_tokens_is_refused(tokenizer):
    with pytest.raises(UserError, match="--vocab_size 5"):
        shrink_tokenizer(tokenizer, TEXTS, 5)
