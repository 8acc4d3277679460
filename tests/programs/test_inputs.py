"""A missing input is the first message of every program, and the one that an option names."""

import pytest

from torch_src import cross_infer, cross_train, dual_infer, dual_train

MODEL = "nowhere/model/x"


@pytest.mark.parametrize("program", [dual_train, dual_infer, cross_train, cross_infer])
@pytest.mark.parametrize("options, words", [
    (["--data_dir", "gone"], "gone: no such folder"),
    (["--data_dir", "gone", "--pretrained_model_path", MODEL], "gone: no such folder"),
    (["--pretrained_model_path", MODEL], f"{MODEL}: no such folder"),  # the default data is missing, too
])  # fmt: skip
def test_what_an_option_names_is_reported_first(program, options, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert program.main([*options, "--output_dir", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert words in error and not (tmp_path / "o").exists()


@pytest.mark.parametrize(("program", "option"), [
    (dual_train, "--train_set"), (dual_train, "--dev_set"), (dual_train, "--vocab_path"),
    (dual_infer, "--dev_q"), (dual_infer, "--dual_params"), (dual_infer, "--passage_ids"),
    (cross_train, "--dev_candidates"), (cross_infer, "--retrieval_result"), (cross_infer, "--dev_q2qid"),
])  # fmt: skip
def test_a_missing_path_of_an_option_is_reported_with_it(program, option, tmp_path, capsys):
    assert program.main(["--debug", "--output_dir", str(tmp_path / "o"), option, "gone"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{option} gone: no such file or folder" in error and "download" not in error


def test_a_wrong_folder_of_data_names_the_file(tmp_path, capsys):
    (tmp_path / "D").mkdir()
    assert dual_train.main(["--data_dir", str(tmp_path / "D"), "--output_dir", str(tmp_path / "o")]) == 2
    assert "D/train/dual.train.tsv" in capsys.readouterr().err
