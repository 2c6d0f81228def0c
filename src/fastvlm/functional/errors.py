"""The errors that fastvlm raises; each message is one clear sentence."""

import re

MAX_MESSAGE_CHARACTERS = 300
"""The maximum number of characters quoted from another library's message."""
OUT_OF_MEMORY_PHRASES = ("out of memory", "not enough memory", "can't allocate memory", "bad_alloc")
"""What runtimes say when the memory is short, in lower case."""


class FastVlmError(Exception):
    """The base of every error that fastvlm raises."""


class InputError(FastVlmError):
    """An argument or an option given by the user is wrong."""


class CheckpointError(FastVlmError):
    """A model's or a draft's directory is missing, broken or made for something else."""


class StorageError(FastVlmError):
    """A file can't be written: the disk is full, or access is denied."""


def first_line(error: Exception) -> str:
    """Return the first line of an error's message without its full stop, to end a sentence with.

    An error without a message is named by its type. A line that announces further ones, such as one
    that ends in a colon, is continued by them.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    said = lines[0]
    for line in lines[1:]:
        if said[-1] not in ":,(":
            break
        said = f"{said} {line}"
    # Classes as Python writes them, and what transformers adds of every type that it tried.
    said = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", said).partition(" Errors: ")[0]
    said = said.rstrip(" .:,(")
    return said if len(said) <= MAX_MESSAGE_CHARACTERS else f"{said[:MAX_MESSAGE_CHARACTERS]} ..."


def shortened(value: object, length: int = 80) -> str:
    """Return a value as text, cut in the middle where it is longer than `length` characters."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except Exception:  # noqa: BLE001 (an object may have a broken `__repr__`)
        text = f"an object of {type(value).__name__}"
    text = text.encode("utf-8", "backslashreplace").decode()
    text = "".join(one if one.isprintable() else repr(one)[1:-1] for one in text[: 4 * length])
    half = (length - 3) // 2
    return text if len(text) <= length else f"{text[:half]}...{text[-half:]}"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the CPU or an accelerator is out of memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in said for words in OUT_OF_MEMORY_PHRASES)
