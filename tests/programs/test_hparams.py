"""Settings: the command line, --debug, ranges, what is printed and saved, paths that follow."""

import dataclasses
import json
from dataclasses import dataclass

import pytest

from torch_src import dual_hparams, hparams, inference_de_hparams
from torch_src.dual_hparams import FIXED_BY_WEIGHTS, DualHparams
from torch_src.inference_de_hparams import InferenceDeHparams
from torch_src.runtime.errors import UserError

PROGRAMS = [
    pytest.param(DualHparams, dual_hparams.DEBUG, id="train"),
    pytest.param(InferenceDeHparams, inference_de_hparams.DEBUG, id="infer"),
]


def train(*argv):
    return hparams.parse(DualHparams, list(argv), dual_hparams.DEBUG)


def infer(*argv):
    return hparams.parse(InferenceDeHparams, list(argv), inference_de_hparams.DEBUG)


@pytest.mark.parametrize("settings, debug", PROGRAMS)
def test_no_options_give_the_defaults_in_the_file(settings, debug):
    assert hparams.parse(settings, [], debug) == settings()


@pytest.mark.parametrize("settings, debug", PROGRAMS)
def test_every_field_is_an_option_with_its_comment_as_help(settings, debug, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as caught:
        hparams.parse(settings, ["--help"], debug)
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"--{field.name}" in shown for field in dataclasses.fields(settings))
    assert "CPU threads of this process; 0: what torch chooses" in shown


@pytest.mark.parametrize("settings, debug", PROGRAMS)
@pytest.mark.parametrize(
    "argv, named",
    [
        (["--nonsense", "1"], "--nonsense"),
        (["--batch_sise", "8"], "--batch_size"),
        (["--batch", "8"], "--batch"),
        (["stray"], "stray"),
        (["--batch_size", "many"], "--batch_size"),
        (["--batch_size", "1.5"], "--batch_size"),
        (["--batch_size"], "--batch_size"),
        (["--debug", "True"], "True"),
    ],
)
def test_unknown_misspelt_or_wrongly_typed_option_exits_with_2(settings, debug, argv, named, capsys):
    with pytest.raises(SystemExit) as caught:
        hparams.parse(settings, argv, debug)
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert named in output.out + output.err


def test_values_take_the_type_of_their_field():
    hp = train("--lr", "1e-4", "--epoch", "3", "--dropout", "0.2", "--normalize", "--query_prefix", "q: ")
    assert (hp.lr, hp.epoch, hp.dropout, hp.normalize, hp.query_prefix) == (1e-4, 3, 0.2, True, "q: ")
    assert isinstance(hp.epoch, int)
    assert train("--warmup_proportion", "0.1", "--weight_decay", "0").warmup_proportion == 0.1
    assert train("--dropout", "None").dropout is None
    assert (infer().topk, infer("--topk", "7").topk) == (None, 7)


@pytest.mark.parametrize(
    "argv, value",
    [
        ([], None),
        (["--normalize"], True),
        (["--no_normalize"], False),
        (["--no-normalize", "--topk", "3"], False),
        (["--normalize", "False"], False),
        (["--normalize=False"], False),
        (["--normalize", "--no_normalize"], False),
    ],
)
def test_flag_fixed_by_the_weights_is_unset_on_or_off(argv, value):
    assert infer(*argv) == InferenceDeHparams(normalize=value, topk=3 if "3" in argv else None)


@pytest.mark.parametrize("settings, debug", PROGRAMS)
def test_debug_lowers_the_defaults_and_nothing_else(settings, debug):
    hp = hparams.parse(settings, ["--debug"], debug)
    assert debug and all(getattr(hp, name) == value for name, value in debug.items())
    assert dataclasses.replace(settings(), **debug, debug=True) == hp
    assert hp.output_dir != settings().output_dir


@pytest.mark.parametrize("argv", [["--debug", "--epoch", "2"], ["--epoch=2", "--debug"]])
def test_explicit_option_wins_over_debug_wherever_it_stands(argv):
    hp = train(*argv)
    assert hp.debug and hp.epoch == 2
    assert hp.lr == dual_hparams.DEBUG["lr"]


def test_option_given_its_file_default_still_wins_over_debug():
    default = DualHparams().p_max_seq_len
    assert default != dual_hparams.DEBUG["p_max_seq_len"]
    assert train("--debug", "--p_max_seq_len", str(default)).p_max_seq_len == default


def test_last_of_debug_and_no_debug_counts():
    assert train("--debug", "--no_debug") == DualHparams()
    assert train("--no_debug", "--debug") == train("--debug")


