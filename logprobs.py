"""Log-probabilities of a group: the prompt runs once, the padding never, and logits never stand whole in memory.

Letters: as in model.py.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Transformer
from support.cpu import SCORES_AT_ONCE, CachedAttention


def packing(lengths: Tensor, width: int):
    """N ragged rows laid end to end, n tokens in all, so that no padding goes through the network.

    lengths (N,), width at least their maximum. Returns rows (n,) and cols (n,), where each token stands in the padded
    grid, and two functions: spread (1, heads, n, d) -> (N, heads, width, d), zeros in the padding, and pack, back."""
    rows, cols = (torch.arange(width, device=lengths.device) < lengths[:, None]).nonzero(as_tuple=True)
    place, N = rows * width + cols, len(lengths)

    def spread(x):
        grid = x.new_zeros(N * width, x.shape[1], x.shape[3]).index_copy(0, place, x[0].transpose(0, 1))
        return grid.view(N, width, *grid.shape[1:]).transpose(1, 2)

    def pack(x):
        return x.transpose(1, 2).flatten(0, 1).index_select(0, place).transpose(0, 1)[None]
    return rows, cols, spread, pack


def ragged_attention(lengths: Tensor, query_heads: int, prompt_lengths: Tensor | None = None, owner: Tensor | None = None):
    """Causal attention of N rows laid end to end (n tokens in all), each after a prompt of its own if there are prompts.

    lengths (N,) at least 1; prompt_lengths (B,) and owner (N,), the prompt of each row. Returns attend(q, k, v, keys, values)
    with q (1, H, n, d), k and v (1, K, n, d), keys and values (B, K, P, d) -> (1, H, n, d). On a CPU a few rows of about
    the same length at a time, so that neither padding nor memory costs much; on a GPU all at once."""
    device, sizes, parts = lengths.device, lengths.tolist(), []
    P = 0 if prompt_lengths is None else int(prompt_lengths.max())
    cost = lambda rows: len(rows) * query_heads * max(rows) * (P + max(rows))
    first = 0
    while first < len(sizes):
        last = first + 1
        while last < len(sizes) and (device.type != "cpu" or cost(sizes[first:last + 1]) <= SCORES_AT_ONCE):
            last += 1
        part, t = slice(first, last), max(sizes[first:last])
        spread, pack = packing(lengths[part], t)[2:]
        hide = torch.ones(t, t, dtype=torch.bool, device=device).triu(1)[None]                      # (1, t, t)
        if P:
            absent = torch.arange(P, device=device) >= prompt_lengths[owner[part], None]            # (m, P)
            hide = torch.cat([absent[:, None].expand(-1, t, -1), hide.expand(len(absent), -1, -1)], dim=2)
        parts.append((part, sum(sizes[part]), spread, pack, torch.zeros(hide.shape, device=device).masked_fill(hide, float("-inf"))[:, None]))
        first = last

    masks = {}                                              # (m or 1, 1, S·t, P + t) of each part

    def attend(q, k, v, keys=None, values=None):
        K, d, outs = k.shape[1], k.shape[3], []
        for (part, _, spread, pack, bias), q_part, k_part, v_part in zip(parts, *(x.split([tokens for _, tokens, *_ in parts], dim=2) for x in (q, k, v))):
            padded, k_part, v_part = spread(q_part), spread(k_part), spread(v_part)                 # (m, H or K, t, d)
            m, H, t = padded.shape[:3]
            if P:
                k_part = torch.cat([keys.index_select(0, owner[part]), k_part], dim=2)              # (m, K, P + t, d)
                v_part = torch.cat([values.index_select(0, owner[part]), v_part], dim=2)
            # The S query heads that share a key head stand below each other, so that keys are not copied for them.
            folded = padded.reshape(m, K, H // K * t, d)
            if part.start not in masks:                     # one for all layers; on a GPU its rows lie as SDPA's kernel wants them
                masks[part.start] = F.pad(bias, (0, -(P + t) % 8)).to(q.dtype if q.is_cuda else bias.dtype).repeat(1, 1, H // K, 1)[..., :P + t]
            if q.is_cuda:
                out = F.scaled_dot_product_attention(folded, k_part, v_part, attn_mask=masks[part.start].expand(m, -1, -1, -1))
            else:
                out = CachedAttention.apply(folded, k_part, v_part, masks[part.start])
            outs.append(pack(out.reshape(padded.shape)))
        return torch.cat(outs, dim=2)
    return attend


@dataclass
class Prefix:
    """What B prompts leave behind for their responses."""
    lengths: Tensor         # (B,)
    keys: list[Tensor]      # (B, K, P, d) of each layer, right-padded
    values: list[Tensor]    # likewise
    last: Tensor            # (B, D), the hidden state of the last position, which predicts a response's first token

    @property
    def tensors(self) -> list[Tensor]:
        """All that gradients flow through."""
        return [*self.keys, *self.values, self.last]

    def cut(self) -> Prefix:
        """The same values as leaves of a new graph, to collect gradients in."""
        leaf = lambda x: x.detach().requires_grad_()
        return Prefix(self.lengths, [leaf(x) for x in self.keys], [leaf(x) for x in self.values], leaf(self.last))


def encode_prompts(model: Transformer, prompts: list[Tensor]) -> Prefix:
    """Run each prompt (P,) once."""
    device, keys, values = model.norm.weight.device, {}, {}
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    _, cols, spread, _ = packing(lengths, max(len(p) for p in prompts))
    attend = ragged_attention(lengths, model.config.num_attention_heads)

    def keep(layer, q, k, v):
        keys[layer], values[layer] = spread(k), spread(v)
        return attend(q, k, v)
    hidden = model(torch.cat(prompts).to(device)[None], attend=keep, positions=cols[None])[0]     # (n, D)
    # In lists of their own, since gradient checkpointing will run `keep` again.
    return Prefix(lengths, list(keys.values()), list(values.values()), hidden[lengths.cumsum(0) - 1])


def score_responses(model: Transformer, prompts: list[Tensor] | Prefix, owner: Tensor, responses: Tensor, lengths: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of every response token after its prompt.

    responses (N, T) right-padded, lengths (N,) at least 1, owner (N,) the prompt (0 … B − 1) that a row answers. `prompts`
    are token ids (P,), to go through the network together with the responses, or what `encode_prompts` made of them earlier.
    Returns logprobs (N, T) fp32, with gradient to the weights and to a Prefix, and entropy (N, T) fp32 in nats, without;
    both 0 in the padding. The real tokens go through the network as one row; only attention puts them in their places."""
    (N, T), device, H = responses.shape, responses.device, model.config.num_attention_heads
    # The token at (i, t) is predicted from the state at (i, t − 1), the first one from the prompt's last state.
    rows, cols = (torch.arange(T - 1, device=device) < lengths[:, None] - 1).nonzero(as_tuple=True)  # (n,) each: tokens with a successor
    longer, known = lengths > 1, isinstance(prompts, Prefix)
    prompt_lengths = prompts.lengths if known else torch.tensor([len(p) for p in prompts], device=device)
    respond = ragged_attention(lengths[longer] - 1, H, prompt_lengths, owner[longer])
    tokens, positions = responses[rows, cols], prompt_lengths[owner[rows]] + cols
    if known:
        last, after = prompts.last, lambda layer, q, k, v: respond(q, k, v, prompts.keys[layer], prompts.values[layer])
        hidden = model(tokens[None], attend=after, positions=positions[None])[0] if len(rows) else last[:0]
    else:
        _, prompt_cols, spread, _ = packing(prompt_lengths, int(prompt_lengths.max()))
        read, sizes = ragged_attention(prompt_lengths, H), [len(prompt_cols), len(rows)]

        def both(layer, q, k, v):
            (q0, q1), (k0, k1), (v0, v1) = (x.split(sizes, dim=2) for x in (q, k, v))
            return torch.cat([read(q0, k0, v0)] + ([respond(q1, k1, v1, spread(k0), spread(v0))] if sizes[1] else []), dim=2)
        tokens, positions = torch.cat([*(p.to(device) for p in prompts), tokens]), torch.cat([prompt_cols, positions])
        read_out, hidden = model(tokens[None], attend=both, positions=positions[None])[0].split(sizes)
        last = read_out.index_select(0, prompt_lengths.cumsum(0) - 1)                                # (B, D)

    hidden = torch.cat([last.index_select(0, owner), hidden])                                        # (N + n, D)
    rows, cols = torch.cat([torch.arange(N, device=device), rows]), torch.cat([torch.zeros_like(owner), cols + 1])
    flat, flat_entropy = linear_logprobs(hidden, model.output_weight, responses[rows, cols], temperature)
    grid = flat.new_zeros(N, T)
    return grid.index_put((rows, cols), flat), grid.index_put((rows, cols), flat_entropy)


