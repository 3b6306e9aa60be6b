"""The one exception for what a user got wrong."""


class InputError(ValueError):
    """Something the user gave cannot work.

    The message is one line that names the cause and the way out; the command line prints it and exits with code 2.
    """
