"""Loading a model and its processor, in any supported layout."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar, cast

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from fastvlm.checkpoints.files import UNSUPPORTED_WEIGHT_FILES, check_folder, weight_files
from fastvlm.checkpoints.layouts import (
    APPLE_LAYOUT,
    CHATML_TEMPLATE,
    IMAGE_TOKEN,
    Layout,
    recognise,
)
from fastvlm.checkpoints.processors import load_processor
from fastvlm.checkpoints.weights import (
    check_layers,
    misshapen,
    named,
    read_weights,
    refuse_wrong,
)
from fastvlm.functional.errors import (
    CheckpointError,
    FastVlmError,
    InputError,
    first_line,
    shortened,
)
from fastvlm.functional.model_files import check_size, read_object
from fastvlm.functional.placement import moved, on_no_device
from fastvlm.language.families import check_family
from fastvlm.vision.fastvithd import FastViTHD

Loaded = TypeVar("Loaded")
IGNORED_WEIGHT_SUFFIXES = (
    "rotary_emb.inv_freq",
    "position_ids",
    "num_batches_tracked",
    "masked_bias",
)
"""Name suffixes of buffers in older files, which are ignored when a model has no use for them."""


class PretrainedOptions(TypedDict, total=False):
    """Options that are passed on to `transformers`.

    Args:
        revision: Branch, tag or commit of a model on the hub.
        token: The hub's access token, for a gated or private model.
        device_map: The device of each part, in accelerate's format, such as `auto`.
        quantization_config: How weights are quantised while they are loaded.
        attn_implementation: How attention is computed: `sdpa`, `eager`, ...
        trust_remote_code: Whether to run code from the model's repository; False if not given.
    """

    revision: str | None
    token: str | bool | None
    device_map: Any
    quantization_config: Any
    attn_implementation: str | None
    trust_remote_code: bool


class LoadOptions(PretrainedOptions, total=False):
    """Options of `fastvlm.load` beside those of its signature.

    Args:
        quantize: `int8` or `int4`, to hold the decoder's weights in so many bits on a CPU. It is
            another model then: lossless against itself, and its answers are measured by `evaluate`.
        runtime: `torch`, or `onnx` for ONNX Runtime on a CPU; None for ONNX Runtime where it is
            installed and the model is a small one that it computes.
        packed_bytes: The maximum bytes of a second copy of weights, the decoder's before those of a
            FastViTHD, which a CPU reads faster; 0 makes none.
    """

    quantize: Literal["int8", "int4"] | None
    runtime: Literal["torch", "onnx", "cuda"] | None
    packed_bytes: int


def load_checkpoint(
    model: str | Path,
    dtype: torch.dtype,
    device: str | torch.device | None = None,
    options: PretrainedOptions | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | ProcessorMixin]:
    """Load a model and its processor: Apple's FastVLM, or any model that `transformers` loads.

    For a model of text or one around FastViTHD, the processor is the tokenizer alone.

    Parameters are those of the files; nothing is folded, and no weight is initialised at random.

    Args:
        model: A directory, or a name on the Hugging Face hub.
        dtype: The precision.
        device: The device; the CPU, if neither it nor a `device_map` is given.
        options: Options for `transformers`.

    Raises:
        CheckpointError: There is no model there, a file is broken, or a weight is missing or has
            the wrong shape; it names the file or the weights.
        InputError: The layout or the family is not supported, or both a device and a `device_map`
            are given.
    """
    given: Any = {name: value for name, value in (options or {}).items() if value is not None}
    if device is not None and "device_map" in given:
        raise InputError("The device is where all of a model goes: leave out it or device_map.")
    folder = find_folder(model, given)
    check_folder(folder)
    stored = read_object(folder / "config.json")
    check_layers(folder, stored)
    layout = attempt(f"{folder / 'config.json'} is refused", recognise, stored)
    loading = {"dtype": dtype, **given}
    if layout is None:
        target, processor = _load_with_transformers(folder, loading)
    else:
        target = attempt(
            f"The model in {folder} can't be loaded", _load_layout, folder, layout, stored, loading
        )
        processor = load_tokenizer(folder)
        if layout is APPLE_LAYOUT:
            _teach_images(target, processor)
    if "device_map" not in given and "quantization_config" not in given:
        target = moved(target, device or "cpu")
    return target, processor


def find_folder(model: str | Path, options: dict[str, Any]) -> Path:
    """Return the folder of a model, downloaded from the hub if it is not a path.

    Args:
        model: A directory, or a name on the Hugging Face hub.
        options: Options for `transformers`; `revision` and `token` are removed from them.

    Raises:
        CheckpointError: It can't be downloaded.
    """
    revision, token = options.pop("revision", None), options.pop("token", None)
    path = Path(model)
    if isinstance(model, Path) or os.path.lexists(path) or os.fspath(model).count("/") != 1:
        return path
    try:
        return Path(
            snapshot_download(
                str(model),
                revision=revision,
                token=token,
                ignore_patterns=[*UNSUPPORTED_WEIGHT_FILES, "original/*"],
            )
        )
    except Exception as error:  # of the hub's and of the network's own many kinds
        raise CheckpointError(
            f"There is no folder {model} here, and it can't be fetched from the Hugging Face hub:"
            f" {first_line(error)}."
        ) from error


def attempt(what: str, call: Callable[..., Loaded], *given: Any, **named: Any) -> Loaded:
    """Call a loading function and turn any error into a `CheckpointError`.

    Args:
        what: The beginning of the error message, such as "The tokenizer can't be loaded".
        call: The function.
        given: Its positional arguments.
        named: Its keyword arguments.

    Returns:
        What the function returns.

    Raises:
        CheckpointError: The function failed.
    """
    try:
        return call(*given, **named)
    except FastVlmError:
        raise
    except MemoryError as error:
        raise CheckpointError(f"{what}: the memory is not large enough.") from error
    except Exception as error:  # other libraries raise errors of any kind on broken files
        raise CheckpointError(f"{what}: {first_line(error)}.") from error


def load_tokenizer(folder: Path, **options: Any) -> PreTrainedTokenizerBase:
    """Load a folder's tokenizer.

    Raises:
        CheckpointError: There is none, or it is broken.
    """
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")
    if not any((folder / name).is_file() for name in names):
        raise CheckpointError(
            f"There is no tokenizer in {folder}: neither {' nor '.join(names)}; save it there with"
            " tokenizer.save_pretrained."
        )
    what = f"The tokenizer in {folder} can't be loaded"
    found: PreTrainedTokenizerBase = attempt(what, AutoTokenizer.from_pretrained, folder, **options)
    return found


def _load_with_transformers(
    folder: Path, options: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | ProcessorMixin]:
    trusting = {"trust_remote_code": bool(options.pop("trust_remote_code", False))}
    if not trusting["trust_remote_code"] and needs_code(read_object(folder / "config.json")):
        raise CheckpointError(
            f"The model in {folder} is of a class that is defined by code beside its weights; read"
            " that code, and load it with trust_remote_code=True if you trust it."
        )
    config = attempt(
        f"{folder / 'config.json'} is refused", AutoConfig.from_pretrained, folder, **trusting
    )
    check_generation_config(folder)
    shell = attempt(f"{folder / 'config.json'} is refused", shell_of, config, trusting)
    check_family(shell)
    shows_images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if (
        "quantization_config" not in options
        and getattr(config, "quantization_config", None) is None
    ):
        check_size(folder / "config.json", weight_files(folder), shell)
    target, found = attempt(
        f"The model in {folder} can't be loaded",
        automatic(config).from_pretrained,
        folder,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **options,
        **trusting,
    )
    check_loaded(folder, found)
    if shows_images and not isinstance(getattr(target.base_model, "vision_tower", None), FastViTHD):
        what = f"The processor in {folder} can't be loaded"
        return target, attempt(what, load_processor, folder, config, **trusting)
    return target, load_tokenizer(folder, **trusting)


def shell_of(config: PreTrainedConfig, options: dict[str, Any]) -> PreTrainedModel:
    """Return a configuration's model on the meta device, which has no weights.

    Args:
        config: The configuration.
        options: What `from_config` takes beside it.
    """
    with on_no_device():
        shell: PreTrainedModel = automatic(config).from_config(config, **options)
    return shell


def needs_code(stored: dict[str, Any]) -> bool:
    """Return whether a configuration needs a class that is not in `transformers` itself."""
    return "auto_map" in stored and stored.get("model_type") not in CONFIG_MAPPING


def check_generation_config(folder: Path) -> None:
    """Refuse generation settings that would fail only when a reply is generated.

    Raises:
        CheckpointError: The settings are invalid.
    """
    file = folder / "generation_config.json"
    if not file.is_file():
        return
    attempt(f"{file} is refused", GenerationConfig.from_pretrained, folder)
    stored = read_object(file)
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        value = stored.get(name)
        tokens = value if isinstance(value, list) else [value]
        if value is not None and not all(type(token) is int for token in tokens):
            raise CheckpointError(f"{file} has no token as {name}: {shortened(repr(value))}.")


def automatic(config: PreTrainedConfig) -> Any:
    """Return the auto class of `transformers` that loads a configuration's model."""
    kind = type(config)
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    # BART's decoder is a causal model, too, where the configuration says that it stands alone.
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING and not config.is_encoder_decoder
    if kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING and not causal:
        return AutoModelForSeq2SeqLM
    return AutoModelForCausalLM


