"""Checks of the files in a model's folder."""

from __future__ import annotations

from pathlib import Path

from fastvlm.functional.errors import CheckpointError
from fastvlm.functional.model_files import check_weight_file, oddity, read_object

DRAFT_MODEL_TYPE = "fastvlm_imitation"
"""The `model_type` of a draft, which can't be loaded as a model by itself."""

WEIGHT_FILE_NAMES = ("model.safetensors", "pytorch_model.bin")
"""Files of weights in order of preference, whole or with an `.index.json` that lists shards."""
JSON_FILE_NAMES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "chat_template.json",
)
"""Optional files that must hold a JSON object."""
UNSUPPORTED_WEIGHT_FILES = {
    "*.gguf": "a GGUF file of llama.cpp's",
    "tf_model.h5": "weights of TensorFlow's",
    "*.msgpack": "weights of Flax'",
    "*.onnx": "a graph for ONNX Runtime",
    "*.npz": "weights of MLX'",
    "consolidated*": "weights in their publisher's own layout",
}
"""Patterns of other libraries' files of weights, with descriptions."""


def check_folder(folder: Path) -> None:
    """Refuse a model's folder with missing or broken files.

    The checks are quick ones: that JSON files are JSON, and that files of weights are complete.

    Raises:
        CheckpointError: A file is broken, or there are no weights; it names the file.
    """
    if folder.is_file():
        raise CheckpointError(
            f"{folder} {oddity(folder) or 'is a file'}; a model is a folder with a config.json."
        )
    if not (folder / "config.json").is_file():
        raise CheckpointError(_without_config(folder))
    for name in JSON_FILE_NAMES:
        if (folder / name).exists():
            read_object(folder / name)
    if read_object(folder / "config.json").get("model_type") == DRAFT_MODEL_TYPE:
        raise CheckpointError(
            f"{folder} holds a draft and no model; give it as the draft of the model that it was"
            " made for."
        )
    for file in weight_files(folder):
        check_weight_file(file)


def _without_config(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return (
            f"{folder} holds an adapter of PEFT's; load its base model with transformers and the"
            " adapter with peft, merge them, and save the model with its tokenizer."
        )
    for pattern, what in UNSUPPORTED_WEIGHT_FILES.items():
        if folder.is_dir() and (found := next(folder.glob(pattern), None)) is not None:
            return f"{found} is {what}; fastvlm loads what transformers' save_pretrained writes."
    if not folder.exists():
        return f"There is no model in {folder}: no such folder."
    return f"There is no model in {folder}: config.json is missing."


def weight_files(folder: Path) -> list[Path]:
    """Return the files of a model's weights: a single one, or the shards of an index.

    Raises:
        CheckpointError: There are none, or a shard is missing.
    """
    for name in WEIGHT_FILE_NAMES:
        if (folder / name).exists():
            return [folder / name]
        if (index := folder / f"{name}.index.json").exists():
            return _shards(folder, index)
    for pattern, what in UNSUPPORTED_WEIGHT_FILES.items():
        if (found := next(folder.glob(pattern), None)) is not None:
            raise CheckpointError(
                f"There are no weights for transformers in {folder}; {found.name} is {what}."
            )
    raise CheckpointError(
        f"There are no weights in {folder}: neither {' nor '.join(WEIGHT_FILE_NAMES)}."
    )


def _shards(folder: Path, index: Path) -> list[Path]:
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index} is not a list of shards: it has no weight_map.")
    shards = []
    for name in sorted({*map(str, places.values())}):
        shard = folder / name
        if shard.parent != folder or not shard.is_file():
            raise CheckpointError(f"{index} names the shard {name}, which is not in {folder}.")
        shards.append(shard)
    return shards
