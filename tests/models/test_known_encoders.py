"""Published encoders are used as their cards say where their folders do not; folders and options win."""

import json
import shutil

import pytest
from toy_folders import write_modules

from torch_src.inference import find_dual_model
from torch_src.inference_de_hparams import InferenceDeHparams
from torch_src.models.backbones import folder_settings
from torch_src.models.known_encoders import SETTINGS, TABLE, known_encoder


@pytest.fixture
def folder(tmp_path, tiny_bert, tokenizer):
    """Return a function: name -> a folder of that name with a BERT of 64 positions."""

    def make(name: str):
        tiny_bert().save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def test_rows_are_complete_and_match_their_own_card():
    rows = json.loads(TABLE.read_text(encoding="utf-8"))
    for row in rows:
        assert {*row} == {"family", "names", "card", *SETTINGS}, row
        assert known_encoder(row["card"])["family"] == row["family"]
    assert known_encoder("owner/me5-small-zh") == known_encoder("owner/bert-base-chinese") == {}


def test_a_plain_folder_is_known_by_its_name(folder, capsys):
    path = str(folder("multilingual-e5-small"))
    own = folder_settings(path)
    assert (own["pooling"], own["normalize"]) == ("mean", True)
    assert (own["query_prefix"], own["passage_prefix"]) == ("query: ", "passage: ")
    # less than the 64 positions, which the prefix needs as well
    assert 0 < own["q_max_seq_len"] < 64 and 0 < own["p_max_seq_len"] < 64
    folder_settings(path)
    assert capsys.readouterr().out.count("multilingual E5") == 1  # logged once


def test_a_renamed_folder_is_taken_for_the_model_that_its_configuration_names(folder, capsys):
    path = folder("mine")
    assert folder_settings(str(path)) == {}
    config = json.loads((path / "config.json").read_text())
    renamed = shutil.copytree(path, path.with_name("other"))
    (renamed / "config.json").write_text(json.dumps({**config, "_name_or_path": "BAAI/bge-base-zh-v1.5"}))
    assert folder_settings(str(renamed))["query_prefix"].startswith("为这个句子")
    assert "BAAI/bge-base-zh-v1.5" in capsys.readouterr().err  # it is a guess
    hp = InferenceDeHparams(dual_params="none", pretrained_model_path=str(renamed), query_prefix="")
    assert find_dual_model(hp).settings["query_prefix"] == ""


def test_a_known_name_is_no_guess(folder):
    path = folder("bge-m3")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "_name_or_path": "intfloat/e5-base"}))
    assert known_encoder(str(path))["family"] == "BGE-M3" and not known_encoder(str(path))["base"]


def test_the_folder_wins_over_the_table_and_options_over_both(folder, capsys):
    path = folder("bge-small-zh-v1.5")
    write_modules(path, pooling="mean", prompts={"query": "问："}, similarity_fn_name="dot")
    own = folder_settings(str(path))
    assert (own["pooling"], own["normalize"], own["query_prefix"]) == ("mean", False, "问：")
    assert own["passage_prefix"] == ""
    hp = InferenceDeHparams(dual_params="none", pretrained_model_path=str(path), query_prefix="查：")
    settings = find_dual_model(hp).settings
    assert (settings["pooling"], settings["query_prefix"]) == ("mean", "查：")