def check_loaded(place: Any, found: dict[str, Any]) -> None:
    """Refuse a model with weights that were not in its files; warn of unused ones.

    Args:
        place: Where the files are, for messages.
        found: The loading info of `from_pretrained`.

    Raises:
        CheckpointError: A weight is missing or has the wrong shape, and was initialised at random.
    """
    wrong = [misshapen(*entry) for entry in sorted(found["mismatched_keys"])]
    refuse_wrong(place, {"missing": sorted(found["missing_keys"]), "misshapen": wrong})
    if errors := found.get("error_msgs"):
        raise CheckpointError(f"The weights in {place} can't be read: {errors[0]}.")
    if unused := [
        key for key in sorted(found["unexpected_keys"]) if not key.endswith(IGNORED_WEIGHT_SUFFIXES)
    ]:
        warnings.warn(
            f"Some weights in {place} are not used, as config.json has no place for them:"
            f" {named(unused)}.",
            stacklevel=2,
        )


def _load_layout(
    folder: Path, layout: Layout, stored: dict[str, Any], options: dict[str, Any]
) -> FastVlmForConditionalGeneration:
    options = {name: value for name, value in options.items() if name != "trust_remote_code"}
    config, weights = layout.convert(stored, read_weights(folder))
    check_weights(folder, config, weights)
    model = FastVlmForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=weights, **options
    )
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def check_weights(folder: Path, config: FastVlmConfig, weights: dict[str, Tensor]) -> None:
    """Refuse weights that are not exactly those of the configuration's model.

    Args:
        folder: The model's folder, for the error message.
        config: The model's configuration.
        weights: The weights by the names that fastvlm gives them.

    Raises:
        CheckpointError: Weights are missing, left over, or of another shape; it names them.
    """
    with on_no_device():
        model = FastVlmForConditionalGeneration(config)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found = {name: tensor.shape for name, tensor in weights.items()}
    # Neither decides anything: a counter of training, and a copy of the tied embeddings.
    free = {name for name in wanted if name.endswith(".num_batches_tracked")}
    if config.tie_word_embeddings:
        free.add("lm_head.weight")
    refuse_wrong(
        folder,
        {
            "missing": sorted(wanted.keys() - found.keys() - free),
            "left over": sorted(found.keys() - wanted.keys() - free),
            "misshapen": [
                misshapen(name, found[name], wanted[name])
                for name in sorted(wanted.keys() & found.keys())
                if wanted[name] != found[name]
            ],
        },
    )


def _teach_images(
    model: FastVlmForConditionalGeneration, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Give Apple's tokenizer a token for images, which its code puts in as -200.

    Raises:
        CheckpointError: The embeddings have no row left for it.
    """
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    image = cast(int, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    rows = cast(Tensor, model.get_input_embeddings().weight).shape[0]
    if image >= rows:
        raise CheckpointError(
            f"The tokenizer has {image} tokens and the model {rows} embeddings: none is left for"
            " images."
        )
    model.config.image_token_index = image
    tokenizer.chat_template = CHATML_TEMPLATE
