"""Settings: options, --debug, --help, ranges, what is printed and saved, paths that follow a folder."""

import dataclasses
import gzip
import json
import math
import socket
from dataclasses import dataclass
from pathlib import Path

import pytest
from doc_commands import ROOT, SETTINGS

from torch_src import dual_train, hparams
from torch_src.dual_hparams import MODEL_SETTINGS, DualHparams
from torch_src.hparams import Hparams, inherited
from torch_src.inference_de_hparams import InferenceDeHparams
from torch_src.query_ids import read_query_ids
from torch_src.runtime.errors import UserError

ALL = pytest.mark.parametrize("settings", SETTINGS.values(), ids=lambda settings: settings.__name__)


def train(*argv: str) -> DualHparams:
    return hparams.parse(DualHparams, list(argv))


def infer(*argv: str) -> InferenceDeHparams:
    return hparams.parse(InferenceDeHparams, list(argv))


@ALL
def test_without_options_settings_are_the_defaults(settings):
    assert hparams.parse(settings, []) == settings()


@ALL
def test_help_shows_every_knob_with_comment_default_and_choices(settings, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as caught:
        hparams.parse(settings, ["--epoch", "x", "--help"])
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    comments, fields = hparams.knob_comments(settings), dataclasses.fields(settings)
    assert set(comments) == {field.name for field in fields}
    for field in fields:
        (at,) = [at for at, line in enumerate(lines) if line.startswith(f"  --{field.name}") and
                 line.split()[0].rstrip(",") == f"--{field.name}"]  # fmt: skip
        shown = " ".join(lines[at : at + 2])
        group, comment = comments[field.name]
        assert group in hparams.GROUPS and comment in shown
        assert field.default in (None, "", ()) or f"default {field.default}" in shown
        assert all(choice in shown for choice in inherited(settings, "CHOICES").get(field.name, ()))
    first = [line for line in lines if line.endswith(":") and not line.startswith(" ")][0]
    assert first == "main options:"


@ALL
def test_every_number_has_a_range_that_contains_its_default(settings):
    ranges, settings_now = inherited(settings, "RANGES"), settings()
    for field in dataclasses.fields(settings):
        if field.type in (int, float, int | None, float | None):
            low, high = (*ranges[field.name], math.inf)[:2]
            assert field.default is None or low <= getattr(settings_now, field.name) <= high
    assert set(ranges) <= {field.name for field in dataclasses.fields(settings)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "argv, named",
    [
        (["--batch_sise", "8"], "--batch_size"),
        (["stray"], "stray"),
        (["--batch_size", "many"], "--batch_size"),
    ],
)
def test_malformed_option_exits_with_2_and_is_named(argv, named, capsys):
    with pytest.raises(SystemExit) as caught:
        hparams.parse(DualHparams, argv)
    assert caught.value.code == 2
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert named in line and " ERROR " in line and not output.out


def test_values_have_the_type_of_their_field():
    hp = train("--lr", "1e-4", "--epoch", "3", "--dropout", "0.2", "--normalize", "--query_prefix", "q: ")
    assert (hp.lr, hp.epoch, hp.dropout, hp.normalize, hp.query_prefix) == (1e-4, 3, 0.2, True, "q: ")
    assert isinstance(hp.epoch, int)
    assert train("--dropout", "None").dropout is None
    assert (infer().topk, infer("--topk", "7").topk) == (None, 7)


@pytest.mark.parametrize("program", [train, infer])
@pytest.mark.parametrize(
    "argv, value",
    [
        (["--normalize"], True),
        (["--no_normalize"], False),
        (["--no-normalize", "--seed", "3"], False),
        (["--normalize", "False"], False),
        (["--normalize", "True", "--query_prefix", "False"], True),
        (["--normalize=False"], False),
        (["--normalize", "--no_normalize"], False),
    ],
)
def test_flags_have_one_syntax(program, argv, value):
    assert program(*argv).normalize is value
    assert infer().normalize is None


@ALL
def test_debug_changes_only_its_own_defaults(settings):
    debug = inherited(settings, "DEBUG")
    hp = hparams.parse(settings, ["--debug"])
    assert hp == dataclasses.replace(settings(), **debug, debug=True) == settings.defaults(True)
    assert hp.output_dir != settings().output_dir


@pytest.mark.parametrize("argv", [["--debug", "--epoch", "2"], ["--epoch=2", "--debug"]])
def test_an_option_wins_over_debug(argv):
    hp = train(*argv)
    assert hp.debug and hp.epoch == 2 and hp.lr == DualHparams.DEBUG["lr"]


def test_an_option_that_repeats_the_default_still_wins_over_debug():
    default = DualHparams().p_max_seq_len
    assert default != DualHparams.DEBUG["p_max_seq_len"]
    assert train("--debug", "--p_max_seq_len", str(default)).p_max_seq_len == default


def test_the_last_of_debug_and_no_debug_counts():
    assert train("--debug", "--no_debug") == DualHparams()
    assert train("--no_debug", "--debug") == train("--debug")


@dataclass(frozen=True)
class Edited(Hparams):
    """Settings whose file was edited to debug."""

    debug: bool = True  # small
    lr: float = 1.0  # a rate

    DEBUG = {"lr": 0.5}


def test_debug_edited_in_the_file_counts_until_no_debug():
    assert hparams.parse(Edited, []).lr == 0.5
    assert hparams.parse(Edited, ["--no_debug"]) == Edited(debug=False)


def test_precedence_is_option_then_model_folder_then_debug_then_default(tmp_path):
    modules = [{"type": f"x.{kind}", "path": kind} for kind in ("Transformer", "Pooling", "Normalize")]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "Pooling").mkdir()
    (tmp_path / "Pooling/config.json").write_text('{"pooling_mode_cls_token": true}')
    prompts = {"prompts": {"query": "q: ", "passage": "p: "}}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    words = ["--debug", "--pretrained_model_path", str(tmp_path), "--query_prefix", ""]
    hp = dual_train.settings(words)
    assert (hp.pooling, hp.normalize, hp.query_prefix, hp.passage_prefix) == ("cls", True, "", "p: ")
    assert train(*words).pooling == DualHparams.DEBUG["pooling"]  # parsing reads no model folder


