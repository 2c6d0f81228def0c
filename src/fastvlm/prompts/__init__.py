"""Prompts and dialogues with pictures: their tokens, and the embeddings that a decoder is given."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from fastvlm.checkpoints.processors import tokenizer_of
from fastvlm.data.conversations import Message
from fastvlm.language import SplitDecoder
from fastvlm.prompts.encoded import Encoded, Prompts
from fastvlm.prompts.fastvithd import FastViTHDPrompts
from fastvlm.prompts.messages import question
from fastvlm.prompts.processor import ProcessorPrompts
from fastvlm.vision.fastvithd import FastViTHD

__all__ = ["Encoded", "FastViTHDPrompts", "Message", "Prompts", "prompts_for", "question"]


def prompts_for(
    model: PreTrainedModel,
    processor: PreTrainedTokenizerBase | ProcessorMixin,
    decoder: SplitDecoder,
) -> Prompts:
    """Return what makes a model's prompts.

    Args:
        model: The model.
        processor: Its processor, or its tokenizer alone.
        decoder: The model's decoder, split.

    Raises:
        InputError: There is no chat template, and the model needs one.
    """
    if isinstance(getattr(model.base_model, "vision_tower", None), FastViTHD):
        return FastViTHDPrompts(model, tokenizer_of(processor), decoder)
    return ProcessorPrompts(model, processor, decoder)
