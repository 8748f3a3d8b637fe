"""Errors that are the user's to correct; the command line prints them without a traceback."""


class UserError(ValueError):
    """Something given to the library is wrong; the message names it and says what is allowed."""