@pytest.mark.parametrize("words", [[], ["--help"], ["--pretrained_model_path", "intfloat/no-such-model"]])
def test_parsing_and_help_use_no_network(words, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    try:
        train(*words)
    except SystemExit as done:
        assert done.code == 0


BAD_TRAIN = (
    "pooling=median precision=int8 distill_loss=mse epoch=0 batch_size=0 accumulation_steps=0 log_every=0 "
    "tokens_per_batch=-1 hard_negatives=-1 max_steps=-1 dev_random_passages=-1 early_stop=-1 threads=-1 "
    "weight_decay=-0.1 q_max_seq_len=2 p_max_seq_len=2 lr=0 lr=nan lr=inf temperature=0 temperature=-1 "
    "max_grad_norm=0 warmup_proportion=-0.1 warmup_proportion=1.1 dropout=-0.1 dropout=1 eval_every=-2 "
    "seed=-1 weight_decay=nan save_every_minutes=inf ema_decay=1 seed=99999999999999999999"
).split()
BAD_INFER = (
    "pooling=median precision=int8 engine=faiss batch_size=0 block_rows=0 topk=0 bs=0 threads=-1 "
    "q_max_seq_len=0 q_max_seq_len=1 p_max_seq_len=1 workers=-2 search_memory_gb=0 "
    "search_memory_gb=nan recall_queries=-1"
).split()


@pytest.mark.parametrize(
    "program, option", [(train, option) for option in BAD_TRAIN] + [(infer, option) for option in BAD_INFER]
)
def test_a_value_that_is_not_allowed_is_a_user_error_of_one_line(program, option):
    name, value = option.split("=")
    with pytest.raises(UserError) as caught:
        program(f"--{option}")
    message = str(caught.value)
    assert message.startswith(f"--{name} ") and value in message and "\n" not in message


def test_a_value_out_of_range_exits_with_2(capsys):
    assert dual_train.main(["--lr", "nan"]) == 2
    assert "--lr nan" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, named",
    [
        ("--early_stop 2 --eval_every -1", "--early_stop"),
        ("--distill_loss kl --hard_negatives 0", "--distill_loss"),
        ("--teacher a.tsv", "--teacher requires --distill_loss"),
        ("--distill_temperature 2", "--distill_temperature requires --distill_loss"),
        ("--batch_size 1 --hard_negatives 0", "--batch_size"),
    ],
)
def test_options_that_contradict_each_other_are_named(argv, named):
    with pytest.raises(UserError, match=named):
        train(*argv.split())


def test_values_at_their_limits_are_accepted():
    assert train("--eval_every", "-1", "--warmup_proportion", "1", "--q_max_seq_len", "3").eval_every == -1
    assert train("--dropout", "0", "--hard_negatives", "0", "--warmup_proportion", "0").dropout == 0
    assert infer("--pooling", "mean", "--topk", "1", "--bs", "1").pooling == "mean"


