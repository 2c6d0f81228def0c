"""A model of any class of transformers, with its real configuration class and tiny dimensions."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

import fastvlm.vision  # noqa: F401  transformers' FastVLM is then built with our encoder
from tests.language.overrides import OVERRIDES, SINGLE

WIDTH, HEADS, HEAD, INNER, DEPTH = 64, 4, 16, 128, 4
VOCABULARY, PLACES, WINDOW, EXPERTS, RANK, CODES = 99, 256, 8, 8, 16, 64
LARGEST = 20_000_000
"""Parameters that a model may have."""

Fields = dict[str, Any]
Rule = tuple[re.Pattern[str], int]


class BuildError(Exception):
    """A class whose tiny model can't be built."""


def _rule(pattern: str, value: int) -> Rule:
    return re.compile(pattern), value


RULES = [
    _rule(r".*(vocab_size|vocab)(_per_layer_input|_base)?", VOCABULARY),
    _rule(r"num_embeddings|num_embeds|num_centroids|.*codebook_size", CODES),
    _rule(r".*n_shared_experts|.*num_shared_experts", 1),
    _rule(r".*(num_|n_)(\w+_)?experts|zero_expert_num", EXPERTS),
    _rule(r"index_topk", WINDOW),
    _rule(r"num_experts_per_tok(en)?|.*top_?k|moe_k|index_topk_blocks|.*top_k", 2),
    _rule(r"n_group|num_expert_group|n_groups|.*n_?groups|o_groups", 2),
    _rule(r"topk_group", 1),
    _rule(
        r".*(_period|sliding_window_pattern|_every_n_layers|_layer_interval|layer_group_size)", 2
    ),
    _rule(r".*_layer_offset|first_k_dense_replace|num_dense_layers|layers_per_attn_res_block", 1),
    _rule(r".*sparse_step|layer_frequency|num_kv_shared_layers|max_window_layers", 2),
    _rule(r"(num_|n_)?(sparse_)?(\w+_)?layers?|depth|num_blocks|num_layers_per_stack", DEPTH),
    _rule(r"(\w*_)?(sliding_window|attention_chunk_size|sliding_window_size)", WINDOW),
    _rule(r".*(head_dim|dim_head|head_size|headdim|d_head|d_kv|kv_channels|rotary_dim)", HEAD),
    _rule(r".*(_heads?|n_heads?|num_heads|attn_heads|num_query_groups)", HEADS),
    _rule(r".*lora_rank|hc_lowrank|.*_rank", RANK),
    _rule(r".*max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length", PLACES),
    _rule(r"max_(target|encoder_position|decoder_position)\w*|model_max_length", PLACES),
    _rule(r".*(state_size|d_state)|(mamba_)?chunk_size", HEAD),
    _rule(r".*(intermediate|ffn|feed_?forward|d_ff|dff|dim_ff|mlp_dim|n_inner|d_inner).*", INNER),
    _rule(r".*(hidden_size|d_model|n_embd|_dim|embedding_size|hidden_dim|embed_dim).*", WIDTH),
    _rule(r".*(_width|_channels?|channel_size|_size_mlp|output_size|dimension).*", WIDTH),
    _rule(r"dim_model|output_dim|input_dim|lru_width|pooler_output_size|attention_channels", WIDTH),
]
"""What a field of some name is at most: the first pattern that fits the whole name counts."""
MISSING = {"head_dim": HEAD, "num_key_value_heads": HEADS // 2, "num_experts_per_tok": 2}
"""What a field is where the default says nothing."""
AS_IT_IS = re.compile(
    r".*(image_size|patch_size|img_size|crop_size|kernel_size|window_size|num_channels|conv_width"
    r"|(^|_)(in|out)_channels|audio_channels|mel\w*|input_feat_size|feature_size|sampling_rate"
    r"|hop_length|frame_size|merge_size|qformer_window\w*|conv1d_width|\w*_d_conv|\w*_multiple_of"
    r"|num_mel_bins|attention_window|\w*kernel_dim)"
)
"""Fields that say how images and sounds are cut, which costs a tiny model little."""
DEPTHS = [
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "depth",
    "decoder_layers",
    "layers",
]
IDS = re.compile(r".*(_ids?|token_(id|index)|_index|_token)")


def build(
    model_type: str, class_name: str, varied: Callable[[PreTrainedModel], int]
) -> PreTrainedModel:
    """Return a tiny model with random weights, in float64 and for evaluation.

    Args:
        model_type: The configuration's model type.
        class_name: The model's class.
        varied: How many different tokens a model's reply has, to choose weights by.

    Raises:
        BuildError: The class can't be built so small, with the reason.
    """
    try:
        config = small_config(model_type, class_name)
        made = getattr(transformers, class_name)
        guarded(made, copy.deepcopy(config))
        torch.manual_seed(5)
        dtype = torch.float32 if model_type in SINGLE else torch.float64
        return lively(started(made(config).to(dtype).eval()), varied)
    except BuildError:
        raise
    except Exception as error:
        raise BuildError(first_line(error)) from error


def first_line(error: BaseException) -> str:
    """Return an exception's class and the line that says most."""
    lines = [line.strip().rstrip(":") for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *lines[: 2 if "validat" in "".join(lines[:1]) else 1]])


