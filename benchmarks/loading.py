"""What loading a model costs in memory, beside the size of its files.

Models of the real shapes get random weights, a tensor at a time, and are loaded by a process of
their own. The memory of a process has two parts: pages of files, which the system takes back
whenever it needs them, and its own (anonymous) memory, which it can't.

    python benchmarks/loading.py --json benchmarks/results/loading.json
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLImageProcessor,
)

from fastvlm.checkpoints.layouts import transformers_name
from fastvlm.evaluation.measuring import hardware
from fastvlm.vision import FastViTHD, FastViTHDConfig

SHARD_BYTES = 2 * 2**30
HALF = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
        "max_position_embeddings": 32768, "tie_word_embeddings": True}  # fmt: skip
"""The decoder of FastVLM-0.5B."""
THREE = {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
         "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936,
         "max_position_embeddings": 128000, "tie_word_embeddings": True,
         "rope_parameters": {"rope_type": "default", "rope_theta": 1e6,
                             "mrope_section": [16, 24, 24]}}  # fmt: skip
"""The decoder of Qwen2.5-VL-3B."""
TOWER = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
         "out_hidden_size": 2048, "fullatt_block_indexes": [7, 15, 23, 31]}  # fmt: skip
"""Its encoder."""
CHILD = """
import json, sys, threading, time
import torch, fastvlm
from fastvlm.checkpoints import load_checkpoint

def held(name):
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(name))

own, all_of_it, highest, ended = held("RssAnon"), held("VmRSS"), 0, False
def watch():
    global highest
    while not ended:
        highest = max(highest, held("RssAnon"))
        time.sleep(0.002)
watching = threading.Thread(target=watch)
watching.start()
started = time.monotonic()
vlm = fastvlm.load(sys.argv[1], dtype=getattr(torch, sys.argv[2]), packed_bytes=int(sys.argv[3]))
seconds = time.monotonic() - started
ended = True
watching.join()
# The pages of the files come with the first pass.
vlm.generate("w9", max_new_tokens=2)
print(json.dumps({"seconds": seconds, "anonymous_bytes": highest - own,
                  "resident_bytes": held("VmHWM") - all_of_it}))
"""


def shards(module: nn.Module, rename: Callable[[str], str]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield random weights of a module's shapes, as much at a time as a shard holds."""
    shard: dict[str, torch.Tensor] = {}
    held = 0
    for name, tensor in module.state_dict().items():
        if name.endswith("lm_head.weight"):
            continue
        made = torch.zeros(
            tensor.shape, dtype=torch.long if not tensor.is_floating_point() else None
        )
        if tensor.is_floating_point():
            made = torch.empty(tensor.shape, dtype=torch.bfloat16).normal_(std=0.02)
        shard[rename(name)] = made
        held += made.nbytes
        if held > SHARD_BYTES:
            yield shard
            shard, held = {}, 0
    yield shard


def write(folder: Path, module: nn.Module, rename: Callable[[str], str] = str) -> None:
    """Write random weights of a module's shapes in shards, with their index."""
    places = {}
    for number, shard in enumerate(shards(module, rename)):
        name = f"model-{number}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        places |= dict.fromkeys(shard, name)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of so many words."""
    named = {"<|endoftext|>": 0, "<|im_end|>": 1, "<image>": 2, "<|image_pad|>": 3}
    vocabulary = named | {f"w{number}": number for number in range(len(named), size)}
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>")),
        eos_token="<|im_end|>", pad_token="<|endoftext|>")  # fmt: skip
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return made


def fastvlm_half(folder: Path) -> None:
    """Write a model of FastVLM-0.5B's shape in `transformers`' layout."""
    with torch.device("meta"):
        decoder = Qwen2ForCausalLM(Qwen2Config(**HALF))
        tower = FastViTHD(FastViTHDConfig.variant("fastvithd", form="reparameterized"))
        projector = nn.ModuleDict(
            {"linear_1": nn.Linear(3072, HALF["hidden_size"]),
             "linear_2": nn.Linear(HALF["hidden_size"], HALF["hidden_size"])}
        )  # fmt: skip
    whole = nn.ModuleDict({"d": decoder, "p": projector, "v": tower})

    def rename(name: str) -> str:
        part, _, rest = name.partition(".")
        if part == "d":
            return rest.replace("model.", "model.language_model.", 1)
        if part == "p":
            return f"model.multi_modal_projector.{rest}"
        return transformers_name(f"model.vision_tower.{rest}", "reparameterized")

    write(folder, whole, rename)
    vision = {"model_type": "timm_wrapper", "architecture": "fastvit_mci3", "hidden_size": 3072,
              "model_args": {"inference_mode": True}}  # fmt: skip
    config = {"model_type": "fast_vlm", "image_token_index": 2, "image_seq_length": 256,
              "text_config": {**HALF, "model_type": "qwen2"}, "vision_config": vision,
              "tie_word_embeddings": True}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer(HALF["vocab_size"] - 400).save_pretrained(folder)


def qwen_three(folder: Path) -> None:
    """Write a model of Qwen2.5-VL-3B's shape."""
    config = Qwen2_5_VLConfig(text_config=THREE, vision_config=TOWER, image_token_id=3,
                              tie_word_embeddings=True)  # fmt: skip
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    write(folder, model)
    config.save_pretrained(folder)
    tokenizer(THREE["vocab_size"] - 400).save_pretrained(folder)
    Qwen2VLImageProcessor().save_pretrained(folder)


MODELS: dict[str, Callable[[Path], None]] = {
    "FastVLM-0.5B": fastvlm_half,
    "Qwen2.5-VL-3B": qwen_three,
}


def measured(folder: Path, dtype: str, packed_bytes: int) -> dict[str, Any]:
    """Return what loading a folder costs a process."""
    command = [sys.executable, "-c", CHILD, str(folder), dtype, str(packed_bytes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Make each model, load it, and print what that took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(MODELS), help="models, separated by commas")
    parser.add_argument("--folder", type=Path, help="where the models are made for a while")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for name in options.only.split(","):
        place = Path(tempfile.mkdtemp(dir=options.folder))
        try:
            started = time.monotonic()
            MODELS[name](place)
            size = sum(file.stat().st_size for file in place.glob("*.safetensors"))
            print(f"{name}: {size / 1e9:.2f} GB, made in {time.monotonic() - started:.0f} s")  # noqa: T201
            row = {**measured(place, "bfloat16", 0), "file_bytes": size}
        finally:
            shutil.rmtree(place)
        print(  # noqa: T201
            f"loaded in {row['seconds']:.1f} s; at most {row['anonymous_bytes'] / size:.2f}x of the"
            f" files' size in memory of its own, {row['resident_bytes'] / size:.2f}x with the pages"
            " of the files",
            flush=True,
        )
        found[name] = row
    if options.json is not None:
        record = {
            "hardware": hardware(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "dtype": "bfloat16",
            "packed_bytes": 0,
            "asked": "text alone",
            "models": found,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
