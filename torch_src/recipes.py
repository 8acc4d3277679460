"""Named sets of defaults: `--recipe NAME`. An option overrides its recipe."""

from typing import Any, NamedTuple


class Recipe(NamedTuple):
    """The settings of each program that differ from those in its *_hparams.py."""

    purpose: str
    dual_train: dict[str, Any]
    cross_train: dict[str, Any]
    cross_infer: dict[str, Any]


RECIPES = {
    "default": Recipe("the settings as they are in the files", {}, {}, {}),
    "official": Recipe(
        "as the baseline of DuReader-retrieval: spaces removed; pointwise, 256 pairs an update, FGM",
        {"remove_spaces": True},
        {
            "remove_spaces": True, "loss": "pointwise", "batch_size": 256, "fgm_epsilon": 0.01,
            "warmup_proportion": 0.0, "dual_params": "none",
        },
        {},
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
        {"fuse_retriever_weight": 2.0},
    ),
}  # fmt: skip


def values_text(values: dict[str, Any]) -> str:
    """Return settings as on the command line."""
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in values.items())


def table() -> list[str]:
    """Return the recipes as the lines of a Markdown table."""
    programs = Recipe._fields[1:]
    names = " | ".join(f"do_{program}.py" for program in programs)
    lines = [f"| recipe | for | {names} |", f"|---|---{'|---' * len(programs)}|"]
    for name, (purpose, *settings) in RECIPES.items():
        texts = (f"`{values_text(values)}`" if values else "" for values in settings)
        lines.append(f"| `{name}` | {purpose} | {' | '.join(texts)} |")
    return lines
