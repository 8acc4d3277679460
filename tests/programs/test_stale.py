"""One changed input at a time: it is detected and logged, and only what depends on it is recomputed."""

import json
import shutil

import pytest
import torch
from toy_world import make_world, options

from torch_src import dual_infer, inference


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """A world with a run of the pretrained model, every setting given."""
    world = make_world(tmp_path_factory.mktemp("world"))
    assert infer(world) == 0
    return world


@pytest.fixture
def world(encoded, tmp_path):
    shutil.copytree(encoded, tmp_path / "world")
    return tmp_path / "world"


def infer(world, *more: str) -> int:
    settings = {
        "dual_params": "none", "pretrained_model_path": str(world / "model"), "pooling": "mean", "topk": "10",
        "query_prefix": "q: ", "passage_prefix": "p: ", "q_max_seq_len": "32", "p_max_seq_len": "64",
    }  # fmt: skip
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    return dual_infer.main([*options(world, world / "output"), *words, *more])


def blocks(world) -> dict[str, tuple[int, bytes]]:
    """Return the time and bytes of each block of passage vectors."""
    found = sorted((world / "output/para_emb").glob("*.npy"))
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


@pytest.mark.parametrize(("knob", "value", "passages"), [
    ("query_prefix", "问：", False), ("passage_prefix", "文：", True), ("q_max_seq_len", "16", False),
    ("p_max_seq_len", "32", True), ("pooling", "cls", True), ("normalize", None, True),
    ("remove_spaces", None, True), ("vector_dims", "16", True), ("seed", "7", True), ("topk", "5", False),
])  # fmt: skip
def test_one_changed_setting_is_detected(world, capsys, knob, value, passages):
    before = blocks(world)
    capsys.readouterr()
    assert infer(world, f"--{knob}", *([] if value is None else [value])) == 0
    printed = capsys.readouterr().out
    if knob != "topk":  # another k is another file
        assert "res.top10: out of date" in printed
        assert ("weights: " if knob == "seed" else f"{knob}: ") in printed  # of weights that the folder lacks
    assert (blocks(world) != before) == passages
    assert ("vectors up to date" in printed) != passages


@pytest.mark.slow
def test_another_tokenizer_is_detected(world, capsys):
    vocab = world / "vocab.txt"
    words = (world / "model/vocab.txt").read_text(encoding="utf-8").split("\n")
    words[200], words[201] = words[201], words[200]
    vocab.write_text("\n".join(words), encoding="utf-8")
    assert infer(world, "--vocab_path", str(vocab)) == 0
    assert "tokenizer: " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("tower", ["query_encoder", "passage_encoder"])
def test_one_changed_tower_is_detected(trained_copy, capsys, tower):
    world = trained_copy
    path, run = world / "output/dual_params.bin", (world / "output/res.top10").read_bytes()
    state = torch.load(path, weights_only=True)
    name = next(name for name in state if name.startswith(tower) and name.endswith("query.weight"))
    state[name] += 0.5
    torch.save(state, path)
    capsys.readouterr()
    assert dual_infer.main(options(world, world / "output"), topk=10) == 0
    printed = "".join(capsys.readouterr())
    assert "not the weights that" in printed and "weights: " in printed
    assert (world / "output/res.top10").read_bytes() != run


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["dual_hparams.json", "dual_model/config.json", "dual_model/tokenizer_config.json"]
)
def test_model_settings_cannot_be_edited(trained_copy, capsys, name):
    world = trained_copy
    path = world / "output" / name
    record = json.loads(path.read_text(encoding="utf-8"))
    (record.get("fixed_by_weights") or record)["pooling"] = "mean"
    path.write_text(json.dumps(record), encoding="utf-8")
    assert dual_infer.main(options(world, world / "output"), topk=10) == 2
    error = capsys.readouterr().err
    assert name in error and ("checksum" in error or "not what" in error)


@pytest.mark.slow
def test_an_edited_result_is_rebuilt(world, capsys):
    path = world / "output/res.top10"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"\t1\t", b"\t9\t", 1))
    assert infer(world) == 0
    assert "checksum mismatch" in capsys.readouterr().out
    assert path.read_bytes() == whole


@pytest.mark.slow
def test_the_stamp_of_the_run_is_written_last(world, monkeypatch):
    """A run with a stamp is complete, even if the program is killed right after writing the stamp."""
    settings = world / "output/dual_infer_hparams.json"
    settings.unlink()
    written = []
    monkeypatch.setattr(dual_infer, "write_stamp", lambda at, _: written.append((at.name, settings.exists())))
    assert infer(world, "--force") == 0
    assert written[-1] == ("res.top10", True)


@pytest.mark.slow
def test_another_number_of_heads_is_detected(trained_copy, capsys):
    """No weight's shape shows the number of heads: the weights load, and the vectors differ."""
    world = trained_copy
    other = world / "other"
    shutil.copytree(world / "model", other)
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    words = [*options(world, world / "output"), "--pretrained_model_path", str(other)]
    assert dual_infer.main(words, topk=10) == 0  # the same model in another folder
    assert "up to date" in capsys.readouterr().out
    (other / "config.json").write_text(json.dumps(config | {"num_attention_heads": 4}), encoding="utf-8")
    assert dual_infer.main(words, topk=10) == 2
    assert "not the configuration that" in capsys.readouterr().err
    shutil.rmtree(world / "output/dual_model")  # as if only the weights and settings were copied
    assert dual_infer.main(words, topk=10) == 0
    printed = capsys.readouterr().out
    assert "res.top10: out of date" in printed and printed.count("architecture: ") == 3


@pytest.mark.slow
@pytest.mark.parametrize("own_weights", [True, False])
def test_weights_replaced_during_loading_are_detected(trained_copy, capsys, monkeypatch, own_weights):
    world = trained_copy
    words = [*options(world, world / "output"), "--force"]
    (world / "output/res.top10").unlink()
    if own_weights:
        changed, loader = world / "output/dual_params.bin", "load_weights"
    else:
        words += ["--dual_params", "none", "--pretrained_model_path", str(world / "model")]
        changed, loader = world / "model/config.json", "load_backbone"
    real = getattr(inference, loader)

    def load(*given):
        loaded = real(*given)
        changed.write_bytes(changed.read_bytes() + b" ")
        return loaded

    monkeypatch.setattr(inference, loader, load)
    assert dual_infer.main(words, topk=10) == 2
    assert "changed while it was being read; run again" in capsys.readouterr().err
    assert not (world / "output/res.top10").exists()
