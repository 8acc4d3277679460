"""The documents: what they link to and name is there, their commands are ones that the programs take, both
READMEs say the same, and what can run on a tiny world runs.
"""

import ast
import re
import subprocess

import pytest
from doc_commands import (
    DOCUMENTS,
    FENCE,
    INLINE,
    READMES,
    ROOT,
    SETTINGS,
    SHELLS,
    check,
    commands,
    option_names,
    without_fences,
)

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FOLDERS = ("script/", "metric/", "torch_src/", "tests/", "docs/")
FILE = re.compile(r"[\w.*/-]+\.(?:py|sh|md|svg)|requirements[\w-]*\.txt")
PROGRAM = re.compile(r"(?:[\w/.]+/)?(?:python3?|sh|torchrun) |[\w/]+\.(?:py|sh) --")
THERE = [path for path in DOCUMENTS if path.exists()]


def text_of(path) -> str:
    return path.read_text(encoding="utf-8")


def tracked() -> set[str]:
    """Return the paths of the repository's files, those not committed yet, too."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:  # not a clone: an unpacked archive
        return {str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if ".venv" not in path.parts}
    return set(listed.stdout.splitlines())


def anchors(text: str) -> set[str]:
    """Return what a heading can be linked by, as GitHub makes it."""
    heads = re.findall(r"^#+ (.*)$", without_fences(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", THERE, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in LINK.findall(without_fences(text_of(path))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), f"{path.name}: {target}"
        assert not anchor or anchor in anchors(text_of(file)), f"{path.name}: {target}"


@pytest.mark.parametrize("path", THERE, ids=lambda path: path.name)
def test_files_that_are_named_are_there(path):
    """A path from the root, or a file by its bare name."""
    files = tracked()
    names = {name.rsplit("/", 1)[-1] for name in files}
    for word in re.findall(r"[^\s]+", " ".join(INLINE.findall(without_fences(text_of(path))))):
        word = word.rstrip(":,")
        if not FILE.fullmatch(word) or "..." in word:
            continue
        if "*" in word:
            assert list(ROOT.glob(word)), f"{path.name}: {word}"
        elif word.startswith(FOLDERS):
            assert word in files, f"{path.name}: {word}"
        elif "/" not in word:
            assert word in names, f"{path.name}: {word}"


@pytest.mark.parametrize("path", THERE, ids=lambda path: path.name)
def test_every_command_is_one_that_the_program_takes(path):
    for words in commands(text_of(path)):
        check(words)


@pytest.mark.parametrize("path", THERE, ids=lambda path: path.name)
def test_options_named_in_running_text_are_there(path):
    """`python x.py --option N` in a sentence: values may be letters that stand for something."""
    for code in INLINE.findall(without_fences(text_of(path))):
        script = re.search(r"[\w/]+\.(?:py|sh)\b", code)
        if not PROGRAM.match(code) or script is None or " -m " in code:
            continue
        own = code[code.rindex(script[0]) :]  # what stands before is torchrun's
        script = SHELLS.get(script[0], script[0])
        if script == "handle.py" or "/bench/plan.py" in script:
            continue
        assert (ROOT / script).is_file(), f"{path.name}: {code}"
        asked = {name.rpartition(".")[2] for name in re.findall(r"(?<=--)[\w.]+", own)}
        several = script in ("script/run_all.py", "script/run_rounds.py")  # every program's
        if asked and not several and not script.endswith(".sh"):
            unknown = {f"--{name}" for name in asked} - option_names(script)
            assert not unknown, f"{path.name}: {code}: no {', '.join(unknown)}"


def said_by_the_code() -> str:
    """Return all texts of the programs, a blank line between two, what is filled in as `...`."""
    texts = []
    for path in [*ROOT.glob("torch_src/**/*.py"), *ROOT.glob("metric/*.py"), *ROOT.glob("script/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n\n".join(texts)


def test_symptoms_are_messages_of_the_code():
    """Every message in the first column of the tables; `...` stands for what is filled in, and for more."""
    said = said_by_the_code()
    text = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)`", text, re.MULTILINE)
    assert len(messages) > 60
    lost = [m for m in messages for part in re.split(r"\.\.\.", m) if part.strip(" ():;,") not in said]
    assert not lost, "\n".join(dict.fromkeys(lost))


def test_the_readme_gives_every_program_a_command():
    found = {word for words in commands(text_of(READMES[0])) for word in words}
    assert {*SETTINGS, "script/quickstart.sh", "script/test.sh", "script/download.sh"} <= found


def test_both_readmes_give_the_same():
    """Commands in the same order; as many headings, tables, other blocks: the words may differ."""
    one, other = map(text_of, READMES)
    assert commands(one) == commands(other)
    for pattern in (r"^#+ ", r"^\|[-|: ]+\|$"):
        counts = [len(re.findall(pattern, without_fences(text), re.MULTILINE)) for text in (one, other)]
        assert counts[0] == counts[1], f"{pattern}: {counts}"
    assert len(FENCE.findall(one)) == len(FENCE.findall(other))


@pytest.mark.parametrize(
    "command",
    [
        "python do_dual_train.py --epochs 3",
        "CUDA_VISIBLE_DEVICES=0 nohup python3 do_dual_infer.py --topk many > log 2>&1 &",
        "python script/bm25.py search --folder D",
        "python script/bench/search.py --lines 3",
        "python metric/evaluation.py dev.json",
        "python script/no_such.py",
        "torchrun --nproc_per_node 4 do_dual_train.py --batchsize 3",
        "sh script/run_all.sh --from nowhere",
        "sh script/run_rounds.sh --debug",
        "sh script/download.sh models",
        "curl http://example.org",
    ],
)
def test_a_wrong_command_is_noticed(command):
    with pytest.raises((AssertionError, ValueError)):
        check(command.split())
