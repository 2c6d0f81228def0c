"""A dialogue about an image, sampled: the same seed gives the same replies under any strategy.

python examples/dialogue.py MODEL IMAGE --seed 7
"""

import argparse

import fastvlm

QUESTIONS = ("What is in this image?", "What else?", "Tell a short story about it.")


def main() -> None:
    """Ask the questions one after another; earlier turns are not computed again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("image")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options = parser.parse_args()
    vlm = fastvlm.load(options.model)
    messages = []
    for number, question in enumerate(QUESTIONS):
        content = [{"type": "text", "text": question}]
        if not messages:
            content.insert(0, {"type": "image", "image": options.image})
        messages.append({"role": "user", "content": content})
        reply = vlm.generate(
            messages,
            strategy="prompt-lookup",
            temperature=0.8,
            top_p=0.95,
            seed=options.seed + number,
            max_new_tokens=options.max_new_tokens,
        )
        print(f"> {question}\n{reply.text.strip()}  ({reply.finish_reason})")
        messages.append({"role": "assistant", "content": reply.text})


if __name__ == "__main__":
    main()
