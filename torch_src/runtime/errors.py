"""The one base class of every mistake that is the user's to mend, and the names that libraries give to damage
and to a lack of memory.
"""

import pickle
import struct
import tokenize
import zipfile

# What readers of .npy, .pt, .bin and .safetensors files raise over bytes that were not written so: a flipped
# one may stand anywhere, numpy's header is parsed as Python, torch's as a pickle.
DAMAGE = (
    EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError,
    RuntimeError, SyntaxError, OverflowError, pickle.UnpicklingError, struct.error, tokenize.TokenError,
    zipfile.BadZipFile,
)  # fmt: skip
MEMORY_SIGNS = ("out of memory", "ALLOC_FAILED", "DefaultCPUAllocator: can't allocate", "not enough memory")


class UserError(ValueError):
    """Printed as one line without a traceback by the entry scripts, exit status 2.

    The message names the file (and line) or the option, what was found, and what to do about it.
    """


class Stopped(Exception):
    """The run was asked to stop by a signal, and has saved what it needs to carry on."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the error says that memory did not suffice: torch has several ways to say it."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in MEMORY_SIGNS)