def test_an_option_of_several_values(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hp = train("--distill_loss", "kl", "--teacher", "a b.tsv", "c.tsv", "--lr", "0.1")
    assert hp.teacher == ("a b.tsv", "c.tsv") and hp.lr == 0.1 and train().teacher == ()
    assert hp.to_save()["teacher"] == [str(tmp_path / "a b.tsv"), str(tmp_path / "c.tsv")]
    assert set(hp.teacher) <= set(hp.inputs)
    assert "teacher 'a b.tsv' c.tsv ('')" in hparams.describe(hp)
    assert "--teacher STR [STR ...]" in hparams.help_text(DualHparams)


def test_only_changed_settings_are_printed_with_their_defaults(capsys):
    assert hparams.describe(train("--lr", "0.001", "--epoch", "10")) == ["lr 0.001 (3e-05)"]
    hparams.announce("training", train("--debug", "--output_dir", "elsewhere", "--query_prefix", "q: "))
    first, second = capsys.readouterr().out.splitlines()
    assert "training" in first and "--debug" in first and "elsewhere/dual_hparams.json" in first
    assert second.endswith(" defaults: output_dir elsewhere (output/debug), query_prefix 'q: ' ('')")
    hparams.announce("training", train("--debug"))
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_default_paths_lead_to_the_repository_and_given_ones_to_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hp = train("--debug", "--train_set", "mine.tsv")
    assert (hp.output_dir, hp.data_dir) == (str(ROOT / "output/debug"), str(ROOT / "script/sample_data"))
    assert Path(hp.pretrained_model_path).is_absolute() and Path(hp.pretrained_model_path).exists()
    assert hp.train_set_path == "mine.tsv" and hparams.describe(hp) == ["train_set mine.tsv ('')"]
    saved = hp.to_save()
    assert (saved["output_dir"], saved["data_dir"]) == ("output/debug", "script/sample_data")
    assert saved["train_set"] == str(tmp_path / "mine.tsv")
    assert train("--pretrained_model_path", "owner/name").to_save()["pretrained_model_path"] == "owner/name"
    assert str(ROOT / "output") in hparams.help_text(DualHparams)


def test_save_writes_all_settings_the_commit_and_more(tmp_path, monkeypatch):
    hp = train("--query_prefix", "问：")
    hparams.save(hp, tmp_path / "new" / "hp.json", steps=7)
    saved = json.loads((tmp_path / "new" / "hp.json").read_text(encoding="utf-8"))
    commit = hparams.commit()  # empty in an unpacked archive
    wanted = {**dataclasses.asdict(hp), "teacher": [], "steps": 7, "commit": commit}
    assert saved == wanted and "\n" not in commit
    monkeypatch.setattr(hparams, "ROOT", tmp_path)
    assert hparams.commit() == ""


def test_derived_paths_follow_data_dir_and_an_explicit_path_wins():
    for hp in (train("--data_dir", "D"), infer("--data_dir", "D")):
        assert hp.passage_dir_path == "D/passage-collection"
        assert hp.passage_ids_path == "D/passage-collection/passage2id.map.json"
    hp = train("--data_dir", "D", "--dev_set", "x.json", "--passage_dir", "P", "--output_dir", "O")
    assert (hp.train_set_path, hp.dev_set_path) == ("D/train/dual.train.tsv", "x.json")
    assert (hp.passage_dir_path, hp.passage_ids_path) == ("P", "P/passage2id.map.json")
    assert hp.dev_candidates_path == "D/auxiliary/dev.retrieval.top50.res.tsv"
    assert hp.params_path == "O/dual_params.bin"
    assert train("--passage_ids", "ids.json", "--passage_dir", "P").passage_ids_path == "ids.json"
    assert train("--train_set", "t.tsv").train_set_path == "t.tsv"
    assert train("--dev_candidates", "c").dev_candidates_path == "c"


def test_inference_paths_follow_output_dir_and_the_query_file():
    hp = infer("--output_dir", "O", "--dev_q", "Q/test.q.format")
    assert hp.dual_params_path == "O/dual_params.bin"
    assert (hp.dev_q_path, hp.dev_q2qid_path) == ("Q/test.q.format", "Q/q2qid.dev.json")
    assert infer("--data_dir", "D").dev_q2qid_path == "D/dev/q2qid.dev.json"
    assert infer("--dual_params", "w.bin", "--dev_q2qid", "none").dual_params_path == "w.bin"


def test_model_settings_are_unset_options_of_inference():
    for name in MODEL_SETTINGS:
        assert hasattr(DualHparams(), name)
        assert getattr(InferenceDeHparams(), name) is None


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        train().lr = 1.0


@pytest.mark.parametrize("name, content", [
    ("test1.json", '{"question_id": 7, "question": "蒸鱼"}\n'), ("q.jsonl", '{"_id": "7", "text": "蒸鱼"}\n'),
    ("queries.tsv", "qid\ttext\n7\t蒸鱼\n"), ("topics.txt", "7\t蒸鱼\n"),
])  # fmt: skip
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gz"])
def test_query_files_with_ids_need_no_q2qid(tmp_path, capsys, name, content, pack):
    path = tmp_path / (name + (".gz" if pack is gzip.compress else ""))
    path.write_bytes(pack(content.encode()))
    assert read_query_ids(infer("--dev_q", str(path))) == {"蒸鱼": ["7"]}
    assert read_query_ids(infer("--dev_q", str(path), "--dev_q2qid", "other.json")) == {"蒸鱼": ["7"]}
    assert "--dev_q2qid other.json" in capsys.readouterr().err  # not read