def token_logprobs(model: Transformer, prompt: Tensor, responses: Tensor, temperature: float = 1.0, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """log π(token | what stands before it) for G responses to one prompt, the logits divided by `temperature`: the form for
    one group, for tests and for your own code.

    prompt (P,), responses (G, T), lengths (G,) or None for T each. Returns logprobs (G, T) fp32 and entropy (G, T)."""
    if lengths is None:
        lengths = torch.full((len(responses),), responses.shape[1], device=responses.device)
    return score_responses(model, [prompt], torch.zeros_like(lengths), responses, lengths, temperature)

LOGITS_AT_ONCE = 2**24  # 64 MiB in fp32: enough for efficient products, little enough not to be noticed


class LinearLogprobs(torch.autograd.Function):
    """log softmax(hidden Wᵀ / temperature) at the targets, chunk by chunk; backward computes the logits again.

    With g = dL/dlogprob of one token and p its softmax, dL/dlogits = −g (p − onehot(target)) / temperature.
    """
    @staticmethod
    def chunks(hidden, weight):
        size = max(1, LOGITS_AT_ONCE // len(weight))
        return [slice(i, i + size) for i in range(0, len(hidden), size)]

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        logprobs, entropy, logsumexp = [], [], []
        for part in LinearLogprobs.chunks(hidden, weight):
            logits = F.linear(hidden[part], weight)                                     # (chunk, V)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))        # never in bf16
            logits = logits if temperature == 1 else logits.div_(temperature)
            p = logits.softmax(-1)
            likeliest = p.argmax(-1, keepdim=True)
            lse = logits.gather(1, likeliest) - p.gather(1, likeliest).log()            # (chunk, 1): log p = logit − lse
            logprobs.append((logits.gather(1, targets[part, None]) - lse)[:, 0])
            entropy.append(lse[:, 0] - (p[:, None] @ logits[:, :, None])[:, 0, 0])      # −Σ p log p
            logsumexp.append(lse)
        entropy = torch.cat(entropy)
        ctx.save_for_backward(hidden, weight, targets, torch.cat(logsumexp))
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return torch.cat(logprobs), entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets, logsumexp = ctx.saved_tensors
        grad_hidden, grad_weight, chunks = torch.empty_like(hidden), None, LinearLogprobs.chunks(hidden, weight)
        for part in chunks:
            logits = F.linear(hidden[part], weight)
            p = torch.add(-logsumexp[part], logits, alpha=1 / ctx.temperature).exp_()
            p.scatter_add_(1, targets[part, None], p.new_full((len(p), 1), -1.0))
            grad_logits = logits.copy_(p.mul_(-grad[part, None] / ctx.temperature))
            torch.mm(grad_logits, weight, out=grad_hidden[part])
            if ctx.needs_input_grad[1]:
                product = grad_logits.T @ hidden[part]                                  # (V, D)
                if len(chunks) > 1:
                    product = product.to(grad.dtype) if grad_weight is None else grad_weight.add_(product)   # summed in fp32
                grad_weight = product
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None


def linear_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """hidden (n, D), weight (V, D), targets (n,) -> logprobs (n,) and entropy (n,), at least fp32; entropy has no gradient."""
    return LinearLogprobs.apply(hidden, weight, targets, temperature)
