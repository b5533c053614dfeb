"""Hugging Face model folders in detail: both dialects of config.json, shards, tokenizer files."""
from __future__ import annotations

import os
import shutil

from support.common import InputError, read_json


FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

# No model is larger than this; a config.json that says so would only fail later, after a long time or with no memory left.
SIZE_LIMITS = {"sliding_window": 2**31, "vocab_size": 2**22, "hidden_size": 2**17, "intermediate_size": 2**20, "num_hidden_layers": 1024,
               "num_attention_heads": 2**12, "num_key_value_heads": 2**12, "head_dim": 2**12, "max_position_embeddings": 2**27}


def read_settings(folder: str) -> dict:
    """config.json in either dialect (`rope_theta` + `rope_scaling`, or `rope_parameters`).

    Raises InputError for everything this file would compute wrongly, by name, before any weight is read.
    """
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder; --model wants a Hugging Face model folder on this machine (hf download NAME --local-dir DIR)")
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        raise InputError(f"{folder}: no config.json there; --model wants a Hugging Face model folder")
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise InputError(f"{path}: not a JSON object")

    def refuse(what):
        raise InputError(f"{path}: {what}")

    family = raw.get("model_type")
    if family not in FAMILIES:
        refuse(f"model_type {family!r} is not supported (supported: {', '.join(FAMILIES)})")
    if raw.get("quantization_config"):
        refuse("quantized weights are not supported; use the unquantized model")
    if raw.get("hidden_act", "silu") != "silu":
        refuse(f"hidden_act {raw['hidden_act']!r} is not supported (supported: silu)")

    def flag(name):
        value = raw.get(name) or False
        if not isinstance(value, bool):
            refuse(f"{name} is {value!r}; expected true or false")
        return value

    def size(name, default=None):
        value = raw.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= SIZE_LIMITS[name]:
            refuse(f"{name} is {value!r}; expected a whole number from 1 to {SIZE_LIMITS[name]}")
        return value

    def number(where, name, default=None):
        value = where.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e300:
            refuse(f"{name} is {value!r}; expected a positive number")
        return float(value)

    heads, width = size("num_attention_heads"), size("hidden_size")
    positions = size("max_position_embeddings", {"llama": 2048, "mistral": 131072}.get(family, 32768))
    # A window that is not named is 4096 in mistral, and in qwen where it is switched on.
    if family == "mistral" or family.startswith("qwen") and flag("use_sliding_window"):
        window = raw.get("sliding_window", 4096)
        if window is not None and size("sliding_window", 4096) < positions:
            refuse(f"an active sliding window ({window}) is not supported; set sliding_window to null if you mean full attention")
    layer_types = raw.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        refuse("layer_types names other layers than full_attention, such as a sliding window; they are not supported")

    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(raw.get(name) or {}, dict):
            refuse(f"{name} is not an object")
    # Files that mix the dialects exist: rope_theta may stand beside either.
    rope = {"rope_theta": raw.get("rope_theta", 10000.0), **(raw.get("rope_scaling") or raw.get("rope_parameters") or {})}
    if any(isinstance(value, dict) for value in rope.values()):
        refuse("rope parameters that differ between layers are not supported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        scaling = None
    elif kind == "linear":
        scaling = ("linear", number(rope, "factor"))
    elif kind == "llama3":
        scaling = ("llama3", *(number(rope, n) for n in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")))
        if scaling[2] >= scaling[3]:
            refuse("low_freq_factor must be below high_freq_factor")
    else:
        refuse(f"rope type {kind!r} is not supported (supported: default, linear, llama3)")
    if raw.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0)) != 1.0:
        refuse("partial_rotary_factor is not supported")

    bias = flag("attention_bias") and family in ("llama", "qwen3")
    kv_heads = {"llama": heads, "mistral": 8}.get(family, 32) if "num_key_value_heads" not in raw else heads
    config = dict(
        model_type=family, vocab_size=size("vocab_size"), hidden_size=width, intermediate_size=size("intermediate_size"),
        num_hidden_layers=size("num_hidden_layers"), num_attention_heads=heads,
        num_key_value_heads=size("num_key_value_heads", kv_heads),
        head_dim=size("head_dim", 128 if family == "qwen3" else max(width // heads, 1)), max_position_embeddings=positions,
        rms_norm_eps=number(raw, "rms_norm_eps", 1e-6), tie_word_embeddings=flag("tie_word_embeddings"),
        qkv_bias=bias or family == "qwen2", out_bias=bias, mlp_bias=family == "llama" and flag("mlp_bias"),
        qk_norm=family == "qwen3", rope_theta=number(rope, "rope_theta", 10000.0), rope_scaling=scaling, raw=raw)
    if heads % config["num_key_value_heads"]:
        refuse(f"{heads} query heads cannot share {config['num_key_value_heads']} key/value heads")
    if config["head_dim"] % 2:
        refuse(f"head_dim {config['head_dim']} is odd; rotary position embedding turns pairs")
    return config


def weight_files(folder: str) -> list[str]:
    """Paths of the safetensors files: model.safetensors, or the shards its index names."""
    single, index = os.path.join(folder, "model.safetensors"), os.path.join(folder, "model.safetensors.index.json")
    if os.path.isfile(single):
        return [single]
    if not os.path.isfile(index):
        raise InputError(f"{folder}: neither model.safetensors nor model.safetensors.index.json there (only safetensors weights are read)")
    table = read_json(index)
    names = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(n, str) for n in names.values()):
        raise InputError(f"{index}: no weight_map of tensor names to files")
    for name in set(names.values()):
        if name != os.path.basename(name):
            raise InputError(f"{index}: shard {name!r} points outside the model folder")
        if not os.path.isfile(os.path.join(folder, name)):
            raise InputError(f"{index}: shard {name!r} is missing")
    return [os.path.join(folder, name) for name in sorted(set(names.values()))]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt", "tokenizer.model", "generation_config.json")


def copy_tokenizer(source: str, folder: str) -> None:
    """Tokenizer, template and generation files of a model folder."""
    os.makedirs(folder, exist_ok=True)
    for name in TOKENIZER_FILES:
        if os.path.isfile(os.path.join(source, name)):
            shutil.copyfile(os.path.join(source, name), os.path.join(folder, name))
