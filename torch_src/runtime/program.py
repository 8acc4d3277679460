"""Exit statuses of the programs."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from torch_src.runtime.errors import Stopped, UserError, is_out_of_memory


def exit_status(program, *mistakes: type[Exception]) -> int:
    """Run `program()` and return the process's exit status: 0, 2 for a user's mistake (UserError, and what
    else `mistakes` names) or when memory does not suffice, 130 when interrupted.
    """
    try:
        program()
    except (UserError, *mistakes) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        mend = "lower --grad_cache_chunk (training) or --tokens_per_batch; --plan suggests a number"
        what = str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__
        print(f"error: out of memory ({what}); {mend}", file=sys.stderr, flush=True)
        return 2
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        print(f"error: {error.filename or 'system'}: {error.strerror or error}", file=sys.stderr, flush=True)
        return 2
    except Stopped as stop:
        print(stop, file=sys.stderr, flush=True)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print("interrupted: the same command carries on", file=sys.stderr, flush=True)
        return 130
    return 0


def leave(program: Callable[[], int]) -> NoReturn:
    """Run `program()` and end the process with the status that it returns.

    Ctrl-C while `program` is still importing, or is past its work, ends it without a traceback: between the
    two exit_status sees to it.
    """
    sys.unraisablehook = _raise_again
    try:
        status = program()
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(status)


def _raise_again(lost) -> None:
    """Python drops what a signal's handler raises while some object is being deleted: Ctrl-C comes again."""
    if issubclass(lost.exc_type, KeyboardInterrupt):
        again = threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT))
        again.daemon = True
        again.start()
    elif not issubclass(lost.exc_type, Stopped):  # the run knows that it is to stop, and will
        sys.__unraisablehook__(lost)
