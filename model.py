"""A decoder-only transformer in plain PyTorch that reads and writes Hugging Face model folders.

One block serves four families, which differ by switches: llama (arXiv 2407.21783; SmolLM2 is one), mistral (2310.06825),
qwen2 (2412.15115; DeepSeek-R1-Distill-Qwen is one) and qwen3 (2505.09388). Modules carry the names their weights have
in the files, so loading is a copy by name.

What is particular here is `attend`. Attention is the one place where tokens see each other, so it is the one place that
has to know how they are laid out: `model(tokens, attend=f)` calls f(layer, q, k, v) in every layer in place of plain
causal attention. Scoring uses it to run a prompt once and let every response of a group read its keys and values
(`encode_prompts`, `score_responses`, below); the sampler uses it to keep a cache.

Letters: N rows, T positions, n tokens laid end to end, D width, H query heads, K key/value heads, S = H / K query heads
that share a key head, d head size, V vocabulary; B prompts, P prompt length; of responses, T is the length.
"""
from __future__ import annotations

import functools
import json
import math
import os
import shutil
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from support.common import InputError
from support.folders import copy_tokenizer, read_settings, weight_files
from support.parallel import copy_into, gather_shards


# ---------------------------------------------------------------------------------------------------------------------
# The transformer

@dataclass(frozen=True)
class ModelConfig:
    model_type: str
    vocab_size: int
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
    qk_norm: bool                # qwen3: RMSNorm on each head's query and key
    rope_theta: float
    rope_scaling: tuple | None   # ("linear", factor) or ("llama3", factor, low_freq, high_freq, original positions)
    raw: dict = field(default=None, repr=False, compare=False)  # the file as it was read, to be written back


@functools.lru_cache(maxsize=8)
def rope_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Angles per position, (d/2,) fp32 (RoFormer, arXiv 2104.09864), slowed down as `rope_scaling` says."""
    d = config.head_dim
    freq = 1.0 / config.rope_theta ** (torch.arange(0, d, 2, dtype=torch.int64).float() / d)
    if config.rope_scaling and config.rope_scaling[0] == "linear":
        freq = freq / config.rope_scaling[1]
    elif config.rope_scaling:
        # Llama 3.1 reads a longer text by slowing the waves that closed few turns (below `low`) in the text it was trained
        # on; those that closed many (above `high`) stay as they are, and between them the two are mixed.
        _, factor, low, high, original = config.rope_scaling
        turns = original * freq / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)   # 0: slow wave, divided by factor; 1: fast wave, kept
        freq = keep * freq + (1 - keep) * freq / factor
    return freq.to(device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (N, heads, T, d) turned by its position; cos and sin (N, 1, T, d). The halves are the two coordinates."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


def causal_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (N, H, T, d), k and v (N, K, T, d) -> (N, H, T, d). What `attend=None` means."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1])


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, c: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=c.out_bias)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, attend):
        N, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(N, T, -1, self.head_dim)).transpose(1, 2)   # (N, H, T, d)
        k = self.k_norm(self.k_proj(x).view(N, T, -1, self.head_dim)).transpose(1, 2)   # (N, K, T, d)
        v = self.v_proj(x).view(N, T, -1, self.head_dim).transpose(1, 2)                # (N, K, T, d)
        out = attend(self.layer, rotate(q, cos, sin), rotate(k, cos, sin), v)             # (N, H, T, d)
        return self.o_proj(out.transpose(1, 2).reshape(N, T, -1))


class MLP(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, attend):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # keep only the blocks' inputs for backward, and run each block again
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def output_weight(self) -> Tensor:
        """(V, D)"""
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, tokens: Tensor, attend=None, positions: Tensor | None = None) -> Tensor:
        """tokens (N, T) -> hidden (N, T, D), after the last norm.

        attend: None for causal attention within each row, or f(layer, q, k, v) -> (N, H, T, d) that does the attention.
        positions (N, T), or None for 0, 1, 2, …
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        x = self.embed_tokens(tokens)                                                         # (N, T, D)
        angles = positions[:, None, :, None] * rope_frequencies(self.config, tokens.device)   # (N, 1, T, d/2) fp32
        angles = torch.cat([angles, angles], dim=-1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for block in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, attend or causal_attention, use_reentrant=False)
            else:
                x = block(x, cos, sin, attend or causal_attention)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., D) -> logits (..., V)."""
        return F.linear(hidden, self.output_weight)

    def init_weights(self, generator: torch.Generator, std: float = 0.02) -> "Transformer":
        """Random weights: normal matrices, zero biases, norms of one."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=std, generator=generator)
            else:
                nn.init.zeros_(p) if name.endswith("bias") else nn.init.ones_(p)
        return self


# ---------------------------------------------------------------------------------------------------------------------
# Model folders

def read_config(folder: str) -> ModelConfig:
    """config.json. Raises InputError for everything this file would compute wrongly, by name."""
    return ModelConfig(**read_settings(folder))



