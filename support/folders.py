"""Hugging Face model folders in detail: what config.json may say, weights in one file or in shards,
and the tokenizer's files.

Whatever model.py would compute wrongly is refused here by name, before any weight is read.
"""
from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import tokenizers
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from support.common import InputError, read_json


@dataclass(frozen=True)
class Family:
    """What a family fixes, and what it means where config.json leaves a field out (transformers'
    defaults)."""
    qkv_bias: bool = False             # always there; False: as attention_bias says
    reads_attention_bias: bool = True
    reads_mlp_bias: bool = False
    qk_norm: str | None = None
    norm_after: bool = False
    may_skip_rope: bool = False        # in some layers
    has_multipliers: bool = False
    kv_heads: int | None = None        # None: as many as query heads
    head_dim: int | None = None        # None: width / heads
    positions: int = 2048
    window: int | None = None          # sliding_window; None: there is none
    window_is_on: str = "never"        # or "always", or "flag": as use_sliding_window says
    eps: float = 1e-6
    theta: float = 10000.0
    tied: bool = False


FAMILIES = {
    "llama": Family(reads_mlp_bias=True),
    "mistral": Family(
        reads_attention_bias=False, kv_heads=8, positions=131072, window=4096,
        window_is_on="always"),
    "qwen2": Family(
        qkv_bias=True, reads_attention_bias=False, kv_heads=32, positions=32768, window=4096,
        window_is_on="flag"),
    "qwen3": Family(
        qk_norm="head", kv_heads=32, head_dim=128, positions=32768, window=4096,
        window_is_on="flag"),
    "smollm3": Family(
        reads_mlp_bias=True, may_skip_rope=True, kv_heads=4, positions=32768, theta=2e6, tied=True,
        window_is_on="flag"),
    "olmo2": Family(qk_norm="whole", norm_after=True, eps=1e-5),
    "granite": Family(reads_mlp_bias=True, has_multipliers=True),
}

# Reject absurd sizes before anything of that size is allocated. No model is larger than this.
SIZE_LIMITS = {
    "sliding_window": 2**31,
    "vocab_size": 2**22,
    "hidden_size": 2**17,
    "intermediate_size": 2**20,
    "num_hidden_layers": 1024,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**12,
    "max_position_embeddings": 2**27,
    "no_rope_layer_interval": 2**10,
}

ONLY = {    # fields that may have these values only; the first is that of a file without them
    "hidden_act": ("silu",),
    "is_causal": (True,),
    "transformers_weights": (None, "model.safetensors"),    # other files to be read
    "configuration_files": (None, []),
    "partial_rotary_factor": (1.0,),
}

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "generation_config.json")


# ---- config.json ---------------------------------------------------------------------------------

class ConfigFile:
    """config.json, whose values are checked as they are read."""
    def __init__(self, folder: str):
        if not os.path.isdir(folder):
            raise InputError(
                f"{folder}: no such folder; --model wants a Hugging Face model folder on this "
                "machine (hf download NAME --local-dir DIR)")
        self.path = os.path.join(folder, "config.json")
        if not os.path.isfile(self.path):
            raise InputError(
                f"{folder}: no config.json there; --model wants a Hugging Face model folder")
        self.raw = read_json(self.path)
        if not isinstance(self.raw, dict):
            self.refuse("not a JSON object")

    def refuse(self, what: str):
        raise InputError(f"{self.path}: {what}")

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.raw.get(name, default) or False
        if not isinstance(value, bool):
            self.refuse(f"{name} is {value!r}; expected true or false")
        return value

    def size(self, name: str, default: int | None = None) -> int:
        value = self.raw.get(name)
        if value is None:
            value = default
        most = SIZE_LIMITS[name]
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            self.refuse(f"{name} is {value!r}; expected a whole number from 1 to {most}")
        return value

    def number(self, name: str, default: float | None = None, where: dict | None = None) -> float:
        value = (self.raw if where is None else where).get(name, default)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 1e-30 < value < 1e30:    # fp32 holds it and its reciprocal
            self.refuse(f"{name} is {value!r}; expected a positive number of ordinary size")
        return float(value)


