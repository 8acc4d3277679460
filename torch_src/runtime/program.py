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
RESUMES = "interrupted; the same command, without --force, resumes"


def exit_status(program: Callable[[], int | None], *user_errors: type[Exception]) -> int:
    """Run `program()` and return the exit status of the process.

    What `program` returns, else 0. 2: UserError, OSError, `user_errors` or out of memory, logged as one line.
    128 + signal: stopped or interrupted.
    """
    log.escape_unprintable()
    expected: tuple[type[Exception], ...] = (UserError, *user_errors)
    try:
        return program() or 0
    except expected as error:
        log.error(str(error))
        return 2
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        fix = "lower --grad_cache_chunk (training) or --batch_size (inference); --plan suggests a number"
        log.error(f"out of memory ({first_line(error).split('. ')[0]}); {fix}")
        return 2
    except BrokenPipeError:  # `--help | head`: nobody reads the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        log.error(f"{error.filename or 'system'}: {error.strerror or error}")
        return 2
    except Stopped as stop:
        log.end_live_lines()
        log.warn(str(stop))
        return 128 + stop.signum
    except KeyboardInterrupt:
        log.end_live_lines()
        log.warn(RESUMES)
        return INTERRUPTED


def exit_with(program: Callable[[], int]) -> NoReturn:
    """Run `program()` and end the process with its exit status.

    SIGINT ends the process at once, even during imports and C code: files are written atomically, so there
    is nothing to clean up. Training installs its own handler.
    """
    main_process = os.getpid()

    def interrupted(_signum: int, _frame: FrameType | None) -> NoReturn:
        try:
            if os.getpid() == main_process:  # a worker process exits silently
                log.end_live_lines()
                log.warn(RESUMES)
        finally:
            os._exit(INTERRUPTED)

    signal.signal(signal.SIGINT, interrupted)
    sys.exit(exit_status(program))
