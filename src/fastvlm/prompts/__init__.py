"""Prompts and dialogues with images: their tokens, and the embeddings that a decoder is given."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from fastvlm.checkpoints.processors import tokenizer_of
from fastvlm.functional.messages import Message, Prompt, TokenPrompt
from fastvlm.language import SplitDecoder
from fastvlm.prompts.builder import PromptBuilder
from fastvlm.prompts.fastvithd import FastViTHDPromptBuilder
from fastvlm.prompts.features import ImageFeatureCache
from fastvlm.prompts.messages import dialogue, messages_of, question
from fastvlm.prompts.processor import ProcessorPromptBuilder
from fastvlm.vision.fastvithd import FastViTHD

__all__ = [
    "FastViTHDPromptBuilder",
    "ImageFeatureCache",
    "Message",
    "ProcessorPromptBuilder",
    "Prompt",
    "PromptBuilder",
    "TokenPrompt",
    "dialogue",
    "messages_of",
    "prompt_builder",
    "question",
]


def prompt_builder(
    model: PreTrainedModel,
    processor: PreTrainedTokenizerBase | ProcessorMixin,
    decoder: SplitDecoder,
) -> PromptBuilder:
    """Return the prompt builder of a model.

    Args:
        model: The model, which is not changed.
        processor: Its processor, or its tokenizer alone.
        decoder: The model's decoder, split.

    Raises:
        InputError: There is no chat template, and the model needs one.
    """
    if isinstance(getattr(model.base_model, "vision_tower", None), FastViTHD):
        return FastViTHDPromptBuilder(model, tokenizer_of(processor), decoder)
    return ProcessorPromptBuilder(model, processor, decoder)
