"""fastvlm: vision-language models, the same tokens sooner.

FastViTHD (Vasu et al., arXiv 2412.13303) for the time to first token, and self-speculative decoding
with an imitation network (Bajpai and Hanawal, arXiv 2510.22641) for the time per output token.
"""

from fastvlm.functional.errors import CheckpointError, FastVlmError, InputError
from fastvlm.vlm import Piece, Reply, VisionLanguageModel, load

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "FastVlmError",
    "InputError",
    "Piece",
    "Reply",
    "VisionLanguageModel",
    "load",
]
