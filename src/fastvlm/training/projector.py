"""The projector's lesson, before the decoder's: visual tokens that read like words.

(The first stage of Apple's recipe trains the projector alone.) Each visual token is read by the
decoder's own final norm and LM head, and should name the words of what stands in its place, or for
a photograph the words that its captions share. Then the decoder meets pictures that already speak
its vocabulary, and need not learn to see and to write at once.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import FastVlmForConditionalGeneration, PreTrainedTokenizerFast

from fastvlm.data.captioned import CaptionedPhotograph
from fastvlm.data.questions import HELD_OUT_SCENES
from fastvlm.scenes import PLACES, Scene, by_place, sample
from fastvlm.training.augmentation import random_views
from fastvlm.training.encoder import scene_pixels

COMMON = 0.2
"""A word in a larger share of the captions tells nothing of a picture."""


class ProjectorLesson:
    """Teaches the projector the decoder's vocabulary; everything else is frozen.

    Args:
        model: The model; its decoder's embeddings should know the vocabulary already.
        tokenizer: Its tokenizer.
        photographs: Photographs with captions.
        pixels: The photographs as (photographs, 3, height, width), uint8.
        pictures_a_step: Scenes in a step, and photographs in a step.
    """

    def __init__(
        self,
        model: FastVlmForConditionalGeneration,
        tokenizer: PreTrainedTokenizerFast,
        photographs: Sequence[CaptionedPhotograph],
        pixels: Tensor,
        *,
        pictures_a_step: int = 24,
    ) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.photographs, self.pixels = photographs, pixels
        self.number = pictures_a_step
        self.size = model.config.vision_config.image_size
        self.projector = model.model.multi_modal_projector
        self.module: nn.Module = nn.ModuleList([self.projector])
        seen: Counter[int] = Counter()
        for photograph in photographs:
            for caption in photograph.captions:
                seen.update(set(tokenizer.encode(" " + caption)))
        most = COMMON * sum(len(photograph.captions) for photograph in photographs)
        self.common = {token for token, count in seen.items() if count > most}

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Return the cross-entropy of the words of places and of photographs."""
        scenes = [sample(random.randrange(HELD_OUT_SCENES)) for _ in range(self.number)]
        rows = torch.randint(len(self.photographs), (self.number,))
        views = random_views(self.pixels[rows], self.size, smallest=0.7)
        with torch.no_grad():
            pixels = torch.cat([scene_pixels(scenes, self.size), views])
            states = self.model.model.vision_tower(
                pixels.contiguous(memory_format=torch.channels_last)
            ).last_hidden_state.flatten(2).transpose(1, 2)
        visual = self.projector(states)
        log_p = self.model.lm_head(self.model.model.language_model.norm(visual)).log_softmax(-1)
        of_scenes, of_photographs = log_p.split(self.number)
        places = torch.stack([self.words_of_places(scene) for scene in scenes])
        captions = torch.stack([self.words_of(self.photographs[row]) for row in rows])
        facts = -(places * of_scenes).sum(-1).mean()
        words = -(captions[:, None] * of_photographs).sum(-1).mean()
        # The decoder's residual stream starts at the size of its embeddings; visual tokens far
        # larger could not be added to.
        embeddings = self.model.get_input_embeddings().weight
        scale = visual.square().mean().log() - embeddings.square().mean().log()
        report = {"facts": float(facts.detach()), "words": float(words.detach())}
        return facts + words + 0.1 * scale.square(), {**report, "scale": float(scale.detach())}

    def words_of_places(self, scene: Scene) -> Tensor:
        """Return the distribution of words of each place: (9, vocabulary)."""
        texts = [
            f" {place} {scene.background} background" if thing is None else f" {place} {thing.name}"
            for place, thing in zip(PLACES, by_place(scene), strict=True)
        ]
        return torch.stack([self.bag(self.tokenizer.encode(text)) for text in texts])

    def words_of(self, photograph: CaptionedPhotograph) -> Tensor:
        """Return the distribution of words that a photograph's captions share: (vocabulary)."""
        tokens = [
            token
            for caption in photograph.captions
            for token in set(self.tokenizer.encode(" " + caption))
            if token not in self.common
        ]
        return self.bag(tokens)

    def bag(self, tokens: Sequence[int]) -> Tensor:
        """Return the distribution of a bag of tokens: (vocabulary)."""
        size = self.model.config.text_config.vocab_size
        counts = torch.zeros(size)
        counts.index_add_(0, torch.tensor(tokens), torch.ones(len(tokens)))
        return counts / counts.sum().clamp(min=1)
