"""The errors that fastvlm raises; each message is one clear sentence."""


class FastVlmError(Exception):
    """The base of every error that fastvlm raises."""


class InputError(FastVlmError):
    """What a user typed or passed is wrong."""


class CheckpointError(FastVlmError):
    """A model's or a draft's directory is missing, broken or made for something else."""


class StorageError(FastVlmError):
    """A file can't be written: the disk is full, or the place is closed to us."""


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, or its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
