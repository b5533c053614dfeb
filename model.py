"""A decoder-only transformer in plain PyTorch that reads and writes Hugging Face model folders.

One block serves seven families, which differ by switches: llama (arXiv 2407.21783; SmolLM2 is one),
mistral (2310.06825), qwen2 (2412.15115; DeepSeek-R1-Distill-Qwen is one), qwen3 (2505.09388),
smollm3, olmo2 (2501.00656) and granite (IBM's 3.x). support/folders.py says which has which.
Modules carry the names their weights have in the files (after a `model.`), so loading is a copy by
name.

What is particular here is `attend`. Attention is the one place where tokens see each other, so it
is the one place that has to know how they are laid out: `model(tokens, attend=f)` calls
f(layer, q, k, v) in every layer, in place of plain causal attention. logprobs.py uses it to run a
prompt once and let every response of a group read its keys and values; sampler.py uses it to keep
a cache.

Letters: N rows, T positions, D width, H query heads, K key/value heads, d head size, V vocabulary.
"""
from __future__ import annotations

import functools
import json
import math
import os
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from support import folders
from support.common import replaced_folder
from support.parallel import copy_into, gather_to_cpu


# ---- The transformer -----------------------------------------------------------------------------

@dataclass(frozen=True)
class ModelConfig:
    """What config.json says of a model, in one dialect (support/folders.py reads them all)."""
    model_type: str
    vocab_size: int              # V
    hidden_size: int             # D
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int     # H
    num_key_value_heads: int     # K
    head_dim: int                # d; need not be D / H
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool    # one matrix for the embedding and the output
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: str | None          # RMSNorm of queries and keys: "head" by head, or the "whole"
    norm_after: bool             # norms of what attention and MLP give, not of what they get
    rope_theta: float
    rope_scaling: tuple | None   # its kind, "linear", "llama3" or "yarn", and the kind's numbers
    attention_factor: float      # yarn's, of cos and sin; 1 elsewhere
    layers_without_rope: tuple[int, ...] = ()
    # Granite's factors: of the embedding, of queries (whose products with keys are divided by √d as
    # everywhere), of what a block adds, and of the last hidden state.
    embedding_factor: float = 1.0
    query_factor: float = 1.0
    residual_factor: float = 1.0
    hidden_factor: float = 1.0
    raw: dict = field(default=None, repr=False, compare=False)  # the file, to be written back


@functools.lru_cache(maxsize=8)
def rope_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Radians per position, (d/2,) fp32 (RoFormer, arXiv 2104.09864), scaled by `rope_scaling`."""
    d = config.head_dim
    freq = 1.0 / config.rope_theta ** (torch.arange(0, d, 2, dtype=torch.int64).float() / d)
    kind, *numbers = config.rope_scaling or ("default",)
    if kind == "linear":
        freq = freq / numbers[0]
    elif kind == "llama3":
        # Llama 3.1 reads a longer text by slowing the waves that closed few turns (below `low`) in
        # the text it was trained on. Those that closed many (above `high`) stay as they are, and
        # those between are mixed.
        factor, low, high, original = numbers
        turns = original * freq / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)   # 0: slow wave, 1: fast wave
        freq = keep * freq + (1 - keep) * freq / factor
    elif kind == "yarn":
        # YaRN (arXiv 2309.00071) does the same, but mixes by a wave's place among the d/2, between
        # those of the waves that closed `fast` and `slow` turns.
        factor, fast, slow, original = numbers
        place = lambda turns: (
            d * math.log(original / (2 * math.pi * turns)) / (2 * math.log(config.rope_theta)))
        first, last = max(math.floor(place(fast)), 0), min(math.ceil(place(slow)), d - 1)
        slowed = ((torch.arange(d // 2) - first) / (last - first or 1e-3)).clamp(0, 1)
        freq = (1 - slowed) * freq + slowed * freq / factor
    return freq.to(device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (N, heads, T, d) turned by its position; cos and sin (N, 1, T, d), sin with its first half
    negated. The first half of d is one coordinate of each pair, the second half the other."""
    a, b = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([b, a], dim=-1), sin)


def causal_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (N, H, T, d), k and v (N, K, T, d) -> (N, H, T, d). What `attend=None` means."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class RMSNorm(nn.Module):
    """x / rms(x) · weight, over the last dimension (arXiv 1910.07467)."""
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Rotary attention with K key/value heads for H query heads (arXiv 2305.13245)."""
    def __init__(self, c: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = c.head_dim
        self.has_rope = layer not in c.layers_without_rope
        self.query_factor = c.query_factor
        self.qk_norm = c.qk_norm
        query_width = c.num_attention_heads * c.head_dim
        key_width = c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, query_width, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, key_width, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, key_width, bias=c.qkv_bias)
        self.o_proj = nn.Linear(query_width, c.hidden_size, bias=c.out_bias)
        if c.qk_norm:
            is_whole = c.qk_norm == "whole"
            self.q_norm = RMSNorm(query_width if is_whole else c.head_dim, c.rms_norm_eps)
            self.k_norm = RMSNorm(key_width if is_whole else c.head_dim, c.rms_norm_eps)

    def forward(self, x, cos, sin, attend):
        N, T, _ = x.shape                                                 # (N, T, D)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)          # (N, T, H·d or K·d)
        if self.qk_norm == "whole":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.view(N, T, -1, self.head_dim) for t in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))                  # (N, H or K, T, d)
        if self.has_rope:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.query_factor != 1:
            q = q * self.query_factor
        out = attend(self.layer, q, k, v)                                 # (N, H, T, d)
        return self.o_proj(out.transpose(1, 2).reshape(N, T, -1))         # (N, T, D)


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); with `norm_after` x + norm(attention(x)), …"""
    def __init__(self, c: ModelConfig, layer: int):
        super().__init__()
        self.norm_after = c.norm_after
        self.residual_factor = c.residual_factor
        norm = lambda: RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, layer)
        self.mlp = MLP(c)
        self.post_attention_layernorm = norm()    # the files' name, wherever the norm stands
        if c.norm_after:
            self.post_feedforward_layernorm = norm()
        else:
            self.input_layernorm = norm()

    def forward(self, x, cos, sin, attend):
        if self.norm_after:
            x = x + self.post_attention_layernorm(self.self_attn(x, cos, sin, attend))
            return x + self.post_feedforward_layernorm(self.mlp(x))
        r = self.residual_factor
        x = torch.add(x, self.self_attn(self.input_layernorm(x), cos, sin, attend), alpha=r)
        return torch.add(x, self.mlp(self.post_attention_layernorm(x)), alpha=r)


