"""Caption all images of a folder, many at a time, as JSON lines.

python examples/caption_folder.py MODEL FOLDER > captions.jsonl
"""

import argparse
import json
from pathlib import Path

import fastvlm

TOGETHER = 64
"""Images that are handed to the engine at a time."""


def main() -> None:
    """Write a line for each image: its file and its caption, or what is wrong with it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    options = parser.parse_args()
    vlm = fastvlm.load(options.model)
    files = sorted(path for path in options.folder.iterdir() if path.is_file())
    for start in range(0, len(files), TOGETHER):
        part = files[start : start + TOGETHER]
        replies = vlm.generate_batch(
            ["Describe the image in one sentence."] * len(part),
            part,
            strategy="prompt-lookup",
            max_new_tokens=options.max_new_tokens,
        )
        for file, reply in zip(part, replies, strict=True):
            if reply.error is None:
                print(json.dumps({"file": file.name, "caption": reply.text.strip()}))
            else:
                print(json.dumps({"file": file.name, "error": str(reply.error)}))


if __name__ == "__main__":
    main()
