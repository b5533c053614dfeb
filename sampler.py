"""Groups of rollouts from a key/value cache.

The prompt of a group runs once (`prefill`); its G responses then grow together, one token a step (`decode`), all
reading the prompt's keys and values from one place. A row that ends leaves the batch at once (on a GPU, which must not be
made to wait, at the next of the checks every 16 steps), and waiting prompts enter as soon as G rows are free: neither
finished rows nor padding go through the network.

Randomness belongs to the row, not to the batch: each prompt has a generator seeded from (seed, prompt id, repeat) that
gives one uniform number per row and position, and a token is where the cumulative distribution passes that number. So
what a row says depends on the seed and on `max_new_tokens`, but not on G or on the other rows, and there is no random
state to save. (In bf16 kernels round by shape: then only the statistics agree.)

Letters: n rows in flight, B prompts in flight, G rows of a group, P prompt length, T response length, H query heads,
K key/value heads, S = H / K query heads that share a key head, d head size, V vocabulary.
"""
from __future__ import annotations

import math
from collections import Counter, deque

import numpy as np
import torch
from torch import Tensor

from gcpo import Group
from logprobs import encode_prompts
from model import Transformer
from support.cpu import packed_weights


PREFILL_TOKENS = 4096        # prompts that enter together run together, up to so many tokens, padding counted (keys and values are padded)
CACHE_COLUMNS = {"cpu": 32, "cuda": 128}  # lengths of caches are rounded up to these
CPU_CACHE_BYTES = 4 * 2**30  # a fixed budget, so that the same command always makes the same batches


# ---------------------------------------------------------------------------------------------------------------------
# From logits and a uniform number to a token