def guarded(made: type[PreTrainedModel], config: PreTrainedConfig) -> None:
    """Check on the meta device, where nothing is allocated, that a model is tiny.

    Raises:
        BuildError: It isn't.
    """
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in made(config).parameters())
    if count > LARGEST:
        raise BuildError(f"It would have {count / 1e6:.0f}M parameters.")


def small_config(model_type: str, class_name: str) -> PreTrainedConfig:
    """Return the configuration of a tiny model."""
    kind = CONFIG_MAPPING[model_type]
    fields = kind(**OVERRIDES.get(model_type, {}).get("default", {})).to_dict()
    shrunk = Shrinking().config(fields)
    if "is_decoder" in fields and class_name in causal_names():
        shrunk["is_decoder"] = True
    config = wanted(kind.from_dict(shrunk), getattr(transformers, class_name))
    config._experts_implementation = "eager"  # the others don't compute in float64
    return config


def wanted(config: PreTrainedConfig, made: type[PreTrainedModel]) -> PreTrainedConfig:
    """Return the configuration that a class is made with, which may stand inside another."""
    if made.config_class is None or isinstance(config, made.config_class):
        return config
    inner = [part for part in vars(config).values() if isinstance(part, made.config_class)]
    return inner[0] if inner else config


def causal_names() -> set[str]:
    """Return the names of the classes for causal language modelling."""
    names = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return {name for value in names.values() for name in each(value)}


def each(value: Any) -> list[Any]:
    """Return what a mapping names: one class or several."""
    return list(value) if isinstance(value, list | tuple) else [value]


def merge(fields: Fields, changes: Fields) -> None:
    """Change fields, those of configurations inside as well; `...` takes a field away."""
    for name, value in changes.items():
        if name == "default":
            continue
        if value is ...:
            fields.pop(name, None)
        elif isinstance(value, dict) and isinstance(fields.get(name), dict):
            merge(fields[name], value)
        else:
            fields[name] = copy.deepcopy(value)


