"""The errors that fastvlm raises; each message is one clear sentence."""


class FastVlmError(Exception):
    """The base of every error that fastvlm raises."""


class InputError(FastVlmError):
    """What a user typed or passed is wrong."""


class CheckpointError(FastVlmError):
    """A model's or a draft's directory is missing, broken or made for something else."""
