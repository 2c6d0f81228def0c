"""Describe images with a model of yours, as the text is decoded.

python examples/describe.py MODEL IMAGE [IMAGE ...] [--draft DIR]
"""

import argparse

import fastvlm


def main() -> None:
    """Write a description of each image."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("images", nargs="+")
    parser.add_argument("--draft", help="a draft's directory; without one, prompts are looked up")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options = parser.parse_args()
    vlm = fastvlm.load(options.model, draft=options.draft)
    strategy = "cascade" if options.draft else "prompt-lookup"
    for image in options.images:
        stream = vlm.stream(
            "Describe the image.", image, strategy=strategy, max_new_tokens=options.max_new_tokens
        )
        for piece in stream:
            print(piece.text, end="", flush=True)
        statistics = stream.reply.statistics
        print(f"\n  {statistics.acceptance_length:.2f} tokens per pass of the model")


if __name__ == "__main__":
    main()