class Shrinking:
    """Shrinks a configuration's fields, and gives special tokens places in the vocabulary."""

    def __init__(self) -> None:
        self.tokens: dict[int, int] = {}

    def config(self, fields: Fields) -> Fields:
        """Return the fields of a configuration, shrunk."""
        deep = depth(fields)
        chosen = layers(fields, deep)
        small = {
            name: self.field(name, value, fields, deep, chosen) for name, value in fields.items()
        }
        merge(small, OVERRIDES.get(fields.get("model_type", ""), {}))
        return small

    def field(self, name: str, value: Any, fields: Fields, deep: int, chosen: list[int]) -> Any:
        """Return one field of a configuration, shrunk."""
        if isinstance(value, dict):
            return self.inside(name, value, fields, chosen)
        if isinstance(value, list | tuple) and value:
            return self.listed(name, list(value), fields, deep, chosen)
        if isinstance(value, bool) or not isinstance(value, int):
            return MISSING.get(name) if value is None else value
        return self.number(name, value, fields)

    def inside(self, name: str, value: Fields, fields: Fields, chosen: list[int]) -> Fields:
        """Return a configuration, or settings, inside a configuration."""
        if name == "per_layer_config":
            layer = {int(number): self.config(inner) for number, inner in value.items()}
            return {str(new): layer[old] for new, old in enumerate(chosen) if old in layer}
        if name in {"label2id", "compress_rates"} or not all(isinstance(key, str) for key in value):
            return value
        if name.startswith("rope_"):
            return rotary(value, fields)
        return self.config(value)

    def number(self, name: str, value: int, fields: Fields) -> int:
        """Return a number, shrunk."""
        if IDS.fullmatch(name):
            return self.token(value)
        if AS_IT_IS.fullmatch(name):
            return value
        if name in {"num_key_value_heads", "num_kv_heads", "kv_n_heads"}:
            queries = fields.get("num_attention_heads", fields.get("n_heads"))
            return HEADS if value == queries else min(value, HEADS // 2)
        for pattern, most in RULES:
            if pattern.fullmatch(name):
                return min(value, most)
        return value

    def token(self, value: int) -> int:
        """Return a token of the small vocabulary, the same one for the same token."""
        if value < VOCABULARY:
            return value
        return self.tokens.setdefault(value, VOCABULARY - 1 - len(self.tokens))

    def listed(
        self, name: str, values: list[Any], fields: Fields, deep: int, chosen: list[int]
    ) -> list[Any]:
        """Return a list, shrunk: of values per layer, of layers, of tokens or of dimensions."""
        numbers = all(isinstance(value, int) and not isinstance(value, bool) for value in values)
        if numbers and IDS.fullmatch(name):
            return [self.token(value) for value in values]
        if numbers and is_layers(name, values, deep):
            last = max(deep, max(values) + 1)
            return sorted({value * DEPTH // last for value in values})
        if len(values) == deep and deep > DEPTH:
            values = [values[number] for number in chosen]
        if numbers:
            return [self.number(name, value, fields) for value in values]
        return [self.config(value) if isinstance(value, dict) else value for value in values]


def is_layers(name: str, values: list[int], deep: int) -> bool:
    """Tell whether a list names layers."""
    named = re.search(r"layer|index|idx", name) and "type" not in name
    rising = all(one < other for one, other in pairwise(values))
    return bool(named) and rising and values[0] >= 0 and max(values) < max(deep, 1) + 1


def depth(fields: Fields) -> int:
    """Return how many layers a configuration has, or 0."""
    found = [fields[name] for name in DEPTHS if isinstance(fields.get(name), int)]
    return found[0] if found else 0


def layers(fields: Fields, deep: int) -> list[int]:
    """Return which layers to keep, so that each sort of layer remains."""
    if deep <= DEPTH:
        return list(range(deep))
    lists = [value for value in fields.values() if isinstance(value, list) and len(value) == deep]
    single = {int(number): value for number, value in fields.get("per_layer_config", {}).items()}
    lists.append([single.get(number) for number in range(deep)])
    sorts: dict[str, int] = {}
    for number in range(deep):
        sorts.setdefault(str([value[number] for value in lists]), number)
    kept = list(sorts.values())[:DEPTH]
    others = (number for number in range(deep) if number not in kept)
    return sorted([*kept, *(next(others) for _ in range(DEPTH - len(kept)))])


def rotary(settings: Fields, fields: Fields) -> Fields:
    """Return settings of rotary positions for the small heads."""
    found: Fields = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            found[name] = rotary(value, fields)
        elif name.endswith("mrope_section"):
            share = settings.get("partial_rotary_factor", fields.get("partial_rotary_factor")) or 1
            found[name] = sections(value, int(HEAD * share) // 2)
        elif name in {"long_factor", "short_factor"}:
            found[name] = value[: HEAD // 2]
        elif name == "original_max_position_embeddings":
            found[name] = min(value, PLACES)
        else:
            found[name] = value
    return found


def sections(old: list[int], whole: int) -> list[int]:
    """Return shares of a whole in about the old proportions, none of them empty if possible."""
    shares = [max(1, value * whole // sum(old)) for value in old]
    while sum(shares) < whole:
        shares[-1] += 1
    while sum(shares) > whole:
        shares[shares.index(max(shares))] -= 1
    return shares


def started(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model that knows which token its decoder begins with, and whose voice it has."""
    if hasattr(model, "speaker_map"):
        vars(model)["speaker_map"] = {"Chelsie": {}}
    settings = getattr(model, "generation_config", None)
    if settings is not None:  # processors of logits are no family's business
        settings.forced_bos_token_id = settings.forced_eos_token_id = None
    if settings is not None and model.config.is_encoder_decoder:
        first = [settings.decoder_start_token_id, settings.bos_token_id]
        if first == [None, None]:
            first = [getattr(model.config, "decoder_start_token_id", None), settings.pad_token_id]
            settings.decoder_start_token_id = next((one for one in first if one is not None), 0)
    return model


class Sizes(NamedTuple):
    """How large random weights are."""

    embedding: float
    position: float
    gain: float


ATTEMPTS = [
    Sizes(0.3, 3.0, 2.0),
    Sizes(0.05, 3.0, 3.0),
    Sizes(1.0, 3.0, 4.0),
    Sizes(0.1, 1.0, 1.0),
    Sizes(0.3, 8.0, 8.0),
    Sizes(0.02, 0.3, 6.0),
    Sizes(2.0, 6.0, 0.7),
]
"""Sizes to try until replies vary: which do depends on norms, tied weights and positions."""
VARIED = 6


def lively(model: PreTrainedModel, varied: Callable[[PreTrainedModel], int]) -> PreTrainedModel:
    """Return a model with random weights, so that its reply has several different tokens.

    Args:
        model: The model.
        varied: How many different tokens its reply has.
    """
    found: dict[int, int] = {}
    for number in range(2 * len(ATTEMPTS)):
        randomise(model, number)
        count = varied(model)
        if count >= VARIED:
            return model
        found.setdefault(count, number)
    randomise(model, found[max(found)])
    return model


@torch.no_grad()
def randomise(model: PreTrainedModel, number: int) -> None:
    """Draw a model's weights anew."""
    generator = torch.Generator().manual_seed(7 + number)
    sizes = ATTEMPTS[number % len(ATTEMPTS)]
    seen: set[int] = set()
    for parameter, size in weights(model, sizes):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(values * size)


def weights(model: nn.Module, sizes: Sizes) -> Iterator[tuple[nn.Parameter, float]]:
    """Yield the weights to draw anew, and how large they become."""
    for place, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.is_floating_point() or name.endswith(("A_log", "dt_bias")):
                continue
            if isinstance(module, nn.Embedding):
                positions = re.search(r"posi|wpe|relative", place)
                yield parameter, sizes.position if positions else sizes.embedding
            elif parameter.dim() > 1:
                yield parameter, sizes.gain / math.sqrt(entering(parameter))
            elif name == "bias" and hasattr(module, "weight") and module.weight.dim() > 1:
                yield parameter, 0.1


def entering(parameter: nn.Parameter) -> int:
    """Return how many numbers a matrix's output is a sum of."""
    return max(1, WIDTH if parameter.dim() == 3 else parameter.numel() // parameter.shape[0])