@dataclass(frozen=True)
class Edited:
    """Settings whose file was edited to debug."""

    lr: float = 1.0  # a rate
    debug: bool = True  # small

    def check(self):
        pass


def test_debug_edited_in_the_file_lowers_defaults_until_no_debug():
    assert hparams.parse(Edited, [], {"lr": 0.5}) == Edited(lr=0.5)
    assert hparams.parse(Edited, ["--no_debug"], {"lr": 0.5}) == Edited(lr=1.0, debug=False)


BAD_TRAIN = (
    "pooling=max precision=int8 epoch=0 batch_size=0 accumulation_steps=0 tokens_per_batch=0 log_every=0 "
    "hard_negatives=-1 max_steps=-1 dev_random_passages=-1 early_stop=-1 threads=-1 weight_decay=-0.1 "
    "q_max_seq_len=2 p_max_seq_len=2 lr=0 lr=nan lr=inf temperature=0 temperature=-1 max_grad_norm=0 "
    "warmup_proportion=-0.1 warmup_proportion=1.1 dropout=-0.1 dropout=1 eval_every=-2 seed=-1"
).split()
BAD_INFER = (
    "pooling=max precision=int8 batch_size=0 block_rows=0 topk=0 bs=0 tokens_per_batch=-1 log_every=0 "
    "threads=-1 q_max_seq_len=0 q_max_seq_len=1 p_max_seq_len=1 workers=-2 search_memory_gb=0 "
    "search_product=int4 recall_queries=-1"
).split()


@pytest.mark.parametrize(
    "program, option", [(train, option) for option in BAD_TRAIN] + [(infer, option) for option in BAD_INFER]
)
def test_value_out_of_range_is_a_user_error_naming_option_and_value(program, option):
    name, value = option.split("=")
    with pytest.raises(UserError) as caught:
        program(f"--{option}")
    message = str(caught.value)
    assert message.startswith(f"--{name} ") and value in message
    assert "must be" in message or "expected one of" in message


def test_values_at_their_limits_are_accepted():
    assert train("--eval_every", "-1", "--warmup_proportion", "1", "--q_max_seq_len", "3").eval_every == -1
    assert train("--dropout", "0", "--hard_negatives", "0", "--warmup_proportion", "0").dropout == 0
    assert infer("--pooling", "mean", "--topk", "1", "--bs", "1").pooling == "mean"


def test_describe_stars_what_differs_and_shows_the_default():
    lines = hparams.describe(train("--lr", "0.001", "--epoch", "10"))
    assert len(lines) == len(dataclasses.fields(DualHparams))
    assert [line for line in lines if line.startswith("*")] == ["* lr = 0.001   (default 3e-05)"]
    assert "  epoch = 10" in lines
    starred = {line.split()[1] for line in hparams.describe(train("--debug")) if line.startswith("*")}
    changed = {name for name, value in dual_hparams.DEBUG.items() if value != getattr(DualHparams(), name)}
    assert starred == {"debug", *changed}


def test_announce_prints_every_setting_and_where_debug_results_go(capsys):
    hp = train("--debug", "--output_dir", "elsewhere")
    hparams.announce("training", hp)
    shown = [line[9:] for line in capsys.readouterr().out.split("\n")]  # without the time
    assert all(f"  {line}" in shown for line in hparams.describe(hp))
    assert "results go to elsewhere" in shown[-2]


def test_save_writes_all_settings_and_more(tmp_path):
    hp = train("--query_prefix", "问：")
    hparams.save(hp, tmp_path / "new" / "hp.json", steps=7)
    saved = json.loads((tmp_path / "new" / "hp.json").read_text(encoding="utf-8"))
    assert saved == {**dataclasses.asdict(hp), "steps": 7}


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
    assert train("--train_set", "t.tsv", "--dev_candidates", "c").train_set_path == "t.tsv"
    assert train("--dev_candidates", "c").dev_candidates_path == "c"


def test_inference_paths_follow_output_dir_and_the_query_file():
    hp = infer("--output_dir", "O", "--dev_q", "Q/test.q.format")
    assert hp.dual_params_path == "O/dual_params.bin"
    assert (hp.dev_q_path, hp.dev_q2qid_path) == ("Q/test.q.format", "Q/q2qid.dev.json")
    assert infer("--data_dir", "D").dev_q2qid_path == "D/dev/q2qid.dev.json"
    assert infer("--dual_params", "w.bin", "--dev_q2qid", "none").dual_params_path == "w.bin"


def test_what_the_weights_fix_is_an_unset_option_of_inference():
    for name in FIXED_BY_WEIGHTS:
        assert hasattr(DualHparams(), name)
        assert getattr(InferenceDeHparams(), name) is None


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        train().lr = 1.0
