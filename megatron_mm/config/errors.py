"""The one exception that means: the input is wrong, not the program. And the exit codes that have a meaning."""

# Exit code of a command, and of a rank, that ended for bad input.
BAD_INPUT_CODE = 2
# Of one that was asked to end, saved a checkpoint and wants to be started again: EX_TEMPFAIL of sysexits.h.
REQUEUE_CODE = 75


class InputError(ValueError):
    """Something the user gave us is wrong: a config value, a file, a checkpoint, a picture.

    The message names the place (file, field or tensor), the value seen and the fix. Commands print it without a
    traceback and end with exit code `BAD_INPUT_CODE`.
    """
