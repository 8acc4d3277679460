"""Distillation: texts, losses by hand, and the whole program for a few updates."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_world import make_model, make_world

from script import distill_encoder
from script.lib.distill import check_groups
from torch_src.models.backbones import folder_settings, load_config
from torch_src.models.cross_encoder import load_cross_encoder
from torch_src.models.dual_encoder import load_backbone
from torch_src.retrieval.encoding import Encoder
from torch_src.runtime.errors import UserError
from torch_src.tools.distillation import Question, make_texts, question_loss, vector_loss, window


def test_texts_of_a_document():
    passage = "先把鱼洗干净，再用姜片擦一遍。大火蒸八分钟！淋上热油；撒葱花"
    questions = [Question("蒸鱼要多久", [passage], []), Question("别的", ["另一段"], [])]
    texts = make_texts([passage, "短"], questions, seed=1)
    assert texts.documents == 2
    first = texts.texts[: texts.starts[1]]
    assert first.count("蒸鱼要多久") == 1 and "别的" not in texts.texts
    assert all(text in passage for text in first if text != "蒸鱼要多久")
    assert first[texts.is_query[: texts.starts[1]].index(False)] == passage
    assert make_texts([passage, "短"], questions, seed=1) == texts


def test_window_has_the_words_of_the_question():
    passage = "第一句没有。" * 20 + "蒸鱼要八分钟。" + "后面也没有。" * 20
    assert "八分钟" in window(passage, "蒸鱼几分钟", 20)
    assert len(window(passage, "蒸鱼几分钟", 20)) <= 20
    assert window("短", "问", 20) == "短"


def test_a_group_that_cannot_be_filled():
    one, other = Question("甲", ["a", "b"], ["c"]), Question("乙", ["b"], ["c", "d"])
    check_groups([one, other], 2)
    check_groups([one, Question("丙", ["e"], [])], 4)
    with pytest.raises(UserError, match="甲.*--group_size"):
        check_groups([one, other], 3)
    with pytest.raises(UserError, match="丙"):
        check_groups([Question("丙", ["e"], [])], 2)


def test_losses_by_hand():
    targets = torch.nn.functional.normalize(torch.tensor([[1.0, 0], [0, 1], [1, 1]]), dim=1)
    loss, nearest = vector_loss(targets, targets, variance=0.5)
    assert loss.item() == pytest.approx(0, abs=1e-6) and nearest.item() == 1
    swapped = targets[[1, 0, 2]]
    loss, nearest = vector_loss(swapped, targets, variance=0.5)
    assert nearest.item() == pytest.approx(1 / 3)
    assert loss.item() == pytest.approx((2 + 2 + 0) / 3 / 0.5, abs=1e-4)  # the similarities are the same
    eye = torch.eye(4)
    expected = -np.log(np.exp(1 / 0.02) / (np.exp(1 / 0.02) + 3))
    assert question_loss(eye[:2], eye).item() == pytest.approx(expected, abs=1e-6)


def small_run(folder: Path, device: str) -> list[str]:
    """Return the options of a run of seconds, without --to."""
    world = make_world(folder, passages=20, train_queries=8)
    options = ["--teacher", str(world / "model"), "--data_dir", str(world / "data"), "--query_prefix", ""]
    options += "--pooling mean --normalize --layers 0 --neurons 32 --vocab_size 300 --max_seq_len 48".split()
    return [*options, *f"--documents 5 --questions 3 --group_size 3 --threads 1 --device {device}".split()]


@pytest.mark.gpu
def test_the_program_on_a_gpu(tmp_path):
    assert (
        distill_encoder.main([*small_run(tmp_path, "cuda"), "--steps", "2", "--to", str(tmp_path / "a")]) == 0
    )


def test_the_program(tmp_path, monkeypatch, capsys):
    options = small_run(tmp_path, "cpu")
    small = tmp_path / "small"
    assert distill_encoder.main([*options, "--steps", "2", "--to", str(small)]) == 0
    knobs = folder_settings(str(small))
    assert (knobs["pooling"], knobs["normalize"], knobs["query_prefix"]) == ("mean", True, "")
    config = load_config(str(small))
    assert (config.num_hidden_layers, config.intermediate_size, config.vocab_size) == (1, 32, 300)
    load_backbone(str(small), config, "mean", 0)
    load_cross_encoder(str(small), load_config(str(small), kind="cross"), 0, trained=True)
    assert distill_encoder.main([*options, "--to", str(small)]) == 2  # never replaces a folder

    def encode(self, texts):
        raise AssertionError("the vectors are cached")

    monkeypatch.setattr(Encoder, "encode", encode)
    again = tmp_path / "again"
    (tmp_path / "small.work").rename(tmp_path / "again.work")
    capsys.readouterr()
    assert distill_encoder.main([*options, "--steps", "2", "--to", str(again)]) == 0
    assert "resuming after step 2 of 2" in capsys.readouterr().out
    assert (again / "model.safetensors").read_bytes() == (small / "model.safetensors").read_bytes()


def test_another_teacher_in_the_same_folder_starts_anew(tmp_path, capsys):
    options = [*small_run(tmp_path, "cpu"), "--steps", "1", "--to", str(tmp_path / "small")]
    assert distill_encoder.main(options) == 0
    shutil.rmtree(tmp_path / "small")
    make_model(tmp_path / "model", deviation=0.1)
    capsys.readouterr()
    assert distill_encoder.main(options) == 0
    printed = capsys.readouterr()
    assert "resuming" not in printed.out and "its settings differ (teacher: " in printed.out + printed.err


def test_a_teacher_without_unit_vectors_is_refused(tmp_path, capsys):
    world = make_world(tmp_path, passages=12, train_queries=4)
    words = [
        "--teacher",
        str(world / "model"),
        "--data_dir",
        str(world / "data"),
        "--to",
        str(tmp_path / "small"),
    ]
    assert distill_encoder.main(words) == 2
    assert "--normalize" in capsys.readouterr().err
