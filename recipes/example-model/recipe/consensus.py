"""Self-critical training: sentences of the model's own, rewarded by what people say.

Teacher forcing teaches to imitate people's captions word by word, whatever is unsure of them. Here
the model samples sentences, and those that agree better with a photo's human captions than its
other samples become likelier (Rennie et al. 2017, arXiv 1612.00563; the mean of the other samples
as baseline: Luo 2020, arXiv 2003.09971).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from fastvlm.data.captioned import CaptionedImage
from fastvlm.language.families import text_decoder
from fastvlm.metrics.captions import CiderD
from fastvlm.metrics.tokenization import tokenize_caption
from fastvlm.prompts.fastvithd import FastViTHDInputs
from fastvlm.prompts.messages import question
from fastvlm.training.rows import IGNORED, TrainingRow
from fastvlm.vision.loading import ImageInput

SAMPLES = 5
"""Sentences sampled of a photo."""
MAX_NEW_TOKENS = 24
"""Tokens of the longest sentence."""
END = "</s>"
"""Stands after each caption in the reward, or a sentence that breaks off would be as good."""


class Consensus:
    """CIDEr-D of sentences, by the captions of a set of photos.

    Args:
        photos: They give the references and the document frequencies.
    """

    def __init__(self, photos: Sequence[CaptionedImage]) -> None:
        self.references = [
            [[*tokenize_caption(caption), END] for caption in shown.captions] for shown in photos
        ]
        self.scorer = CiderD(self.references)

    def reward(self, number: int, sentence: str, *, ended: bool) -> float:
        """Score a sentence about a photo.

        Args:
            number: The photo's index.
            sentence: The sentence.
            ended: Whether it came to its end, or ran into the limit.
        """
        tokens = [*tokenize_caption(sentence), *([END] if ended else [])]
        return self.scorer.score(tokens, self.references[number])


@torch.no_grad()
def sample_sentences(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    images: Sequence[ImageInput],
) -> list[TrainingRow]:
    """Return `SAMPLES` rows for each image, whose replies the model draws at temperature 1."""
    # Which methods and settings a composite model has is its class's matter.
    config: Any = model.config
    size, end = config.vision_config.image_size, tokenizer.eos_token_id
    inputs = FastViTHDInputs(
        tokenizer=tokenizer,
        name=type(model).__name__,
        image_token=config.image_token_id,
        image_size=size,
        vocabulary_size=config.text_config.vocab_size,
    )
    prompts = [inputs(question(prompt, image)) for image in images]
    tokens = torch.tensor([asked for asked, _ in prompts], device=model.device)
    sampling = GenerationConfig(
        do_sample=True,
        top_k=0,
        num_return_sequences=SAMPLES,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=end,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=[config.image_token_id],
    )
    decoder = text_decoder(model)
    training = decoder.training
    # With gradient checkpointing, training mode has no cache: each token would see only itself.
    decoder.eval()
    drawn: Tensor = cast(Any, model).generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        pixel_values=torch.cat([pixels for _, [pixels] in prompts]).to(model.device),
        generation_config=sampling,
    )
    decoder.train(training)
    rows = []
    for place, reply in enumerate(drawn[:, tokens.shape[1] :].tolist()):
        asked, [pixels] = prompts[place // SAMPLES]
        kept = reply[: reply.index(end) + 1] if end in reply else reply
        shown = {"input_ids": torch.tensor(asked + kept), "pixel_values": pixels}
        rows.append(TrainingRow(shown, torch.tensor([IGNORED] * len(asked) + kept)))
    return rows
