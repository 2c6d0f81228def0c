"""llama.cpp's own script that converts models, for tokenizers that it doesn't know, too.

    python llama_convert.py FOLDER_OF_LLAMA_CPP [what the script takes]

How a tokenizer splits text is written into the file. Workers are given tokens, so that it doesn't
matter: a tokenizer that nobody registered is taken for the default one.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any


def main(folder: str) -> None:
    """Run the script that lies in a folder."""
    sys.path[:0] = [folder, f"{folder}/gguf-py"]
    from conversion.base import TextModel

    known = TextModel.get_vocab_base_pre

    def named(self: Any, tokenizer: Any) -> str:
        """Return the name of a tokenizer's way of splitting text."""
        try:
            name: str = known(self, tokenizer)
        except NotImplementedError:
            return "default"
        return name

    TextModel.get_vocab_base_pre = named
    runpy.run_path(f"{folder}/convert_hf_to_gguf.py", run_name="__main__")


if __name__ == "__main__":
    main(sys.argv.pop(1))
