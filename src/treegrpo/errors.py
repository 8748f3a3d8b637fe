"""Errors that are the user's to correct; the command line prints them without a traceback.

Left out: mistakes of ours, which keep their tracebacks.
"""


class UserError(ValueError):
    """Something given to the library is wrong; the message names it and says what is allowed."""


def reason(error: BaseException) -> str:
    """Another error's class and the first line of its message, to be told within ours."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
