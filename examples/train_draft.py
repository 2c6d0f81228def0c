"""Train a draft for a model on captions, and decode with it.

    python examples/train_draft.py MODEL CAPTIONS OUTPUT --steps 300

CAPTIONS is any data set that `fastvlm train draft --data` takes, such as a folder of images with a
`.txt` beside each.
"""

import argparse
from pathlib import Path

import fastvlm
from fastvlm.cli import run


def main() -> None:
    """Train on the model's own replies, then reply with the draft."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("captions", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options = parser.parse_args()
    words = ["train", "draft", "--model", options.model, "--data", str(options.captions)]
    words += ["--output", str(options.output), "--kind", "block", "--steps", str(options.steps)]
    words += ["--held-out", "1", "--quiet"]
    code = run(words)
    if code:
        raise SystemExit(code)
    vlm = fastvlm.load(options.model, draft=options.output / "block")
    image = next(path for path in sorted(options.captions.iterdir()) if path.suffix != ".txt")
    reply = vlm.generate("Describe the image.", image, max_new_tokens=options.max_new_tokens)
    print(reply.text.strip())
    print(f"  {reply.statistics.acceptance_length:.2f} tokens per pass of the model")


if __name__ == "__main__":
    main()
