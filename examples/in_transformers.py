"""Speculative decoding in `transformers`' own `generate`, and proof that the tokens are the same.

python examples/in_transformers.py MODEL IMAGE
"""

import argparse

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import fastvlm


def main() -> None:
    """Decode a reply twice and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("image")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options = parser.parse_args()
    model = AutoModelForImageTextToText.from_pretrained(options.model).eval()
    processor = AutoProcessor.from_pretrained(options.model)
    content = [{"type": "image"}, {"type": "text", "text": "Describe the image."}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(text=text, images=Image.open(options.image), return_tensors="pt")
    settings = {"max_new_tokens": options.max_new_tokens, "do_sample": False}
    ordinary = model.generate(**inputs, **settings)
    faster = model.generate(**inputs, **settings, custom_generate=fastvlm.speculative())
    print(processor.batch_decode(faster[:, inputs["input_ids"].shape[1] :])[0])
    print("identical:", ordinary.equal(faster))


if __name__ == "__main__":
    main()
