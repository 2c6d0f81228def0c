"""The example model: a distribution of its own, with a licence of its own."""

from __future__ import annotations

from typing import Any

from fastvlm.functional.errors import CheckpointError


def example() -> Any:
    """Return the package `fastvlm_example`: the example model, its drafts, images and scenes.

    Raises:
        CheckpointError: It is not installed.
    """
    try:
        import fastvlm_example
    except ModuleNotFoundError as error:
        if error.name != "fastvlm_example":
            raise
        raise CheckpointError(
            "The example model is not installed: run `pip install fastvlm-example`, or name a model"
            " of your own."
        ) from error
    return fastvlm_example
