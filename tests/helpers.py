"""What several test files share: small models, their folders, and transformers as the oracle."""
import json
import os

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import sampler
from model import Transformer, read_config
from support import gpu, memory, ragged


# ---- Files and numbers ---------------------------------------------------------------------------

def read_json(path):
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def write_json(path, value):
    with open(path, "w", encoding="utf-8") as f:
        json.dump(value, f)


def read_tensors(path):
    """A safetensors file, copied: it may be written over, and load_file may have mapped it."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def relative(a, b):
    """Largest difference, as a share of the largest number in b."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


# ---- Folders that transformers has written, for tests of the network -----------------------------

SMALL = dict(
    vocab_size=67,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=None,    # some families' own is beyond so small a vocabulary
)

# With head_dim 6 to 16 and these llama3 numbers, some waves are kept, some are slowed, and some lie
# between.
ROPE = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "theta": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 100,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn-swapped": {    # the waves to keep and those to slow change places
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "beta_fast": 1.0,
        "beta_slow": 32.0,
        "original_max_position_embeddings": 128,
    },
    "yarn-given": {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 8.0,
        "attention_factor": 0.8,
        "beta_fast": 4.0,
        "beta_slow": 0.5,
        "original_max_position_embeddings": 64,
    },
}


def randomise(network, seed=0):
    """Fill every parameter with numbers that matter to the result.

    None stays at the value it is born with: a loader could forget a bias of 0 or a norm weight of
    1, and nobody would see it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            if p.dim() == 2:
                # About 1 / sqrt(fan-in), so that attention is neither flat nor a single peak.
                p.normal_(std=1.5 / p.shape[1] ** 0.5, generator=generator)
            else:
                p.uniform_(0.3, 1.7, generator=generator)
    return network


def write_rope(folder, rope, dialect):
    """Write config.json anew in one of two dialects, whichever the installed transformers wrote."""
    path = os.path.join(folder, "config.json")
    config = read_json(path)
    for name in ("rope_theta", "rope_scaling", "rope_parameters"):
        config.pop(name, None)
    if dialect == "rope_parameters":
        config["rope_parameters"] = dict(rope)
    else:
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        if rope["rope_type"] == "linear":    # as files from before llama3 spell it
            scaling["type"] = scaling.pop("rope_type")
        config["rope_theta"] = rope["rope_theta"]
        config["rope_scaling"] = None if rope["rope_type"] == "default" else scaling
    write_json(path, config)


def make_folder(
    folder,
    family="llama",
    rope="default",
    dialect="rope_scaling",
    shard="5GB",
    dtype=torch.float32,
    **changes,
):
    """A model folder written by transformers: the family's own config class, random weights,
    save_pretrained. `changes` are to SMALL."""
    config = AutoConfig.for_model(family, **{**SMALL, **changes})
    network = randomise(AutoModelForCausalLM.from_config(config))
    network.to(dtype).save_pretrained(folder, max_shard_size=shard)
    write_rope(folder, ROPE[rope], dialect)
    return str(folder)


def oracle(folder):
    """The folder as transformers reads it, with nothing missing and nothing left over."""
    network, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",    # the plainest
        output_loading_info=True,
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[what], (what, info[what])
    return network.eval()


def file_name(name):
    """A parameter's name in the files and in transformers."""
    return name if name.startswith("lm_head") else "model." + name


# ---- Models of our own, for tests of the sampler -------------------------------------------------

LLAMA = dict(
    model_type="llama",
    vocab_size=53,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    tie_word_embeddings=False,
    pad_token_id=None,
)
FAMILY_CONFIGS = {    # one for each switch of the block
    "llama": LLAMA,
    "qwen3": {**LLAMA, "model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "smollm3": {**LLAMA, "model_type": "smollm3", "no_rope_layers": [0, 1]},
    "olmo2": {**LLAMA, "model_type": "olmo2"},
    "granite": {
        **LLAMA, "model_type": "granite", "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2, "residual_multiplier": 0.7, "logits_scaling": 0.5},
}
STOPS = [0, 7, 21]    # 0 is also what the responses are padded with


def tiny_model(folder, config, seed=0):
    """Random weights of a standard deviation of 0.2: the logits then have one of about 1, and fp32
    is good to 1e-5."""
    write_json(folder / "config.json", config)
    generator = torch.Generator().manual_seed(seed)
    return Transformer(read_config(str(folder))).init_weights(generator, std=0.2)


# ---- FlashAttention, where there is no GPU -------------------------------------------------------

def flash_by_loop(q, k, v, queries, keys, used=None):
    """What support.gpu.flash computes, row by row."""
    outs = []
    S = q.shape[1] // k.shape[1]
    for i in range(len(queries.starts) - 1):
        first, last = keys.starts[i], keys.starts[i + 1]
        if used is not None:
            last = first + used[i]
        row_q = q[queries.starts[i]:queries.starts[i + 1]].transpose(0, 1)           # (H, t, d)
        row_k = k[first:last].transpose(0, 1).repeat_interleave(S, 0)                # (H, L, d)
        row_v = v[first:last].transpose(0, 1).repeat_interleave(S, 0)
        scores = row_q @ row_k.transpose(1, 2) * q.shape[2]**-0.5                    # (H, t, L)
        t, L = scores.shape[1:]
        assert t <= queries.longest and L <= keys.longest
        later = torch.ones(t, L, dtype=torch.bool).triu(L - t + 1)
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        outs.append((weights @ row_v).transpose(0, 1))
    return torch.cat(outs)


def pretend_flash(monkeypatch):
    """From now on everything goes the way of a GPU with FlashAttention, but for the kernel."""
    monkeypatch.setattr(gpu, "flash", flash_by_loop)
    for module in (sampler, ragged, memory):
        monkeypatch.setattr(module, "has_flash", lambda model: True)
