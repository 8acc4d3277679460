"""Why an optional library cannot be imported is reported, whatever its import raises."""

import sys

import pytest

from torch_src.runtime.errors import UserError
from torch_src.runtime.libraries import describe_broken, describe_missing, import_library


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Return a function that writes the module `fake_library` with this text."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(text: str) -> None:
        (tmp_path / "fake_library.py").write_text(text)
        sys.modules.pop("fake_library", None)

    yield write
    sys.modules.pop("fake_library", None)


def reason() -> str:
    with pytest.raises(UserError) as caught:
        import_library("fake_library", "requirements-x.txt", "fake-library")
    message = str(caught.value)
    assert message.startswith("fake-library ") and "\n" not in message
    return message


def test_a_library_is_returned(fake):
    fake("value = 3")
    assert import_library("fake_library", "requirements-x.txt").value == 3


def test_a_missing_library_names_the_requirements():
    assert "is not installed" in reason() and "requirements-x.txt" in reason()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("import missing_dependency", "missing_dependency"),
        ("import fake_library.missing_part", "missing_part"),
        ("raise ImportError('Using SOCKS proxy, but socksio is not installed.')", "SOCKS proxy"),
        ("raise ImportError('libGL.so.1: cannot open shared object file')", "libGL.so.1"),
        ("raise ValueError('Unknown scheme for proxy URL')", "proxy URL"),
        ("raise RuntimeError('first line\\nsecond line')", "first line"),
        ("raise AttributeError", "AttributeError"),
        ("nonsense(", "SyntaxError"),
    ],
)
def test_a_library_that_is_installed_but_fails_says_why(fake, text, named):
    fake(text)
    message = reason()
    assert "not installed; run" not in message and named in message


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (ModuleNotFoundError("No module named 'safetensors'", name="safetensors"), "safetensors is not in"),
        (ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib"), "requirements-demo.txt"),
        (ModuleNotFoundError("No module named 'ir_measures'", name="ir_measures"), "requirements-tools.txt"),
        (ImportError("cannot import name 'x' from 'transformers'", name="transformers"), "'x'"),
    ],
)
def test_a_missing_package_names_the_fitting_requirements(error, named):
    assert named in describe_missing(error) and "pip install -r requirements" in describe_missing(error)


def error_of(code: str) -> BaseException:
    with pytest.raises(Exception) as caught:
        exec(code, {"__name__": "torch_src.x"})
    return caught.value


@pytest.mark.parametrize(
    "text", ["import ctypes; ctypes.CDLL('lost.so')", "raise ImportError('broken')", None]
)
def test_a_half_installed_package_is_one_line(fake, tmp_path, text):
    if text:
        fake(text)
    else:
        (tmp_path / "fake_library").mkdir()  # without its files
    error = error_of("import fake_library; fake_library.array")
    line = describe_broken(error, error.__traceback__)
    assert line.startswith("fake_library in ") and type(error).__name__ in line and "pip install" in line


@pytest.mark.parametrize("code", ["None.x", "import json; json.loads('{')", "raise KeyError('x')"])
def test_an_error_of_this_project_is_a_traceback(code):
    error = error_of(code)
    assert describe_broken(error, error.__traceback__) == ""


@pytest.mark.parametrize("name", ["torch_src.data.lost", "script.lib.lost", "json.lost", None])
def test_a_missing_module_of_this_project_is_a_traceback(name):
    assert describe_missing(ModuleNotFoundError(name=name)) == ""
