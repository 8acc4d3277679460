"""The one base class of every mistake that is the user's to mend."""


class UserError(ValueError):
    """Printed as one line without a traceback by the entry scripts, exit status 2.

    The message names the file (and line) or the option, what was found, and what to do about it.
    """


class Stopped(Exception):
    """The run was asked to stop by a signal, and has saved what it needs to carry on."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum
