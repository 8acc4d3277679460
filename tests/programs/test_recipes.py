"""Named recipes: defaults that options override."""

import dataclasses

import pytest

from script.run_all import split_options
from torch_src import hparams
from torch_src.cross_hparams import CrossHparams
from torch_src.dual_hparams import DualHparams
from torch_src.inference_cross_hparams import InferenceCrossHparams
from torch_src.recipes import RECIPES

PROGRAMS = {"dual_train": DualHparams, "cross_train": CrossHparams, "cross_infer": InferenceCrossHparams}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_sets_what_it_names_and_nothing_else(name, program):
    settings, values = PROGRAMS[program], getattr(RECIPES[name], program)
    plain = dataclasses.asdict(hparams.parse(settings, []))
    found = dataclasses.asdict(hparams.parse(settings, ["--recipe", name]))
    assert found == {**plain, "recipe": name, **values}
    assert all(type(value) is type(plain[knob]) or plain[knob] is None for knob, value in values.items())


def test_options_and_the_models_folder_override_a_recipe_which_overrides_debug():
    words = ["--debug", "--recipe", "few_queries", "--lr", "7e-5"]
    hp = hparams.parse(DualHparams, words, {"normalize": False})
    assert (hp.lr, hp.normalize, hp.batch_size, hp.p_max_seq_len) == (7e-5, False, 64, 208)


def test_an_unknown_recipe_is_refused(capsys):
    with pytest.raises(hparams.UserError, match="--recipe best: expected one of default, official"):
        hparams.parse(CrossHparams, ["--recipe", "best"])


def test_few_queries_add_the_retrievers_score_in_every_way_to_start_them():
    words = split_options(["--recipe", "few_queries"])
    assert hparams.parse(InferenceCrossHparams, words["cross_infer"]).fuse_retriever_weight == 2
    words = split_options(["--recipe", "few_queries", "--fuse_retriever_weight", "0"])
    assert hparams.parse(InferenceCrossHparams, words["cross_infer"]).fuse_retriever_weight == 0
    assert "--recipe" not in words["dual_infer"]


def test_help_lists_the_recipes(capsys):
    with pytest.raises(SystemExit):
        hparams.parse(CrossHparams, ["--help"])
    printed = capsys.readouterr().out
    assert all(f"  {name}: {recipe.purpose}" in printed for name, recipe in RECIPES.items())
    assert "--fgm_epsilon 0.01" in printed
