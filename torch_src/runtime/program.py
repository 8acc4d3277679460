"""Exit statuses of the programs."""

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from torch_src.runtime import log
from torch_src.runtime.errors import Stopped, UserError, first_line, is_out_of_memory

INTERRUPTED = 128 + signal.SIGINT


def exit_status(program: Callable[[], object], *mistakes: type[Exception]) -> int:
    """Run `program()` and return the exit status of the process.

    0: success. 2: a mistake of the user (UserError, OSError, and the types in `mistakes`) or not enough
    memory, logged as one line. 128 + signal: stopped or interrupted.
    """
    expected: tuple[type[Exception], ...] = (UserError, *mistakes)
    try:
        program()
    except expected as mistake:
        log.error(str(mistake))
        return 2
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        fix = "lower --grad_cache_chunk (training) or --batch_size (inference); --plan suggests a number"
        log.error(f"out of memory ({first_line(error).split('. ')[0]}); {fix}")
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

    def interrupted(_signum: int, _frame: FrameType | None) -> NoReturn:
        try:
            if os.getpid() == main_process:  # a worker process exits silently
                log.warn("interrupted; the same command resumes")
        finally:
            os._exit(INTERRUPTED)

    signal.signal(signal.SIGINT, interrupted)
    sys.exit(program())