class Transformer(nn.Module):
    """Token ids in, hidden states out; `logits` turns those into vocabulary scores."""
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False    # True: run each block again in backward
        self.compute_dtype = None              # where it is not the weights' (--shard)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def output_weight(self) -> Tensor:
        """(V, D)"""
        if self.config.tie_word_embeddings:
            return self.embed_tokens.weight
        return self.lm_head.weight

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    def forward(self, tokens: Tensor, attend=None, positions: Tensor | None = None) -> Tensor:
        """tokens (N, T) -> hidden (N, T, D), after the last norm (and Granite's last factor).

        attend: None for causal attention within each row, or f(layer, q, k, v) -> (N, H, T, d).
        positions (N, T), or None for 0, 1, 2, …"""
        if attend is None:
            attend = causal_attention
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]    # (1, T)
        x = self.embed_tokens(tokens) * self.config.embedding_factor           # (N, T, D)
        frequencies = rope_frequencies(self.config, tokens.device)             # (d/2,)
        angles = positions[:, None, :, None] * frequencies                     # (N, 1, T, d/2)
        cos, sin = (self.config.attention_factor * wave for wave in (angles.cos(), angles.sin()))
        cos = torch.cat([cos, cos], dim=-1).to(x.dtype)                        # (N, 1, T, d)
        sin = torch.cat([-sin, sin], dim=-1).to(x.dtype)                       # (N, 1, T, d)
        for block in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                # Nothing here is random, and a GPU's random state is slow to read.
                x = checkpoint(
                    block, x, cos, sin, attend, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, cos, sin, attend)
        return self.norm(x) * self.config.hidden_factor

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., D) -> logits (..., V)."""
        return F.linear(hidden, self.output_weight)

    def init_weights(self, generator: torch.Generator, std: float = 0.02) -> Transformer:
        """Random weights: normal matrices, zero biases, norms of one."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=std, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
            else:
                nn.init.ones_(p)
        return self


# ---- Model folders -------------------------------------------------------------------------------

def read_config(folder: str) -> ModelConfig:
    """Read a folder's config.json. Raises InputError, by name, for all that the code above would
    compute wrongly."""
    return ModelConfig(**folders.read_settings(folder))


def file_names(model: Transformer) -> dict[str, nn.Parameter]:
    """The model's parameters by the names they have in the files."""
    prefix = lambda name: "" if name.startswith("lm_head") else "model."
    return {prefix(name) + name: p for name, p in model.named_parameters()}


def load_model(
    folder: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    shard=None,
) -> Transformer:
    """Read a Hugging Face folder: build the model without memory, then copy tensor by tensor.

    Raises InputError unless every parameter is filled, every tensor used, and all are finite.
    shard(model), if given, splits the model over processes before there is memory for it."""
    with torch.device("meta"):
        model = Transformer(read_config(folder)).to(dtype)
    folders.check_tensors(folder, file_names(model), model.config.tie_word_embeddings)
    if shard:
        shard(model)
    model.to_empty(device=device)
    read_weights(folder, model)
    return model


@torch.no_grad()
def read_weights(folder: str, model: Transformer) -> None:
    """Fill the model's parameters from a folder of the same shapes."""
    parameters = file_names(model)
    for name, tensor in folders.tensors(folder, parameters, model.config.tie_word_embeddings):
        copy_into(parameters[name], tensor)


def save_model(
    model: Transformer, folder: str, tokenizer_from: str | None = None, write: bool = True,
) -> None:
    """Write a folder that transformers, vLLM and load_model read: config, weights in the model's
    own dtype, and tokenizer files copied from `tokenizer_from`. The folder is replaced as a whole.

    If the model is in shards (--shard), all processes must call this, and one of them write."""
    weights = gather_to_cpu(file_names(model), keep=write)
    if not write:
        return
    settings = {k: v for k, v in model.config.raw.items() if k not in ("torch_dtype", "dtype")}
    settings["torch_dtype"] = str(model.dtype).removeprefix("torch.")
    with replaced_folder(folder) as beside:
        with open(os.path.join(beside, "config.json"), "w", encoding="utf-8") as f:
            json.dump(settings, f, indent=2)
        save_file(weights, os.path.join(beside, "model.safetensors"), metadata={"format": "pt"})
        if tokenizer_from:
            folders.copy_tokenizer(tokenizer_from, beside)
