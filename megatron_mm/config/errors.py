"""The one exception that means: the input is wrong, not the program."""

# Exit code of a command, and of a rank, that ended for bad input.
BAD_INPUT_CODE = 2


class InputError(ValueError):
    """Something the user gave us is wrong: a config value, a file, a checkpoint, a picture.

    The message names the place (file, field or tensor), the value seen and the fix. Commands print it without a
    traceback and end with exit code `BAD_INPUT_CODE`.
    """
