"""Validation of drafts by decoding held-out questions, as in serving."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from fastvlm.decoding import SelfSpeculative
from fastvlm.drafting import FixedLength, ImitationNetwork
from fastvlm.functional.placement import moved
from fastvlm.functional.statistics import Acceptance
from fastvlm.training.replies import TrainingPrompt
from fastvlm.vlm import VisionLanguageModel

DRAFT_TOKENS = 4
"""Tokens in a draft. The length is fixed, so that results depend on the network alone."""


class HeldOut:
    """Decodes held-out questions with networks while they are trained.

    Args:
        vlm: The target.
        networks: The networks, by name.
        asked: The questions, about images that are not trained on.
        max_new_tokens: The maximum number of tokens in a reply.
    """

    def __init__(
        self,
        vlm: VisionLanguageModel,
        networks: Mapping[str, ImitationNetwork],
        asked: Sequence[TrainingPrompt],
        *,
        max_new_tokens: int = 64,
    ) -> None:
        self.vlm, self.networks = vlm, networks
        self.asked = asked
        self.max_new_tokens = max_new_tokens

    def __call__(self, step: int) -> dict[str, float]:
        """Return each network's acceptance rate and acceptance length, in tokens per pass."""
        measures = {}
        decoder = self.vlm.decoder
        for name, network in self.networks.items():
            # Decoding is in the target's precision, while the network learns on in its own.
            own = moved(copy.deepcopy(network), decoder.dtype).eval()
            layer = network.config.exit_layer
            strategy = SelfSpeculative(decoder, layer, own, FixedLength(DRAFT_TOKENS))
            requests = [
                self.vlm.request(
                    one.messages, strategy=strategy, max_new_tokens=self.max_new_tokens
                )
                for one in self.asked
            ]
            for request in self.vlm.engine.run(requests):
                if request.error is not None:
                    raise request.error
            worth = Acceptance.over([request.statistics for request in requests])
            if worth.rate is not None and worth.length is not None:
                measures[f"held-out {name} acceptance_rate"] = worth.rate
                measures[f"held-out {name} acceptance_length"] = worth.length
        return measures
