"""Errors that the search page shows in its language."""

from torch_src.runtime.errors import UserError


class PageError(UserError):
    """An error with its message in Chinese, `zh`; terminals and logs show the English one."""

    def __init__(self, message: str, zh: str):
        super().__init__(message)
        self.zh = zh


class NotReadyError(PageError):
    """Something is being loaded: the same request may succeed later."""


def chinese(error: BaseException) -> str:
    """Return the Chinese message of an error; empty without one."""
    return getattr(error, "zh", "")
