"""Errors that end a program with one line instead of a traceback."""

OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED", "DefaultCPUAllocator: can't allocate", "not enough memory")


class UserError(ValueError):
    """An error that the user can fix: programs log it as one line and exit with status 2.

    Message: `path:line: what is wrong (what was expected); how to fix it`, or an option instead of the path.
    """


class Stopped(Exception):
    """A signal stopped the run after it saved its state; the same command resumes it."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the error means out of memory, which torch reports in several ways."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


def nondeterministic_operation(error: BaseException) -> str:
    """Return the operation that torch refused because it is not deterministic, "" for any other error."""
    name, refused, _ = str(error).partition(" does not have a deterministic implementation")
    return name if refused and isinstance(error, RuntimeError) else ""


def first_line(error: BaseException) -> str:
    """Return the first line of the error's message, or its type when it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
