"""Code in a data file, weights file or model folder never runs; no shell command is built from strings."""

import ast
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from toy_world import ROOT, make_world, options, train_options

from torch_src import cross_infer, dual_infer, dual_train
from torch_src.runtime.errors import UserError
from torch_src.training.checkpoints import load_checkpoint


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.write_text, (self.mark, "run")


def plain_pickle(path: Path, mark: Path) -> None:
    path.write_bytes(pickle.dumps({"query_encoder.x": Malicious(mark)}))


def torch_pickle(path: Path, mark: Path) -> None:
    torch.save({"query_encoder.x": Malicious(mark), "y": torch.zeros(3)}, path)


def test_malicious_files_run_code_when_unprotected(tmp_path):
    torch_pickle(tmp_path / "a.bin", tmp_path / "mark")
    torch.load(tmp_path / "a.bin", weights_only=False)
    assert (tmp_path / "mark").read_text() == "run"


@pytest.mark.parametrize("write", [plain_pickle, torch_pickle])
@pytest.mark.parametrize("kind", ["dual", "cross"])
def test_code_in_weights_does_not_run(trained_copy, tmp_path, capsys, write, kind):
    world = trained_copy
    out, mark = world / "output", tmp_path / "mark"
    if kind == "dual":
        write(out / "dual_params.bin", mark)
        assert dual_infer.main(options(world, out), topk=10) == 2
    else:
        for old, new in (("dual_hparams.json", "cross_hparams.json"), ("dual_model", "cross_model")):
            (out / old).rename(out / new)
        text = (out / "cross_hparams.json").read_text(encoding="utf-8")
        record = text.replace('"fixed_by_weights": {', '"fixed_by_weights": {"max_seq_len": 64,')
        (out / "cross_hparams.json").write_text(
            "\n".join(line for line in record.split("\n") if '"checksum"' not in line).replace(",\n}", "\n}")
        )
        write(out / "cross_params.bin", mark)
        words = [*options(world, out), "--retrieval_result", str(out / "res.top10")]
        assert cross_infer.main(words) == 2
    assert f"{kind}_params.bin" in capsys.readouterr().err and not mark.exists()


@pytest.mark.parametrize("write", [plain_pickle, torch_pickle])
def test_code_in_checkpoints_does_not_run(tmp_path, write):
    write(tmp_path / "dual_checkpoint.pt", tmp_path / "mark")
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(tmp_path / "dual_checkpoint.pt")
    assert not (tmp_path / "mark").exists()


def test_code_in_a_model_folder_does_not_run(tmp_path, capsys):
    world = make_world(tmp_path)
    mark = tmp_path / "mark"
    config = (world / "model/config.json").read_text(encoding="utf-8")
    auto = '{"auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}, "model_type": "evil", '
    (world / "model/config.json").write_text(config.replace("{", auto, 1), encoding="utf-8")
    (world / "model/evil.py").write_text(f"open({str(mark)!r}, 'w').write('run')\n", encoding="utf-8")
    dual_train.main(train_options(world, world / "output"))
    assert not mark.exists()


def test_an_archive_with_a_path_outside_is_refused_as_weights(trained_copy, tmp_path, capsys):
    world = trained_copy
    with zipfile.ZipFile(world / "output/dual_params.bin", "w") as archive:
        archive.writestr("../../mark", "run")
    assert dual_infer.main(options(world, world / "output"), topk=10) == 2
    assert "dual_params.bin" in capsys.readouterr().err and not (tmp_path.parent / "mark").exists()


def test_no_shell_command_is_built_from_strings():
    """subprocess gets lists, never shell=True; nothing calls os.system, eval or exec."""
    for path in [
        *ROOT.glob("*.py"),
        *(p for d in ("torch_src", "script", "metric") for p in (ROOT / d).rglob("*.py")),
    ]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            assert name not in ("eval", "exec", "os.system", "os.popen"), f"{path}: {name}"
            assert not any(key.arg == "shell" for key in node.keywords), f"{path}: {name}(shell=...)"
