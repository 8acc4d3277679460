"""Settings read from a model folder written by sentence-transformers."""

import json

import pytest

from torch_src.models.model_folder import own_settings


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
