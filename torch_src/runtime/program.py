"""Exit statuses of the programs."""

import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from torch_src.runtime import log
from torch_src.runtime.errors import Stopped, UserError, is_out_of_memory

INTERRUPTED = 128 + signal.SIGINT


def exit_status(program, *mistakes: type[Exception]) -> int:
    """Run `program()` and return the process's exit status: 0, 2 for a user's mistake (UserError, and what
    else `mistakes` names) or when memory does not suffice, 130 when interrupted.
    """
    try:
        program()
    except (UserError, *mistakes) as mistake:
        log.error(str(mistake))
        return 2
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        mend = "lower --grad_cache_chunk (training) or --batch_size (inference); --plan suggests a number"
        what = str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__
        log.error(f"out of memory ({what}); {mend}")
        return 2
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        log.error(f"{error.filename or 'system'}: {error.strerror or error}")
        return 2
    except Stopped as stop:
        log.warn(str(stop))
        return 128 + stop.signum
    except KeyboardInterrupt:
        log.warn("interrupted; the same command resumes")
        return INTERRUPTED
    return 0


def leave(program: Callable[[], int]) -> NoReturn:
    """Run `program()` and end the process with the exit status that it returns.

    SIGINT ends the process at once, also within imports, destructors and C code: every file is written
    atomically, so nothing needs to be undone. Training replaces this handler with its own.
    """
    main_process = os.getpid()

    def interrupted(_signum: int, _frame: object) -> NoReturn:
        try:
            if os.getpid() == main_process:  # a worker process exits silently
                log.warn("interrupted; the same command resumes")
        finally:
            os._exit(INTERRUPTED)

    signal.signal(signal.SIGINT, interrupted)
    sys.exit(program())
