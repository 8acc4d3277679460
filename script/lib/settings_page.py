"""docs/settings.md: every option of the programs, from the comments of their settings.

python -m script.lib.settings_page > docs/settings.md
"""

import dataclasses

from script import run_all
from torch_src import recipes
from torch_src.hparams import GROUPS, inherited, knob_comments, option_text
from torch_src.tools.demo_hparams import DemoHparams
from torch_src.tools.mining_hparams import MiningHparams
from torch_src.tools.serve_hparams import ServeHparams

PROGRAMS: run_all.Programs = {
    **run_all.PROGRAMS,
    "mine": MiningHparams,
    "demo": DemoHparams,
    "serve": ServeHparams,
}
HEAD = """# Settings

Every option of the four programs, of `script/mine_negatives.py` (mine), `script/demo.py` (demo) and
`script/serve.py` (serve). Edit a default in `torch_src/*_hparams.py`, or pass `--name value`; a switch that
is on is turned off by `--no_name`. `--help` of a program prints its own. Written by
`python -m script.lib.settings_page > docs/settings.md`.
"""


def rows() -> dict[str, dict[tuple[str, str, str], list[str]]]:
    """Return {group: {(option, default, text): programs}} as declared."""
    found: dict[str, dict[tuple[str, str, str], list[str]]] = {group: {} for group in GROUPS}
    for program, settings in PROGRAMS.items():
        comments, debug = knob_comments(settings), inherited(settings, "DEBUG")
        for field in dataclasses.fields(settings):
            group, text = comments[field.name]
            default = f"`{option_text(field.default)}`" if field.default != "" else "empty"
            if field.name in debug:
                default += f"; with `--debug` `{option_text(debug[field.name])}`"
            row = (f"`{field.name}`", default, text.replace("|", r"\|"))
            found[group].setdefault(row, []).append(program)
    return found


def page() -> str:
    """Return the page in Markdown."""
    lines = [HEAD, "## Recipes", "", "`--recipe NAME` in training and re-ranking:", "", *recipes.table(), ""]
    for group, options in rows().items():
        lines += [
            f"## {group.capitalize()}",
            "",
            "| option | default | programs | what |",
            "|---|---|---|---|",
        ]
        order = list(dict.fromkeys(name for name, _, _ in options))
        same_name = sorted(options.items(), key=lambda item: order.index(item[0][0]))
        for (name, default, text), programs in same_name:
            names = "all" if len(programs) == len(PROGRAMS) else ", ".join(programs)
            lines.append(f"| {name} | {default} | {names} | {text} |")
        lines.append("")
    return "\n".join(lines).rstrip("\n")


if __name__ == "__main__":
    print(page())