def inverse_cdf(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse transform sampling: weights (n, anything) float64 and not negative, u (n,) in [0, 1) -> index (n,), rest (n,).

    `rest` is where u fell inside the chosen interval, again in [0, 1]. Never an index of weight 0, not even at u = 0
    (right=True) or at u = 1, which a `rest` can round to (the clamp)."""
    cdf = weights.cumsum(-1)
    total, target = cdf[:, -1:], u[:, None] * cdf[:, -1:]
    index = torch.searchsorted(cdf, target, right=True)
    index = torch.minimum(index, (cdf < total).sum(-1, keepdim=True))
    width = weights.gather(1, index)
    rest = (target - (cdf.gather(1, index) - width)) / width
    return index[:, 0], rest[:, 0].clamp(0, 1)


def restrict_to_top(probs: Tensor, top_p: float, top_k: int) -> Tensor:
    """probs (n, V) with everything outside the nucleus set to 0; not renormalised."""
    if top_k > 0:
        least = probs.topk(min(top_k, probs.shape[1]), dim=-1).values[:, -1:]
        probs = torch.where(probs >= least, probs, 0.0)
    if top_p < 1:
        ordered, index = probs.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered                       # mass of the likelier tokens
        inside = before < top_p * ordered.sum(-1, keepdim=True)     # of what top-k has left
        probs = torch.zeros_like(probs).scatter(1, index, torch.where(inside, ordered, 0.0))
    return probs


def choose_token(logits: Tensor, u: Tensor, temperature: float, top_p: float = 1.0, top_k: int = 0) -> tuple[Tensor, Tensor]:
    """logits (n, V), u (n,) float64 -> token (n,), its logprob (n,) fp32 under softmax(logits / temperature).

    temperature 0 is greedy (the logprob then at temperature 1). The logprob is that of the whole softmax, also with
    top-p or top-k: training uses neither. The cumulative sum goes in two levels, over blocks and inside one block, in
    float64: more exact than one fp32 sum over V, and a fraction of its cost."""
    logits = logits.float()
    if temperature == 0:
        token = logits.argmax(-1)
        return token, logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
    probs = (logits / temperature).softmax(-1)                      # (n, V)
    likely = restrict_to_top(probs, top_p, top_k)
    n, V = probs.shape
    blocks = torch.nn.functional.pad(likely, (0, -V % 128)).view(n, -1, 128)
    block, rest = inverse_cdf(blocks.sum(-1).double(), u)
    token = block * 128 + inverse_cdf(blocks[torch.arange(n, device=u.device), block].double(), rest)[0]
    return token, probs.gather(1, token[:, None])[:, 0].log()


# ---------------------------------------------------------------------------------------------------------------------
# The batch in flight

class Batch:
    """Rows that are being sampled, and the keys and values they attend to.

    Rows 0 … n−1 are alive; a row that leaves is overwritten by the last one. A prompt in flight has a seat, and each of
    its G rows a place there. Keys lie transposed, (…, d, length), as the score product wants them. What a step reads and
    writes lies in fixed tensors on the device, so that a GPU can repeat a recorded step; what the host needs to know, it
    keeps for itself.
    """
    def __init__(self, model: Transformer, max_rows: int, max_seats: int, group_size: int, max_new_tokens: int, select, stop_ids: list[int]):
        c, like = model.config, model.embed_tokens.weight
        K, d, device = c.num_key_value_heads, c.head_dim, like.device
        self.model, self.device, self.select, self.K, self.G, self.max_rows, self.max_seats = model, device, select, K, group_size, max_rows, max_seats
        # Caches are as long as what is in flight, rounded up, and widths on a GPU change rarely: for each a step is recorded.
        on_gpu = device.type == "cuda"
        self.columns, self.row_unit, self.seat_unit = (CACHE_COLUMNS["cuda"], 32, 8) if on_gpu else (CACHE_COLUMNS["cpu"], 1, 1)
        cache = lambda *shape: [torch.empty(shape, dtype=like.dtype, device=device) for _ in range(c.num_hidden_layers)]
        self.prompt_k, self.prompt_v = cache(max_seats, K, d, 0), cache(max_seats, K, 0, d)
        self.k, self.v = cache(max_rows, K, d, 0), cache(max_rows, K, 0, d)
        column = lambda *shape, dtype=torch.int64: torch.zeros(shape, dtype=dtype, device=device)
        self.stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=device)
        self.prompt_length = column(max_seats + 1)                           # of each seat; the last is that of rows not alive
        self.slot, self.length = column(max_rows) + max_seats * group_size, column(max_rows)    # of each row: seat · G + place, tokens so far
        self.ended = column(max_rows, dtype=torch.bool)
        self.tokens, self.logprobs = column(max_rows, max_new_tokens), column(max_rows, max_new_tokens, dtype=torch.float32)
        self.uniforms = column(max_rows, max_new_tokens, dtype=torch.float64)
        # On the host: steps so far; per row its (prompt, place) and the step it entered at; per seat its rows alive and P.
        self.now, self.owner, self.entered, self.members, self.prompt_lengths = 0, [], [], [], []
        self.graphs, self.pool = {}, torch.cuda.graph_pool_handle() if on_gpu else None

    @property
    def n_rows(self) -> int:
        """Rows alive."""
        return len(self.owner)

    @property
    def n_seats(self) -> int:
        """Prompts in flight."""
        return len(self.members)

    def count(self, row: int) -> int:
        """Tokens of a row so far."""
        return self.now - self.entered[row] + 1

    @property
    def longest(self) -> int:
        """Tokens of the row that has most."""
        return self.now - min(self.entered) + 1

    def resize_cache(self, keys: list[Tensor], values: list[Tensor], length: int):
        """Make caches (…, d, width) and (…, width, d) wide enough for `length`; narrower again once half would do."""
        width = -(-length // self.columns) * self.columns
        if keys[0].shape[3] // 2 < width <= keys[0].shape[3]:
            return
        kept = min(width, keys[0].shape[3])
        for caches, dim in ((keys, 3), (values, 2)):
            for layer, old in enumerate(caches):
                # Zeros, since what lies beyond a row's length is read with weight 0, and 0 · NaN is NaN.
                caches[layer] = old.new_zeros([*old.shape[:dim], width, *old.shape[dim + 1:]])
                caches[layer].narrow(dim, 0, kept).copy_(old.narrow(dim, 0, kept))
        self.graphs.clear()                                                  # they would go on reading the old ones
        self.pool = self.pool and torch.cuda.graph_pool_handle()             # a pool ends with its last graph

    def add_token(self, logits: Tensor, rows: slice):
        """Choose the next token of `rows` from logits (n, V)."""
        at = self.length[rows]
        index = torch.arange(rows.start, rows.stop, device=self.device)
        token, logprob = self.select(logits, self.uniforms[index, at])
        self.tokens[index, at], self.logprobs[index, at] = token, logprob
        self.length[rows] += 1
        self.ended[rows] |= (token[:, None] == self.stop_ids).any(1)

    def prefill(self, owners: list[int], prompts: list[Tensor], uniforms: Tensor):
        """Seat prompts (P,) that wait: run each once, and start its G rows with their first token. uniforms (rows, T)."""
        prefix, P = encode_prompts(self.model, prompts), max(len(p) for p in prompts)
        seats, rows = slice(self.n_seats, self.n_seats + len(prompts)), slice(self.n_rows, self.n_rows + len(uniforms))
        self.prompt_lengths += [len(p) for p in prompts]
        self.resize_cache(self.prompt_k, self.prompt_v, max(self.prompt_lengths))
        for layer, (k, v) in enumerate(zip(prefix.keys, prefix.values)):     # (B, K, P, d) each
            self.prompt_k[layer][seats, :, :, :P], self.prompt_v[layer][seats, :, :P] = k.transpose(2, 3), v
        self.prompt_length[seats] = prefix.lengths
        self.slot[rows] = torch.arange(seats.start * self.G, seats.stop * self.G, device=self.device)
        self.length[rows], self.ended[rows], self.uniforms[rows] = 0, False, uniforms.to(self.device)
        self.owner += [(owner, g) for owner in owners for g in range(self.G)]
        self.entered += [self.now] * len(uniforms)
        self.members += [self.G] * len(prompts)
        self.add_token(self.model.logits(prefix.last).repeat_interleave(self.G, dim=0), rows)

    def decode(self, steps: int):
        """`steps` more tokens for every row, without asking the device for anything.

        On a GPU the launches of a step cost more than its work. So a step runs once as it stands, for warming up, then it is
        recorded as a CUDA graph and repeated; rows and seats are rounded up, and what is too much is computed and never read."""
        self.resize_cache(self.k, self.v, self.longest + steps - 1)
        self.length[self.n_rows:] = 1                                        # rows not alive count on as well: they must not outrun the cache
        sizes = [min(-(-n // unit) * unit, most) for n, unit, most in ((self.n_rows, self.row_unit, self.max_rows), (self.n_seats, self.seat_unit, self.max_seats))]
        key = (*sizes, self.prompt_k[0].shape[3])
        for _ in range(steps):
            if self.pool is None or key not in self.graphs:
                self.step(*sizes)
                self.graphs[key] = None
                continue
            if self.graphs[key] is None:
                self.graphs[key] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graphs[key], pool=self.pool):     # records, and does not run
                    self.step(*sizes)
            self.graphs[key].replay()
        self.now += steps

    def step(self, n: int, B: int):
        """One more token for rows 0 … n−1, whose prompts sit in seats 0 … B−1."""
        G, K, P, T = self.G, self.K, self.prompt_k[0].shape[3], self.k[0].shape[3]
        row, at, slot = torch.arange(n, device=self.device), self.length[:n] - 1, self.slot[:n]   # at: the token to run, not yet in the cache
        seat = slot // G
        prompt_length = self.prompt_length[seat]
        column = torch.arange(max(P, T), device=self.device)
        absent = torch.cat([column[:P] >= prompt_length[:, None], column[:T] > at[:, None]], dim=1)  # (n, P + T)
        bias = torch.zeros(absent.shape, device=self.device).masked_fill(absent, float("-inf"))[:, None, None]   # (n, 1, 1, P + T)

        # The rows of a prompt stand below each other in a grid of B seats × G places, so that one product (G·S, d) @ (d, P)
        # reads its keys for all of them, and nothing is copied for each row. What the places of other rows hold is not read.
        heads = torch.arange(K, device=self.device)
        row_at = torch.zeros(self.max_seats * G + 1, dtype=torch.int64, device=self.device).index_copy(0, slot, row)[:B * G]
        into = (row_at.view(B, 1, G) * K + heads[:, None]).flatten()                            # (B·K·G,) in n·K
        back = ((seat.clamp(max=B - 1)[:, None] * K + heads) * G + slot[:, None] % G).flatten()  # (n·K,) in B·K·G
        grid = lambda x: x.reshape(n * K, -1).index_select(0, into)         # (n, K, S, m) -> (B·K·G, S·m)
        ungrid = lambda x: x.view(B * K * G, -1).index_select(0, back)      # (B, K, G·S, m) -> (n·K, S·m)

        def attend(layer, q, k, v):
            """q (n, H, 1, d), k and v (n, K, 1, d) -> (n, H, 1, d): each row reads its prompt and its own past."""
            d, keys, values = q.shape[3], self.k[layer][:n], self.v[layer][:n]
            keys[row, :, :, at], values[row, :, at] = k[:, :, 0], v[:, :, 0]
            q = q.reshape(n, K, -1, d)                                                             # (n, K, S, d)
            S = q.shape[2]
            to_prompt = ungrid(grid(q).view(B, K, G * S, d) @ self.prompt_k[layer][:B]).view(n, K, S, P)
            scores = torch.cat([to_prompt, q @ keys], dim=-1)                                      # (n, K, S, P + T)
            weights = torch.add(bias, scores, alpha=d**-0.5).softmax(-1).to(q.dtype)
            on_prompt, on_own = weights[..., :P], weights[..., P:].contiguous()
            out = ungrid(grid(on_prompt).view(B, K, G * S, P) @ self.prompt_v[layer][:B]).view(n, K, S, d)
            return (out + on_own @ values).view(n, -1, 1, d)

        hidden = self.model(self.tokens[row, at][:, None], attend=attend, positions=(prompt_length + at)[:, None])   # (n, 1, D)
        self.add_token(self.model.logits(hidden[:, 0]), slice(0, n))

    def leave(self, rows: list[int]):
        """Take rows out; the last ones alive move into their places, and prompts without rows lose their seats."""
        for slot in self.slot[rows].tolist():
            self.members[slot // self.G] -= 1
        gone = set(rows)
        kept = [row for row in range(self.n_rows) if row not in gone]
        n = len(kept)
        holes, movers = [row for row in rows if row < n], [row for row in kept if row >= n]
        if holes:
            to, source = torch.tensor(holes, device=self.device), torch.tensor(movers, device=self.device)
            for cache in (*self.k, *self.v, self.slot, self.length, self.ended, self.tokens, self.logprobs, self.uniforms):
                cache[to] = cache[source]
            for hole, mover in zip(holes, movers):
                self.owner[hole], self.entered[hole] = self.owner[mover], self.entered[mover]
        self.owner, self.entered = self.owner[:n], self.entered[:n]
        self.slot[n:] = self.max_seats * self.G
        for seat in reversed(range(self.n_seats)):
            if self.members[seat] == 0:
                last = self.n_seats - 1
                if seat != last:
                    for cache in (*self.prompt_k, *self.prompt_v, self.prompt_length):
                        cache[seat] = cache[last]
                    self.members[seat], self.prompt_lengths[seat] = self.members[last], self.prompt_lengths[last]
                    slots = self.slot[:n]
                    slots[slots // self.G == last] -= (last - seat) * self.G
                self.members.pop(), self.prompt_lengths.pop()


# ---------------------------------------------------------------------------------------------------------------------
# Sampling

def prompt_generator(seed, prompt_id: int, repeat: int) -> torch.Generator:
    """The random stream of one prompt; `seed` is a number, or several: (seed, step)."""
    seeds = seed if isinstance(seed, (tuple, list)) else (seed,)
    seeds = np.random.SeedSequence([*seeds, prompt_id, repeat, 1])  # 1: numpy takes (0, 1) and (0, 1, 0) for the same
    return torch.Generator().manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> 1))


def cache_bytes_per_token(model: Transformer) -> int:
    """Keys and values of one token in all layers."""
    c = model.config
    return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * model.embed_tokens.weight.element_size()


def rows_that_fit(model: Transformer, group_size: int, longest_prompt: int, max_new_tokens: int) -> int:
    """How many rows to keep in flight, at most 256, so that keys and values fit the memory: per row its own and a share of
    its prompt's (see `seats` in `run_to_the_end`), a token's id, logprob and uniform, and its logits in several forms."""
    weight = model.embed_tokens.weight
    columns = CACHE_COLUMNS["cuda" if weight.device.type == "cuda" else "cpu"]
    rounded = lambda length: -(-length // columns) * columns
    row = cache_bytes_per_token(model) * (rounded(max_new_tokens) + 2 * rounded(longest_prompt) / group_size) + 20 * max_new_tokens + 28 * model.config.vocab_size
    budget = CPU_CACHE_BYTES
    if weight.device.type == "cuda":  # what the device has free, and what PyTorch holds of it without using it
        free = torch.cuda.mem_get_info(weight.device)[0] + torch.cuda.memory_reserved(weight.device) - torch.cuda.memory_allocated(weight.device)
        budget = 0.6 * free
    return max(group_size, min(256, int(budget / row)))


def sample(model: Transformer, prompts: list[Tensor], group_size: int, max_new_tokens: int, *, temperature: float = 1.0,
           top_p: float = 1.0, top_k: int = 0, stop_ids, seed, prompt_ids=None, max_rows: int | None = None, progress=None) -> list[Group]:
    """A Group of `group_size` responses for each prompt (P,), in the order given, on the CPU, not yet graded.

    A response ends with the first of `stop_ids`, which belongs to it, or after `max_new_tokens`. `seed` is a number or a
    tuple; `prompt_ids` name the prompts' random streams (default: their places in the list), row g reading numbers g·T to
    (g + 1)·T with T = `max_new_tokens`. `max_rows` bounds the rows in flight, but a group stays whole.
    `progress(tokens)` is called as a row ends. Logprobs are those of softmax(logits / temperature).
    """
    G, ids = group_size, list(range(len(prompts)) if prompt_ids is None else prompt_ids)
    if not prompts:
        return []
    if min(len(p) for p in prompts) < 1 or G < 1 or max_new_tokens < 1 or not 0 <= temperature < math.inf:
        raise ValueError("sample: needs prompts of a token or more, group_size and max_new_tokens of 1 or more, temperature of 0 or more")
    with packed_weights(model):
        responses = run_to_the_end(model, prompts, ids, G, max_new_tokens, lambda logits, u: choose_token(logits, u, temperature, top_p, top_k),
                                   stop_ids, seed, max_rows, progress)

    def group(prompt, rows):
        tokens, logprobs, finished = zip(*rows)
        pad = lambda xs: torch.nn.utils.rnn.pad_sequence(xs, batch_first=True)
        no = torch.zeros(G, dtype=torch.bool)
        return Group(prompt.cpu(), pad(tokens), torch.tensor([len(t) for t in tokens]), torch.tensor(finished), pad(logprobs),
                     no, torch.zeros(G), no.clone())
    return [group(prompt, rows) for prompt, rows in zip(prompts, responses)]


@torch.inference_mode()
def run_to_the_end(model, prompts, ids, G, max_new_tokens, select, stop_ids, seed, max_rows, progress) -> list[list[tuple]]:
    """The loop of `sample`: for each prompt, the (tokens, logprobs, finished) of its G rows."""
    longest = max(len(p) for p in prompts)
    rows = min(len(prompts), max(1, (max_rows or rows_that_fit(model, G, longest, max_new_tokens)) // G)) * G
    seats = min(len(prompts), 2 * rows // G)               # twice the prompts that fill the rows: one keeps its seat until its last row has ended
    batch = Batch(model, rows, seats, G, max_new_tokens, select, stop_ids)
    check_every = 1 if batch.device.type == "cpu" else 16  # asking a GPU whether a row has ended makes it wait for us
    stops = batch.stop_ids.cpu()
    responses = [[None] * G for _ in prompts]              # (tokens, logprobs, finished) of each row, once it has ended
    waiting, seen = deque(range(len(prompts))), Counter()

    while batch.n_rows or waiting:
        while waiting and batch.n_rows + G <= rows and batch.n_seats < seats:
            entering = []
            room = min((rows - batch.n_rows) // G, seats - batch.n_seats)
            while waiting and len(entering) < room and (not entering or (len(entering) + 1) * max(len(prompts[i]) for i in [*entering, waiting[0]]) <= PREFILL_TOKENS):
                entering.append(waiting.popleft())
            uniforms = []
            for i in entering:
                generator = prompt_generator(seed, ids[i], seen[ids[i]])
                uniforms.append(torch.rand(G, max_new_tokens, generator=generator, dtype=torch.float64))  # row g does not depend on G
                seen[ids[i]] += 1
            batch.prefill(entering, [prompts[i] for i in entering], torch.cat(uniforms))

        ended = batch.ended[:batch.n_rows].tolist()
        leaving = [row for row in range(batch.n_rows) if ended[row] or batch.count(row) == max_new_tokens]
        for row in leaving:
            tokens = batch.tokens[row, :batch.count(row)].to("cpu", copy=True)  # the next row will be written over this one
            stop = torch.isin(tokens, stops).nonzero().flatten()
            length = int(stop[0]) + 1 if len(stop) else len(tokens)  # what came after the end between two checks is dropped
            prompt, place = batch.owner[row]
            responses[prompt][place] = tokens[:length], batch.logprobs[row, :length].to("cpu", copy=True), bool(len(stop))
            if progress:
                progress(length)
        if leaving:
            batch.leave(leaving)
            continue                                       # a waiting prompt may enter now
        batch.decode(min(check_every, max_new_tokens - batch.longest))
    return responses


