"""What drafts: the imitation network, its directory, and how long a draft goes on."""

from fastvlm.drafting.adaptive import AdaptiveLength
from fastvlm.drafting.draft_length import ConfidenceLength, DraftLength, FixedLength
from fastvlm.drafting.imitation import ImitationConfig, ImitationNetwork

__all__ = [
    "AdaptiveLength",
    "ConfidenceLength",
    "DraftLength",
    "FixedLength",
    "ImitationConfig",
    "ImitationNetwork",
]
