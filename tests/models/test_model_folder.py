"""Settings read from a model folder written by sentence-transformers."""

import json

import pytest

from torch_src.models.backbones import load_config
from torch_src.models.model_folder import is_hub_name, own_settings
from torch_src.runtime.errors import UserError


@pytest.mark.parametrize(("config", "expected"), [
    ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
    ({"pooling_mode_mean_tokens": True}, "mean"), ({"pooling_mode": "cls"}, "cls"),
    ({"pooling_mode_max_tokens": True}, None), ({"pooling_mode": "lasttoken"}, None), ({}, None),
    ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, None),
])  # fmt: skip
def test_poolings_of_foreign_folders(tmp_path, config, expected):
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling/config.json").write_text(json.dumps(config))
    modules = [{"type": "sentence_transformers.models.Transformer", "path": ""},
               {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]  # fmt: skip
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    if expected is None:
        with pytest.raises(ValueError, match="pooling .* is not supported"):
            own_settings(str(tmp_path))
    else:
        assert own_settings(str(tmp_path)) == {"pooling": expected, "normalize": False}


def test_hub_names_and_local_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for name in ("bert-base-chinese", "owner/name"):
        assert is_hub_name(name)
    for path in (
        "models",
        "models/missing",
        "a/b/c",
        "./a",
        "/a",
        "~/a",
        "torch_pretrained_models/a",
        "",
        ".",
    ):
        assert not is_hub_name(path)


@pytest.mark.parametrize("path", ["models/missing", "./missing"])
def test_a_missing_local_path_needs_no_network(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert own_settings(path) == {}
    with pytest.raises(UserError, match="no such folder"):
        load_config(path)