def read_settings(folder: str) -> dict:
    """The fields of model.ModelConfig, from config.json in either dialect (`rope_theta` and
    `rope_scaling`, or `rope_parameters`). Raises InputError for what model.py does not compute."""
    file = ConfigFile(folder)
    raw = file.raw
    name = raw.get("model_type")
    if name not in list(FAMILIES):    # it may be anything, a list too
        file.refuse(f"model_type {name!r} is not supported (supported: {', '.join(FAMILIES)})")
    family = FAMILIES[name]
    if raw.get("quantization_config"):
        file.refuse("quantized weights are not supported; use the unquantized model")
    for field, supported in ONLY.items():
        if raw.get(field, supported[0]) not in supported:
            file.refuse(f"{field} {raw[field]!r} is not supported (supported: "
                        f"{', '.join(map(repr, supported))})")

    heads = file.size("num_attention_heads")
    width = file.size("hidden_size")
    layers = file.size("num_hidden_layers")
    kv_heads = heads    # what a null means
    if "num_key_value_heads" not in raw:
        kv_heads = family.kv_heads or heads
    head_dim = file.size("head_dim", family.head_dim or max(width // heads, 1))
    positions = file.size("max_position_embeddings", family.positions)
    refuse_other_attention(file, family, positions)
    rope = rope_parameters(file, family.theta)
    bias = family.reads_attention_bias and file.flag("attention_bias")

    settings = dict(
        model_type=name,
        vocab_size=file.size("vocab_size"),
        hidden_size=width,
        intermediate_size=file.size("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=file.size("num_key_value_heads", kv_heads),
        head_dim=head_dim,
        max_position_embeddings=positions,
        rms_norm_eps=file.number("rms_norm_eps", family.eps),
        tie_word_embeddings=file.flag("tie_word_embeddings", family.tied),
        qkv_bias=bias or family.qkv_bias,
        out_bias=bias,
        mlp_bias=family.reads_mlp_bias and file.flag("mlp_bias"),
        qk_norm=family.qk_norm,
        norm_after=family.norm_after,
        rope_theta=file.number("rope_theta", where=rope),
        rope_scaling=rope_scaling(file, rope),
        attention_factor=attention_factor(file, rope),
        raw=raw)
    if family.may_skip_rope:
        settings["layers_without_rope"] = layers_without_rope(file, layers)
    if family.has_multipliers:
        settings |= factors(file, head_dim)
    if heads % settings["num_key_value_heads"]:
        shared = settings["num_key_value_heads"]
        file.refuse(f"{heads} query heads cannot share {shared} key/value heads")
    if head_dim % 2:
        file.refuse(f"head_dim {head_dim} is odd; rotary position embedding turns pairs")
    return settings


def layers_without_rope(file: ConfigFile, layers: int) -> tuple[int, ...]:
    """SmolLM3's: `no_rope_layers` has a 0 for each of them and a 1 for the others; where there is
    no list, it is every fourth layer, or every `no_rope_layer_interval`-th."""
    every = file.size("no_rope_layer_interval", 4)
    has_rope = file.raw.get("no_rope_layers")
    if has_rope is None:
        has_rope = [int((layer + 1) % every != 0) for layer in range(layers)]
    if (not isinstance(has_rope, list) or len(has_rope) < layers
            or any(value not in (0, 1) for value in has_rope)):
        file.refuse(f"no_rope_layers is not a list of {layers} zeros and ones")
    return tuple(layer for layer in range(layers) if not has_rope[layer])


def factors(file: ConfigFile, head_dim: int) -> dict[str, float]:
    """Granite's multipliers, as ModelConfig has them."""
    return dict(
        embedding_factor=file.number("embedding_multiplier", 1.0),
        # Theirs stands in place of 1 / √d.
        query_factor=file.number("attention_multiplier", 1.0) * math.sqrt(head_dim),
        residual_factor=file.number("residual_multiplier", 1.0),
        hidden_factor=1 / file.number("logits_scaling", 1.0))


def refuse_other_attention(file: ConfigFile, family: Family, positions: int) -> None:
    """Sliding windows, and layers of another type than full attention."""
    is_on = family.window_is_on == "always"
    if family.window_is_on == "flag":
        is_on = file.flag("use_sliding_window")
    if is_on:
        window = file.raw.get("sliding_window", family.window)
        if window is not None and file.size("sliding_window", family.window) < positions:
            file.refuse(f"an active sliding window ({window}) is not supported; set sliding_window "
                        "to null if you mean full attention")
    kinds = file.raw.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        file.refuse("layer_types names other layers than full_attention, such as a sliding window; "
                    "they are not supported")


def rope_parameters(file: ConfigFile, theta: float) -> dict:
    """What either dialect says of rotary position embedding."""
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(file.raw.get(name) or {}, dict):
            file.refuse(f"{name} is not an object")
    # Files that mix the dialects exist: rope_theta may stand beside either.
    rope = {"rope_theta": file.raw.get("rope_theta", theta)}
    rope |= file.raw.get("rope_scaling") or file.raw.get("rope_parameters") or {}
    if any(isinstance(value, dict) for value in rope.values()):
        file.refuse("rope parameters that differ between layers are not supported")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        file.refuse("partial_rotary_factor is not supported")
    longest = "original_max_position_embeddings"
    if longest in rope and file.raw.get(longest, rope[longest]) != rope[longest]:
        file.refuse(f"{longest} stands there twice, with two values")
    return rope


def rope_scaling(file: ConfigFile, rope: dict) -> tuple | None:
    """model.ModelConfig.rope_scaling."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return ("linear", file.number("factor", where=rope))
    if kind == "yarn":
        return ("yarn", *yarn_numbers(file, rope))
    if kind != "llama3":
        file.refuse(f"rope type {kind!r} is not supported (supported: default, linear, llama3, "
                    "yarn)")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    factor, low, high, original = (file.number(name, where=rope) for name in names)
    if low >= high:
        file.refuse("low_freq_factor must be below high_freq_factor")
    return ("llama3", factor, low, high, original)


def yarn_numbers(file: ConfigFile, rope: dict) -> list[float]:
    """[factor, fast, slow, original length]. Waves that close more than `fast` turns in a text of
    the original length are kept, those with fewer than `slow` slowed, those between mixed."""
    for name in ("mscale", "mscale_all_dim", "truncate"):
        if name in rope:
            file.refuse(f"{name} is not supported with yarn")
    if "original_max_position_embeddings" not in rope:
        file.refuse("yarn lacks original_max_position_embeddings")
    if file.number("rope_theta", where=rope) <= 1:
        file.refuse("rope_theta must be above 1 with yarn")
    names = ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings")
    defaults = {"beta_fast": 32.0, "beta_slow": 1.0}
    return [file.number(name, defaults.get(name), rope) for name in names]


def attention_factor(file: ConfigFile, rope: dict) -> float:
    """model.ModelConfig.attention_factor: yarn's, of cos and sin."""
    if rope.get("rope_type", rope.get("type")) != "yarn":
        return 1.0
    factor = file.number("factor", where=rope)
    default = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    return file.number("attention_factor", default, rope)


# ---- Weights -------------------------------------------------------------------------------------

def weight_files(folder: str) -> list[str]:
    """Paths of the safetensors files: model.safetensors, or the shards its index names."""
    single = os.path.join(folder, "model.safetensors")
    if os.path.isfile(single):
        return [single]
    index = os.path.join(folder, "model.safetensors.index.json")
    if not os.path.isfile(index):
        raise InputError(f"{folder}: neither model.safetensors nor model.safetensors.index.json "
                         "there (only safetensors weights are read)")
    table = read_json(index)
    names = table.get("weight_map") if isinstance(table, dict) else None
    well_formed = isinstance(names, dict) and names
    if not well_formed or not all(isinstance(n, str) for n in names.values()):
        raise InputError(f"{index}: no weight_map of tensor names to files")
    for name in set(names.values()):
        if name != os.path.basename(name):
            raise InputError(f"{index}: shard {name!r} points outside the model folder")
        if not os.path.isfile(os.path.join(folder, name)):
            raise InputError(f"{index}: shard {name!r} is missing")
    return [os.path.join(folder, name) for name in sorted(set(names.values()))]


def check_tensors(folder: str, wanted: dict[str, Tensor], tied: bool) -> dict[str, str]:
    """The file of each tensor. Raises InputError unless they are `wanted`'s, by name and shape.

    With `tied`, lm_head.weight may be there too, as a copy of the embedding."""
    shapes = {name: list(p.shape) for name, p in wanted.items()}
    if tied:
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    where = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as f:
                found = {name: list(f.get_slice(name).get_shape()) for name in f.keys()}
        except (SafetensorError, OSError) as e:
            raise InputError(
                f"{path}: not a readable safetensors file, perhaps cut short ({e})") from None
        for name, shape in found.items():
            if name in where:
                other = os.path.basename(where[name])
                raise InputError(f"{path}: tensor {name} is in {other} too")
            where[name] = path
            if name.endswith("rotary_emb.inv_freq"):    # in some old folders; config.json says it
                continue
            if name not in shapes:
                raise InputError(f"{path}: unexpected tensor {name!r}; config.json describes "
                                 "another model")
            if shapes[name] != shape:
                raise InputError(f"{path}: {name} is {tuple(shape)}; config.json says "
                                 f"{tuple(shapes[name])}")
    missing = sorted(set(wanted) - set(where))
    if missing:
        raise InputError(f"{folder}: {len(missing)} weights are in no file, first {missing[0]}")
    return where


def tensors(folder: str, wanted: dict[str, Tensor], tied: bool) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) for each that is wanted, one at a time. Raises InputError as check_tensors
    does, and for NaN, infinite values, quantized weights, and a tied copy that differs."""
    where = check_tensors(folder, wanted, tied)
    floats = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    for path in sorted(set(where.values())):
        with safe_open(path, framework="pt") as f:
            for name in f.keys():
                if name not in wanted:
                    continue
                tensor = f.get_tensor(name)
                if tensor.dtype not in floats:
                    raise InputError(f"{path}: {name} is {tensor.dtype}; quantized weights are not "
                                     "supported")
                if not tensor.isfinite().all():
                    raise InputError(f"{path}: {name} holds NaN or infinite values")
                yield name, tensor
    if tied and "lm_head.weight" in where:
        pair = []
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            with safe_open(where[name], framework="pt") as f:
                pair.append(f.get_tensor(name).float())
        if not torch.equal(*pair):
            raise InputError(f"{where['lm_head.weight']}: lm_head.weight differs from the "
                             "embedding, and config.json says tie_word_embeddings")


# ---- Tokenizer files -----------------------------------------------------------------------------

def read_backend(folder: str) -> tokenizers.Tokenizer:
    """tokenizer.json, as the tokenizers library reads it."""
    path = os.path.join(folder, "tokenizer.json")
    if not os.path.isfile(path):
        raise InputError(f"{folder}: no tokenizer.json there")
    try:
        backend = tokenizers.Tokenizer.from_file(path)
    except Exception as e:  # the library raises bare Exception
        reason = " ".join(str(e).split())[:200]
        raise InputError(f"{path}: not a readable tokenizer ({reason})") from None
    refuse_growth(path)
    backend.no_truncation()    # some files were saved with truncation or padding on
    backend.no_padding()
    return backend


LONGEST_GROWTH = 1000    # how many times longer a tokenizer's replacements may make a text


def refuse_growth(path: str) -> None:
    """Raises InputError for replacements that feed each other: forty of a by aa take for ever."""
    growth = 1.0
    spec = read_json(path)
    parts = [spec.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")]
    while parts:
        part = parts.pop()
        if isinstance(part, list):
            parts += part
        elif isinstance(part, dict):
            parts += [value for value in part.values() if isinstance(value, (list, dict))]
            pattern, content = part.get("pattern"), part.get("content")
            if isinstance(pattern, dict) and isinstance(content, str):
                replaced = pattern.get("String") or "x"    # an expression: one letter or more
                growth *= max(1.0, len(content) / len(replaced))
    if growth > LONGEST_GROWTH:
        raise InputError(f"{path}: its replacements can make a text {growth:.0e} times longer")


def read_optional(folder: str, name: str) -> dict:
    path = os.path.join(folder, name)
    value = read_json(path) if os.path.isfile(path) else {}
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object")
    return value


def special_tokens(folder: str, config: dict) -> dict[str, str]:
    """The texts of the special tokens that tokenizer_config.json names, or else
    special_tokens_map.json."""
    special = {}
    other = read_optional(folder, "special_tokens_map.json")
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = config.get(name) or other.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            special[name] = value
    return special


def end_tokens(
    folder: str, backend: tokenizers.Tokenizer, special: dict[str, str],
) -> tuple[int, list[int]]:
    """The token that ends a text, and the ids of all that end one: the special token's,
    generation_config.json's, or else config.json's. Raises InputError if there is none."""
    ids = end_ids(folder, "generation_config.json", backend.get_vocab_size())
    eos = special.get("eos_token")
    if not ids and eos is None:
        ids = end_ids(folder, "config.json", backend.get_vocab_size())
    try:
        end_id = backend.token_to_id(eos) if eos else next(iter(ids), None)
    except UnicodeEncodeError:    # half a surrogate pair
        end_id = None
    if end_id is None:
        raise InputError(
            f"{folder}: no end token; tokenizer_config.json or special_tokens_map.json must name "
            f"an eos_token of its vocabulary (it says {eos!r}), or generation_config.json or "
            "config.json an eos_token_id")
    return end_id, ids


def end_ids(folder: str, name: str, size: int) -> list[int]:
    """eos_token_id of a file, which may be one, several or none."""
    ids = read_optional(folder, name).get("eos_token_id", [])
    if not isinstance(ids, list):
        ids = [] if ids is None else [ids]
    if not all(type(i) is int and 0 <= i < size for i in ids):
        raise InputError(f"{folder}/{name}: eos_token_id {ids} is not in the vocabulary")
    return ids


def copy_tokenizer(source: str, folder: str) -> None:
    """Tokenizer, template and generation files of a model folder."""
    os.makedirs(folder, exist_ok=True)
    for name in TOKENIZER_FILES:
        path = os.path.join(source, name)
        if os.path.isfile(path):
            refuse_foreign(path)
            shutil.copyfile(path, os.path.join(folder, name))


def refuse_foreign(path: str) -> None:
    """Raises InputError for a link to a file that is of no model: what we copy may be published."""
    real = os.path.realpath(path)
    in_cache = os.path.basename(os.path.dirname(real)) == "blobs"    # the hub's cache
    is_json = path.endswith(".json") and os.path.basename(real).endswith(".json")
    same_folder = os.path.dirname(real) == os.path.realpath(os.path.dirname(path))
    if not (in_cache or is_json or same_folder):
        raise InputError(f"{path}: is a link to {real}; put a copy of the file there if it belongs "
                         "to the model")
