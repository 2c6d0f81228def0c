"""METEOR and SPICE, which are Java programs: computed where they are installed, else not at all.

METEOR 1.5 (Denkowski and Lavie 2014) and SPICE (Anderson et al. 2016, arXiv 1607.08822) as COCO's
caption evaluation runs them, through pycocoevalcap (the extra `java-metrics`) and a `java` on PATH.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastvlm.metrics.captions import check_captions
from fastvlm.metrics.tokenization import tokenize_caption

_SPICE_MODELS = "stanford-corenlp-3.6.0-models.jar"

Tokenized = dict[str, list[str]]


@dataclass(frozen=True, slots=True)
class NotComputed:
    """Stands for a score that can't be computed here."""

    reason: str

    def __str__(self) -> str:
        return f"not computed: {self.reason}"


def meteor(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> float | NotComputed:
    """Compute METEOR of a set of predicted captions: 0 to 1, of the corpus, not a mean.

    Args:
        predictions: A caption by image.
        references: One or more captions by image, for the same images.

    Raises:
        InputError: As `fastvlm.metrics.captions.score_captions`.
    """
    check_captions(predictions, references)
    if lack := _lack():
        return lack
    scorer = importlib.import_module("pycocoevalcap.meteor.meteor").Meteor()
    score, _ = scorer.compute_score(*_tokenized(predictions, references))
    return float(score)


def spice(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> float | NotComputed:
    """Compute the mean SPICE of a set of predicted captions: 0 to 1.

    SPICE's parser comes apart from its program: `python -m
    pycocoevalcap.spice.get_stanford_models` downloads it, which is never done from here.

    Args:
        predictions: A caption by image.
        references: One or more captions by image, for the same images.

    Raises:
        InputError: As `fastvlm.metrics.captions.score_captions`.
    """
    check_captions(predictions, references)
    if lack := _lack():
        return lack
    module = importlib.import_module("pycocoevalcap.spice.spice")
    if not (Path(str(module.__file__)).parent / "lib" / _SPICE_MODELS).is_file():
        return NotComputed(
            "SPICE's parser is missing (python -m pycocoevalcap.spice.get_stanford_models)"
        )
    try:
        score, _ = module.Spice().compute_score(*_tokenized(predictions, references))
    except subprocess.CalledProcessError as error:
        return NotComputed(f"SPICE's program failed with status {error.returncode}")
    return float(score)


def _lack() -> NotComputed | None:
    """What both programs need and isn't there."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        return NotComputed("no pycocoevalcap (pip install 'fastvlm[java-metrics]')")
    if shutil.which("java") is None:
        return NotComputed("no Java")
    return None


def _tokenized(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> tuple[Tokenized, Tokenized]:
    """References and predictions as pycocoevalcap takes them: tokens between spaces."""
    return (
        {
            image: [" ".join(tokenize_caption(text)) for text in references[image]]
            for image in predictions
        },
        {image: [" ".join(tokenize_caption(text))] for image, text in predictions.items()},
    )
