"""One live line on a terminal that log lines do not disturb; log lines at growing intervals elsewhere."""

import os
import pty
import subprocess
import sys

from doc_commands import ROOT

from torch_src.runtime.progress import Progress

LOOP = """
from torch_src.runtime import log
from torch_src.runtime.progress import Progress
progress = Progress(40, 1e-9, "counted", "things")
for at in range(40):
    progress.add(1)
    if at == 20:
        log.log("a log line")
        log.warn("a warning")
{end}
"""


def on_a_terminal(code: str) -> str:
    """Return what a program prints on a terminal of 80 columns."""
    main, side = pty.openpty()
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, cwd=ROOT, stdout=side, stderr=side)
    os.close(side)
    printed = b""
    try:
        while block := os.read(main, 4096):
            printed += block
    except OSError:  # the program has ended
        pass
    process.wait()
    os.close(main)
    return printed.decode()


def on_screen(printed: str) -> list[str]:
    """Return the lines that stay on the screen: a carriage return goes to the start of the line."""
    lines = []
    for line in printed.replace("\r\n", "\n").split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.replace("\x1b[A", "").rstrip())
    return lines


def test_a_terminal_shows_one_live_line_below_the_log_lines():
    printed = on_a_terminal(LOOP.format(end="progress.close()"))
    assert "/40 [" in printed  # the live line
    first, second, last, nothing = on_screen(printed)
    assert first.endswith(" a log line") and second.endswith(" WARNING a warning")
    assert " counted 40 things in " in last and not nothing


def test_an_error_leaves_no_live_line():
    printed = on_a_terminal(LOOP.format(end='log.error("an error")'))
    lines = [line[9:] for line in on_screen(printed)]
    assert lines == ["a log line", "WARNING a warning", "ERROR an error", ""]


def test_lines_of_a_long_loop_grow_apart(capsys):
    now = [0.0]
    progress = Progress(10**6, 10, clock=lambda: now[0])
    for _ in range(36_000):
        now[0] += 1
        progress.add(1)
    assert 100 < len(capsys.readouterr().out.splitlines()) < 150  # ten hours