def named_as_in_files(model: Transformer) -> dict[str, nn.Parameter]:
    return {("" if name.startswith("lm_head") else "model.") + name: p for name, p in model.named_parameters()}


def load_model(folder: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, shard=None) -> Transformer:
    """Read a Hugging Face folder. Every parameter is filled and every tensor used, or InputError says which is not.
    `shard(model)`, if given, splits the model over processes before there is memory for it."""
    with torch.device("meta"):
        model = Transformer(read_config(folder)).to(dtype)
    where = tensors_of(folder, model)       # shapes agree, so the sizes are those of files that exist
    if shard:
        shard(model)
    model.to_empty(device=device)
    read_weights(folder, model, where)
    return model


def tensors_of(folder: str, model: Transformer) -> dict[str, str]:
    """The file of each tensor. Raises InputError unless they are those of the model, by name and by shape."""
    wanted, config = named_as_in_files(model), model.config
    ignored = {"lm_head.weight"} if config.tie_word_embeddings else set()  # a tied copy of the embedding
    where = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as f:
                for name in f.keys():
                    shape = f.get_slice(name).get_shape()
                    if name in where:
                        raise InputError(f"{path}: tensor {name} is in {os.path.basename(where[name])} too")
                    # Some old folders store the rope frequencies, which follow from config.json.
                    if name not in wanted and name not in ignored and not name.endswith("rotary_emb.inv_freq"):
                        raise InputError(f"{path}: unexpected tensor {name!r}; config.json describes another model")
                    if name in wanted and list(wanted[name].shape) != list(shape):
                        raise InputError(f"{path}: {name} is {tuple(shape)}; config.json says {tuple(wanted[name].shape)}")
                    where[name] = path
                    if name in ignored and list(shape) != list(wanted["model.embed_tokens.weight"].shape):
                        raise InputError(f"{path}: {name} is {tuple(shape)}, and config.json says it is the embedding")
        except (SafetensorError, OSError) as e:
            raise InputError(f"{path}: not a readable safetensors file, perhaps cut short ({e})") from None
    missing = sorted(set(wanted) - set(where))
    if missing:
        raise InputError(f"{folder}: {len(missing)} weights are in no file, first {missing[0]}")
    return where


def read_weights(folder: str, model: Transformer, where: dict[str, str] | None = None) -> None:
    """Fill the model's parameters, tensor by tensor, from a folder of the same shapes."""
    where, wanted, copies = where or tensors_of(folder, model), named_as_in_files(model), {}
    for path in sorted(set(where.values())):
        with safe_open(path, framework="pt") as f, torch.no_grad():
            for name in f.keys():
                if name in wanted:
                    tensor = f.get_tensor(name)
                    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
                        raise InputError(f"{path}: {name} is {tensor.dtype}; quantized weights are not supported")
                    if not tensor.isfinite().all():
                        raise InputError(f"{path}: {name} holds NaN or infinite values")
                    copy_into(wanted[name], tensor)
    if "lm_head.weight" in where and model.config.tie_word_embeddings:
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            with safe_open(where[name], framework="pt") as f:
                copies[name] = f.get_tensor(name).float()
        if not torch.equal(*copies.values()):
            raise InputError(f"{where['lm_head.weight']}: lm_head.weight differs from the embedding, and config.json says tie_word_embeddings")


def on_cpu(tensors: dict[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """Whole tensors for a file; of shards, all processes must take part, though only one may keep what comes."""
    kept = {}
    for name, x in tensors.items():
        x = gather_shards(x.detach())
        if keep:
            kept[name] = x.cpu().contiguous()
    return kept


def save_model(model: Transformer, folder: str, tokenizer_from: str | None = None, write: bool = True) -> None:
    """Write a folder that transformers, vLLM and load_model read: config, weights in the model's own dtype, and
    tokenizer files copied from `tokenizer_from`. Written beside and renamed, so `folder` is never half a model.
    Of a model in shards, all processes must call this, and one of them write."""
    weights = on_cpu(named_as_in_files(model), keep=write)
    if not write:
        return
    beside = f"{folder.rstrip('/')}.writing"
    shutil.rmtree(beside, ignore_errors=True)
    os.makedirs(beside)
    raw = {k: v for k, v in model.config.raw.items() if k not in ("torch_dtype", "dtype")}
    raw["torch_dtype"] = str(model.norm.weight.dtype).removeprefix("torch.")
    with open(os.path.join(beside, "config.json"), "w", encoding="utf-8") as f:
        json.dump(raw, f, indent=2)
    save_file(weights, os.path.join(beside, "model.safetensors"), metadata={"format": "pt"})
    if tokenizer_from:
        copy_tokenizer(tokenizer_from, beside)
    if os.path.isdir(folder):
        old = f"{folder.rstrip('/')}.old"
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
        os.rename(beside, folder)
        shutil.rmtree(old)
    else:
        os.rename(beside, folder)
