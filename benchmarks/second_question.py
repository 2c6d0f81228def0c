"""A second question about the same image, and the memory it takes: FastVLM-0.5B at full size.

Random weights; neither time nor memory depends on them. Times are from the call to the first token,
the image file read and prepared each time. The second question's tokens are compared with those
of a model that keeps nothing.

Run `python benchmarks/second_question.py [--dtype bfloat16] [--size 1024] [--threads N]`.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
from pathlib import Path

import torch
from transformers import FastVlmConfig, FastVlmForConditionalGeneration

from fastvlm.evaluation.measuring import hardware
from fastvlm.vision import FastViTHDConfig
from fastvlm.vlm import VisionLanguageModel
from fastvlm_example.scenes import describe, render, sample
from fastvlm_example.tokenizer import IMAGE, learn_tokenizer
from ttft_models import DECODERS

FIRST = "Describe the picture in several sentences."
SECOND = "What is at the top left, and what is at the bottom right?"


def whole_model(dtype: torch.dtype, size: int) -> VisionLanguageModel:
    """Return FastVLM-0.5B with random weights."""
    tokenizer = learn_tokenizer([FIRST, SECOND, *(describe(sample(n)) for n in range(50))], 400)
    vision = FastViTHDConfig.variant("fastvithd", form="fused", image_size=size)
    config = FastVlmConfig(
        vision_config=vision.to_dict(),
        text_config={**DECODERS["0.5B"], "eos_token_id": None, "pad_token_id": 0},
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    model = FastVlmForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = None
    return VisionLanguageModel(model.eval(), tokenizer)


def main() -> None:
    """Ask two questions about each of some images."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--images", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    vlm = whole_model(getattr(torch, options.dtype), options.size)
    forgetful = VisionLanguageModel(vlm.model, vlm.tokenizer, prefix_bytes=0)
    first, second, same = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        # The first image only warms up.
        for number in range(options.images + 1):
            file = Path(folder) / f"{number}.png"
            render(sample(number), 576).save(file)
            replies = [vlm.generate(text, file, max_new_tokens=8) for text in (FIRST, SECOND)]
            fresh = forgetful.generate(SECOND, file, max_new_tokens=8)
            if number:
                first.append(replies[0].statistics.ttft_ms)
                second.append(replies[1].statistics.ttft_ms)
                same.append(replies[1].token_ids == fresh.token_ids)
    ratio = statistics.median(b / a for a, b in zip(first, second, strict=True))
    machine = hardware()
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(  # noqa: T201
        f"FastVLM-0.5B, {options.size} px, {options.dtype}, {machine['threads']} threads of"
        f" {machine['processor']}: first question {statistics.median(first):,.0f} ms, second"
        f" {statistics.median(second):,.0f} ms to the first token (medians of {len(first)}"
        f" images): {ratio:.3f} of the time; the same tokens: {sum(same)} of {len(same)};"
        f" peak memory {peak / 1e9:.2f} GB."
    )


if __name__ == "__main__":
    main()
