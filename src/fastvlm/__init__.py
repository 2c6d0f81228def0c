"""fastvlm: vision-language models with identical output and lower latency.

FastViTHD (Vasu et al., arXiv 2412.13303) for the time to first token, and self-speculative decoding
with an imitation network (Bajpai and Hanawal, arXiv 2510.22641) for the time per output token.
"""

from typing import TYPE_CHECKING, Any

from fastvlm.functional.errors import CheckpointError, FastVlmError, InputError
from fastvlm.functional.messages import Dialogue

if TYPE_CHECKING:
    from fastvlm.custom_generate import speculative
    from fastvlm.decoding import StructuredOutput
    from fastvlm.language.packed import pack_decoder
    from fastvlm.vlm import Piece, Reply, VisionLanguageModel, load

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Dialogue",
    "FastVlmError",
    "InputError",
    "Piece",
    "Reply",
    "StructuredOutput",
    "VisionLanguageModel",
    "load",
    "pack_decoder",
    "speculative",
]


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first asked for: `fastvlm --help` needs none of it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "speculative":
        from fastvlm.custom_generate import speculative

        return speculative
    if name == "StructuredOutput":
        from fastvlm.decoding import StructuredOutput

        return StructuredOutput
    if name == "pack_decoder":
        from fastvlm.language.packed import pack_decoder

        return pack_decoder
    from fastvlm import vlm

    return getattr(vlm, name)
