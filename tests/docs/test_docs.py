"""The documents: their links and the files they name exist, and the programs accept their commands."""

import ast
import re
import subprocess
from functools import cache

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

from script.lib import settings_page

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FOLDERS = ("script/", "metric/", "torch_src/", "tests/", "docs/")
FILE = re.compile(r"[\w.*/-]+\.(?:py|sh|md|svg)|requirements[\w-]*\.txt")
PROGRAM = re.compile(r"(?:[\w/.]+/)?(?:python3?|sh|torchrun) |[\w/]+\.(?:py|sh) --")
EXISTING = [path for path in DOCUMENTS if path.exists()]


@cache
def check_once(*words: str) -> None:
    """Check a command that several documents share only once."""
    check(list(words))


def text_of(path) -> str:
    return path.read_text(encoding="utf-8")


def tracked() -> set[str]:
    """Return the paths of the repository's files, including those not yet committed."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:  # an unpacked archive, not a clone
        return {str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if ".venv" not in path.parts}
    return set(listed.stdout.splitlines())


def anchors(text: str) -> set[str]:
    """Return the anchors of a document's headings, as GitHub derives them."""
    headings = re.findall(r"^#+ (.*)$", without_fences(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", EXISTING, ids=lambda path: path.name)
def test_link_targets_exist(path):
    for target in LINK.findall(without_fences(text_of(path))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), f"{path.name}: {target}"
        assert not anchor or anchor in anchors(text_of(file)), f"{path.name}: {target}"


@pytest.mark.parametrize("path", EXISTING, ids=lambda path: path.name)
def test_named_files_exist(path):
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


@pytest.mark.parametrize("path", EXISTING, ids=lambda path: path.name)
def test_programs_accept_every_command(path):
    for words in commands(text_of(path)):
        check_once(*words)


@pytest.mark.parametrize("path", EXISTING, ids=lambda path: path.name)
def test_options_in_running_text_exist(path):
    """`python x.py --option N` in a sentence: the values may be placeholders."""
    for code in INLINE.findall(without_fences(text_of(path))):
        script = re.search(r"[\w/]+\.(?:py|sh)\b", code)
        if not PROGRAM.match(code) or script is None or " -m " in code:
            continue
        own_options = code[code.rindex(script[0]) :]  # options before the script belong to torchrun
        script = SHELLS.get(script[0], script[0])
        if script == "handle.py" or "/bench/plan.py" in script:
            continue
        assert (ROOT / script).is_file(), f"{path.name}: {code}"
        named = {name.rpartition(".")[2] for name in re.findall(r"(?<=--)[\w.]+", own_options)}
        several = script in ("script/run_all.py", "script/run_rounds.py")  # of every program
        if named and not several and not script.endswith(".sh"):
            unknown = {f"--{name}" for name in named} - option_names(script)
            assert not unknown, f"{path.name}: {code}: no {', '.join(unknown)}"


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_a_readme_has_the_commands_of_both_stages(path):
    found = {word for words in commands(text_of(path)) for word in words}
    programs = {name for name in SETTINGS if name.startswith("do_")}
    assert {
        *programs,
        "script/quickstart.sh",
        "script/download.sh",
        "script/try.sh",
        "script/demo.py",
    } <= found


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_a_readme_has_at_most_180_lines(path):
    """Everything else has its place in docs/."""
    assert len(text_of(path).splitlines()) <= 180


def test_the_results_are_short():
    rows = text_of(ROOT / "docs/results.md").splitlines()
    assert len(rows) <= 250 and max(map(len, rows)) <= 110


def test_the_index_names_every_document():
    links = set(LINK.findall(text_of(ROOT / "docs/README.md")))
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert pages - {"README.md"} == links


def literals(path) -> list[str]:
    """Return the string literals of a program, f-strings in pieces between their values."""
    constants = (node for node in ast.walk(ast.parse(text_of(path))) if isinstance(node, ast.Constant))
    return [node.value for node in constants if isinstance(node.value, str)]


TRANSLATED = sorted((ROOT / "docs/zh").glob("*.md"))


def code_lines(text: str) -> list[str]:
    """Return the lines of the code blocks, without blank ones."""
    return [line for _, body in FENCE.findall(text) for line in body.splitlines() if line.strip()]


def quotes(text: str) -> set[str]:
    """Return the quoted names and messages."""
    return set(INLINE.findall(without_fences(text).replace("\n", " ")))


@pytest.mark.parametrize("path", TRANSLATED, ids=lambda path: path.name)
def test_a_translation_has_the_commands_and_messages_of_the_original(path):
    original, translation = text_of(path.parents[1] / path.name), text_of(path)
    assert f"[中文](zh/{path.name})" in original and f"[English](../{path.name})" in translation
    assert code_lines(translation) == code_lines(original)
    assert quotes(translation) == quotes(original)
    assert len(re.findall(r"^#+ ", translation, re.MULTILINE)) == len(
        re.findall(r"^#+ ", original, re.MULTILINE)
    )
    rows = [[len(row.replace(r"\|", "").split("|")) for row in re.findall(r"^\|.*", text, re.MULTILINE)]
            for text in (original, translation)]  # fmt: skip
    assert rows[0] == rows[1]


def keys_of(text: str) -> list[str]:
    """Return what the first column of each table quotes."""
    return [key for row in re.findall(r"^\| (.*?) \| ", text, re.MULTILINE) for key in INLINE.findall(row)]


def test_troubleshooting_quotes_words_of_the_code():
    """The first column of each table quotes a few words of a message, or a name, not a sentence."""
    keys = keys_of(text_of(ROOT / "docs/troubleshooting.md"))
    assert sorted(keys_of(text_of(ROOT / "docs/zh/troubleshooting.md"))) == sorted(keys)
    programs = [
        path for folder in ("torch_src", "metric", "script") for path in (ROOT / folder).rglob("*.py")
    ]
    code = "\n".join(text for path in programs for text in [*literals(path), text_of(path)])
    assert len(keys) > 50
    assert not [key for key in keys if len(key.split()) > 6]
    assert not [key for key in keys if key.removeprefix("--") not in code]


def test_the_page_of_settings_is_current():
    assert text_of(ROOT / "docs/settings.md") == settings_page.page() + "\n"


def test_every_program_in_script_has_a_line_in_its_readme():
    named = set(INLINE.findall(text_of(ROOT / "script/README.md")))
    found = {path.name for path in (ROOT / "script").iterdir() if path.suffix in (".py", ".sh")}
    assert found <= named, found - named
