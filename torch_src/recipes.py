"""Named sets of defaults for the training programs: `--recipe NAME`. An option overrides its recipe."""

from typing import Any, NamedTuple


class Recipe(NamedTuple):
    """The settings of both trainings that differ from those in dual_hparams.py and cross_hparams.py."""

    purpose: str
    dual: dict[str, Any]
    cross: dict[str, Any]


RECIPES = {
    "default": Recipe("the settings as they are in the files", {}, {}),
    "official": Recipe(
        "as the baseline of DuReader-retrieval: spaces removed; pointwise, 256 pairs an update, FGM",
        {"remove_spaces": True},
        {
            "remove_spaces": True, "loss": "pointwise", "batch_size": 256, "fgm_epsilon": 0.01,
            "warmup_proportion": 0.0, "dual_params": "none",
        },
    ),
    "few_queries": Recipe(
        "about a thousand training queries and an encoder tuned for retrieval (E5, BGE, GTE, ...)",
        {
            "share_encoder": True, "normalize": True, "temperature": 0.02, "dropout": 0.0, "batch_size": 64,
            "lr": 5e-5, "epoch": 6,
        },
        {
            "groups_per_step": 4, "lr": 1e-4, "head_lr": 1e-3, "dropout": 0.0,
        },
    ),
}  # fmt: skip


def values_text(values: dict[str, Any]) -> str:
    """Return settings as on the command line."""
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in values.items())


def table() -> list[str]:
    """Return the recipes as the lines of a Markdown table."""
    lines = ["| recipe | for | do_dual_train.py | do_cross_train.py |", "|---|---|---|---|"]
    for name, recipe in RECIPES.items():
        dual, cross = (f"`{values_text(side)}`" if side else "" for side in (recipe.dual, recipe.cross))
        lines.append(f"| `{name}` | {recipe.purpose} | {dual} | {cross} |")
    return lines
