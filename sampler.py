"""Groups of rollouts from a key/value cache.

The prompt of a group runs once (`prefill`); its G responses then grow together, one token at a time
(`decode`), all reading the prompt's keys and values from one place (with FlashAttention, each its
copy).

On a CPU a row that ends leaves the batch at once, and waiting prompts enter as soon as there is
room: neither rows that have ended nor padding go through the network. Reading back from a GPU
stalls it, and so do new sizes. There we look for rows that have ended every 16 tokens only, and
fill the batch up to a round number of rows.

Randomness belongs to the row, not to the batch. Each prompt has a generator, seeded from (seed,
prompt id, how often that id came before), that gives one uniform number per row and position. A
token is where the cumulative distribution passes that number. So what a row says depends on the
seed and on `max_new_tokens`, but not on G or on the other rows, and there is no random state to
save. (In bf16 rounding depends on the batch: then only the statistics agree.)

Letters: N rows in flight, B prompts in flight, G rows of a group, P prompt length, T response
length, D width, V vocabulary.
"""
from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gcpo import Group
from logprobs import encode_prompts
from model import Transformer
from support.caches import GroupCaches, Step, round_up
from support.cpu import packed_weights
from support.gpu import RECORDED_ROWS, RowCaches, StepRecorder, has_flash
from support.memory import rows_that_fit


PREFILL_TOKENS = 4096  # prompts that enter together run together, up to so many tokens


# ---- From logits and a uniform number to a token -------------------------------------------------

def inverse_cdf(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """weights (N, any) float64, not negative; u (N,) in [0, 1] -> index (N,) and rest (N,).

    The index is where the cumulative sum passes u of its total; `rest`, in [0, 1] as well, is
    where u fell inside that interval. An index of weight 0 is never drawn."""
    cdf = weights.cumsum(-1)
    total = cdf[:, -1:]
    target = u[:, None] * total
    index = torch.searchsorted(cdf, target, right=True)                  # right: also at u = 0
    index = torch.minimum(index, (cdf < total).sum(-1, keepdim=True))    # also at u rounded to 1
    width = weights.gather(1, index)
    rest = (target - (cdf.gather(1, index) - width)) / width
    return index[:, 0], rest[:, 0].clamp(0, 1)


def restrict_to_top(probs: Tensor, top_p: float, top_k: int) -> Tensor:
    """probs (N, V) with 0 for every token outside the nucleus; not renormalised."""
    if top_k > 0:
        least = probs.topk(min(top_k, probs.shape[1]), dim=-1).values[:, -1:]
        probs = torch.where(probs >= least, probs, 0.0)
    if top_p < 1:
        ordered, index = probs.sort(dim=-1, descending=True)
        likelier = ordered.cumsum(-1) - ordered                     # mass of the likelier tokens
        inside = likelier < top_p * ordered.sum(-1, keepdim=True)   # of what top-k has left
        probs = torch.zeros_like(probs).scatter(1, index, torch.where(inside, ordered, 0.0))
    return probs


def choose_token(
    logits: Tensor, u: Tensor, temperature: float, top_p: float = 1.0, top_k: int = 0,
) -> tuple[Tensor, Tensor]:
    """logits (N, V), u (N,) float64 -> token (N,), and its logprob (N,) fp32.

    The logprob is that of softmax(logits / temperature), whole, also with top-p or top-k (training
    uses neither). Temperature 0 is greedy; the logprob is then that of temperature 1.

    The cumulative sum goes in two levels, over blocks of 128 tokens and inside one block, in
    float64: more exact than one fp32 sum over V, at a fraction of its cost."""
    if temperature == 0:
        token = logits.argmax(-1)
        logprobs = logits.log_softmax(-1, dtype=torch.float32)
        return token, logprobs.gather(1, token[:, None])[:, 0]
    if temperature != 1:
        logits = logits.float() / temperature
    probs = logits.softmax(-1, dtype=torch.float32)                 # (N, V)
    likely = restrict_to_top(probs, top_p, top_k)
    N, V = probs.shape
    if V % 128:
        likely = torch.nn.functional.pad(likely, (0, -V % 128))
    blocks = likely.view(N, -1, 128)
    block, rest = inverse_cdf(blocks.sum(-1).double(), u)           # (N,) each
    inside = blocks[torch.arange(N, device=u.device), block]        # (N, 128)
    token = block * 128 + inverse_cdf(inside.double(), rest)[0]
    return token, probs.gather(1, token[:, None])[:, 0].log()


# ---- What is asked for ---------------------------------------------------------------------------

@dataclass
class Sampling:
    """The keyword arguments of `sample`."""
    stop_ids: list              # a response ends with the first of these, which belongs to it
    seed: int | tuple           # one number, or several: (seed, step)
    temperature: float = 1.0    # 0: greedy
    top_p: float = 1.0
    top_k: int = 0
    prompt_ids: list | None = None    # for the prompts' random streams; None: 0, 1, 2, …
    max_rows: int | None = None       # most rows in flight; a group stays whole. None: what fits
    progress: object = None           # progress(tokens) is called as a row ends


class Row(NamedTuple):
    """A row in flight, as the host knows it."""
    prompt: int     # whose response it is
    place: int      # 0 … G − 1 in its group
    entered: int    # Batch.now when it got its first token


class Response(NamedTuple):
    """A row that has ended."""
    tokens: Tensor      # (T,)
    logprobs: Tensor    # (T,)
    finished: bool      # by a stop token


# ---- The batch in flight -------------------------------------------------------------------------

class Size(NamedTuple):
    """The most that a Batch holds."""
    rows: int
    seats: int       # prompts in flight
    group: int       # G, rows of a prompt
    prompt: int      # P, tokens of the longest
    response: int    # T, tokens


class Batch:
    """Rows that are being sampled.

    row     a response that is being sampled, 0 … N − 1: when one leaves, the last takes its number
    seat    a prompt in flight, 0 … B − 1, likewise; its keys and values are stored by seat
    place   a row's number in its group, 0 … G − 1
    cell    seat · G + place: leads from a row to its prompt

        G = 2      place 0   place 1        prompt cache     own cache, by row
        seat 0      row 0     row 3         P columns        row 0   cell 0   T columns
        seat 1      row 1       –           P columns        row 1   cell 2
        seat 2      row 4     row 2         P columns        row 2   cell 5
                                                             row 3   cell 1
        (– : a row that has ended)                           row 4   cell 4

    Seats and cells serve one end: without FlashAttention a prompt's keys are stored once, and read
    for all its rows in one product (support/caches.py, which you may take on trust). Decoding works
    on fixed tensors, which a GPU can replay; what the host must know is in lists."""
    def __init__(self, model: Transformer, size: Size, sampling: Sampling):
        device = model.device
        self.model = model
        self.device = device
        self.sampling = sampling
        self.size = size
        self.multiple = RECORDED_ROWS if device.type == "cuda" else 1    # N is filled up to it
        if has_flash(model):
            self.caches = RowCaches(model, size.rows, size.group, size.prompt, size.response)
        else:
            self.caches = GroupCaches(model, size.rows, size.seats, size.group)
        self.recorder = None
        if device.type == "cuda":
            self.recorder = StepRecorder()
            self.caches.make_room(size.prompt, size.response)

        # On the device: numbers of each seat, and numbers of each row. Rows that are not alive have
        # the cell after the last seat's.
        def zeros(*shape, dtype=torch.int64):
            return torch.zeros(shape, dtype=dtype, device=device)

        rows, T = size.rows, size.response
        self.prompt_length = zeros(size.seats + 1)    # one more, for rows that are not alive
        self.cell = zeros(rows) + size.seats * size.group
        self.length = zeros(rows)    # tokens so far
        self.finished = zeros(rows, dtype=torch.bool)    # by a stop token
        self.tokens = zeros(rows, T)
        self.logprobs = zeros(rows, T, dtype=torch.float32)
        self.uniforms = zeros(rows, T, dtype=torch.float64)
        self.stop_ids = torch.tensor(sorted(sampling.stop_ids), dtype=torch.int64, device=device)

        # On the host
        self.now = 0                             # tokens decoded since the beginning
        self.rows: list[Row] = []                # those alive
        self.alive_in: list[int] = []            # of each seat: its rows alive
        self.seat_lengths: list[int] = []        # of each seat: its prompt's length

    def count(self, row: int) -> int:
        """Tokens of a row so far."""
        return self.now - self.rows[row].entered + 1

    @property
    def longest(self) -> int:
        """Tokens of the row that has most."""
        return self.now - min((row.entered for row in self.rows), default=self.now) + 1

    def make_room(self, response: int) -> None:
        """For the prompts in flight and responses of so many tokens. Where steps are recorded there
        is room for all from the beginning: recordings would go on reading the old tensors."""
        if not self.recorder:
            self.caches.make_room(max(self.seat_lengths), response)

    def add_token(self, logits: Tensor, rows: slice) -> None:
        """Choose the next token of some rows, n of them, from their logits (n, V)."""
        s = self.sampling
        at = self.length[rows]                                               # (n,)
        index = torch.arange(rows.start, rows.stop, device=self.device)      # (n,)
        token, logprob = choose_token(
            logits, self.uniforms[index, at], s.temperature, s.top_p, s.top_k)
        self.tokens[index, at] = token
        self.logprobs[index, at] = logprob
        self.length[rows] += 1
        self.finished[rows] |= (token[:, None] == self.stop_ids).any(1)

    def prefill(self, entering: list[int], prompts: list[Tensor], uniforms: Tensor) -> None:
        """Seat prompts that wait: run each (P,) once, and give its G rows their first token.

        `entering` are the prompts' numbers; uniforms (rows, T)."""
        G = self.size.group
        prefix = encode_prompts(self.model, prompts)
        first_seat, first_row = len(self.alive_in), len(self.rows)
        seats = slice(first_seat, first_seat + len(prompts))
        rows = slice(first_row, first_row + len(uniforms))
        self.seat_lengths += [len(p) for p in prompts]
        self.alive_in += [G] * len(prompts)
        self.make_room(self.longest)
        self.rows += [Row(i, place, self.now) for i in entering for place in range(G)]

        self.caches.enter(prefix, seats, rows)
        self.prompt_length[seats] = prefix.lengths
        self.cell[rows] = torch.arange(seats.start * G, seats.stop * G, device=self.device)
        self.length[rows] = 0
        self.finished[rows] = False
        self.uniforms[rows] = uniforms.to(self.device)
        logits = self.model.logits(prefix.last)          # (prompts that enter, V)
        self.add_token(logits.repeat_interleave(G, dim=0), rows)

    def decode(self, count: int) -> None:
        """`count` more tokens for every row, without asking the device for anything."""
        self.make_room(self.longest + count - 1)
        # Rows that are not alive advance too, if the batch is filled up: set them back so that they
        # never index past the cache.
        self.length[len(self.rows):] = 1
        N = min(round_up(len(self.rows), self.multiple), self.size.rows)
        for _ in range(count):
            if self.recorder:
                self.recorder.run(self.decode_one, N)
            else:
                self.decode_one(N)
        self.now += count

    def decode_one(self, N: int) -> None:
        """One more token for rows 0 … N − 1: those alive, filled up."""
        B = self.size.seats if self.recorder else len(self.alive_in)
        cell = self.cell[:N]                                                         # (N,)
        at = self.length[:N] - 1
        prompt_length = self.prompt_length[cell // self.size.group]                  # (N,)
        step = Step(torch.arange(N, device=self.device), at, prompt_length, cell, B)
        hidden = self.model(                                                         # (N, 1, D)
            self.tokens[step.row, at][:, None], attend=self.caches.attention(step),
            positions=(prompt_length + at)[:, None])
        self.add_token(self.model.logits(hidden[:, 0]), slice(0, N))

    def leave(self, rows: list[int]) -> None:
        """Take rows out. The last rows alive fill the holes, so that numbers stay 0 … N − 1, and a
        prompt without rows gives up its seat."""
        for cell in self.cell[rows].tolist():
            self.alive_in[cell // self.size.group] -= 1
        gone = set(rows)
        kept = [row for row in range(len(self.rows)) if row not in gone]
        N = len(kept)
        holes = [row for row in rows if row < N]
        movers = [row for row in kept if row >= N]
        if holes:
            to = torch.tensor(holes, device=self.device)
            source = torch.tensor(movers, device=self.device)
            self.caches.move_rows(to, source)
            columns = (self.cell, self.length, self.finished, self.tokens, self.logprobs,
                       self.uniforms)
            for column in columns:
                column[to] = column[source]
            for hole, mover in zip(holes, movers):
                self.rows[hole] = self.rows[mover]
        del self.rows[N:]
        self.cell[N:] = self.size.seats * self.size.group
        for seat in reversed(range(len(self.alive_in))):
            if self.alive_in[seat] == 0:
                self.give_up_seat(seat)

    def give_up_seat(self, seat: int) -> None:
        """The last seat's prompt moves here, and its rows' cells with it."""
        last = len(self.alive_in) - 1
        if seat != last:
            self.caches.move_seat(seat, last)
            self.prompt_length[seat] = self.prompt_length[last]
            self.alive_in[seat] = self.alive_in[last]
            self.seat_lengths[seat] = self.seat_lengths[last]
            cells = self.cell[:len(self.rows)]
            cells[cells // self.size.group == last] -= (last - seat) * self.size.group
        self.alive_in.pop()
        self.seat_lengths.pop()


# ---- Sampling ------------------------------------------------------------------------------------

def prompt_generator(seed, prompt_id: int, repeat: int) -> torch.Generator:
    """The random stream of one prompt; `seed` is a number, or several: (seed, step). repeat: how
    often this prompt id came before."""
    seeds = seed if isinstance(seed, (tuple, list)) else (seed,)
    # The 1 at the end, because numpy takes (0, 1) and (0, 1, 0) for the same; >> 1 for int64.
    sequence = np.random.SeedSequence([*seeds, prompt_id, repeat, 1])
    return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0]) >> 1)


def sample(
    model: Transformer, prompts: list[Tensor], group_size: int, max_new_tokens: int, **settings,
) -> list[Group]:
    """A Group of `group_size` responses for each prompt (P,), in the order given, not yet graded.

    `settings` are the fields of Sampling: stop_ids= and seed=, and others if wanted. A response
    ends with a stop token, or after `max_new_tokens`. Logprobs are those of softmax(logits /
    temperature). Row g of a prompt reads the numbers g·T to (g + 1)·T of its random stream, with
    T = `max_new_tokens`. The groups' tensors are on the CPU. Raises ValueError for empty prompts,
    sizes below 1 and a negative temperature."""
    sampling = Sampling(**settings)
    if not prompts:
        return []
    possible = min(len(p) for p in prompts) >= 1 and group_size >= 1 and max_new_tokens >= 1
    if not possible or not 0 <= sampling.temperature < math.inf:
        raise ValueError("sample: needs prompts of a token or more, group_size and max_new_tokens "
                         "of 1 or more, temperature of 0 or more")
    if sampling.prompt_ids is None:
        sampling.prompt_ids = list(range(len(prompts)))
    with packed_weights(model):
        responses = run_to_the_end(model, prompts, group_size, max_new_tokens, sampling)
    return [ungraded_group(prompt, rows) for prompt, rows in zip(prompts, responses)]


def ungraded_group(prompt: Tensor, rows: list[Response]) -> Group:
    pad = lambda xs: torch.nn.utils.rnn.pad_sequence(xs, batch_first=True)
    return Group(
        prompt=prompt.cpu(),
        responses=pad([r.tokens for r in rows]),
        lengths=torch.tensor([len(r.tokens) for r in rows]),
        finished=torch.tensor([r.finished for r in rows]),
        logprobs=pad([r.logprobs for r in rows]),
        correct=torch.zeros(len(rows), dtype=torch.bool),
        rewards=torch.zeros(len(rows)),
        is_gold=torch.zeros(len(rows), dtype=torch.bool))


@torch.inference_mode()
def run_to_the_end(
    model, prompts: list[Tensor], G: int, T: int, sampling: Sampling,
) -> list[list[Response]]:
    """The loop of `sample`: for each prompt its G responses."""
    longest = max(len(p) for p in prompts)
    most = sampling.max_rows or rows_that_fit(model, G, longest, T)
    most_rows = min(len(prompts), max(1, most // G)) * G
    # A prompt keeps its seat until its last row ends.
    seats = min(len(prompts), 2 * most_rows // G)
    batch = Batch(model, Size(most_rows, seats, G, longest, T), sampling)
    check_every = 1 if batch.device.type == "cpu" else 16
    responses = [[None] * G for _ in prompts]
    waiting = deque(range(len(prompts)))
    seen = Counter()    # how often a prompt id has entered

    while batch.rows or waiting:
        while waiting and len(batch.rows) + G <= most_rows and len(batch.alive_in) < seats:
            room = min((most_rows - len(batch.rows)) // G, seats - len(batch.alive_in))
            entering = next_prompts(waiting, prompts, room)
            uniforms = []
            for i in entering:
                prompt_id = sampling.prompt_ids[i]
                stream = prompt_generator(sampling.seed, prompt_id, seen[prompt_id])
                seen[prompt_id] += 1
                uniforms.append(torch.rand(G, T, generator=stream, dtype=torch.float64))
            batch.prefill(entering, [prompts[i] for i in entering], torch.cat(uniforms))

        finished = batch.finished[:len(batch.rows)].tolist()
        leaving = [row for row in range(len(finished)) if finished[row] or batch.count(row) == T]
        for row in leaving:
            response = read_response(batch, row)
            responses[batch.rows[row].prompt][batch.rows[row].place] = response
            if sampling.progress:
                sampling.progress(len(response.tokens))
        if leaving:
            batch.leave(leaving)    # and a waiting prompt may enter now
        else:
            batch.decode(min(check_every, T - batch.longest))
    return responses


def next_prompts(waiting: deque, prompts: list[Tensor], room: int) -> list[int]:
    """Prompts to run together: one or more, up to `room`, up to PREFILL_TOKENS with padding."""
    entering = []
    longest = 0
    while waiting and len(entering) < room:
        longest = max(longest, len(prompts[waiting[0]]))
        if entering and (len(entering) + 1) * longest > PREFILL_TOKENS:
            break
        entering.append(waiting.popleft())
    return entering


def read_response(batch: Batch, row: int) -> Response:
    """A row's tokens up to its first stop token, copied: the next row will be written over it."""
    count = batch.count(row)
    tokens = batch.tokens[row, :count].to("cpu", copy=True)
    stop_ids = torch.tensor(list(batch.sampling.stop_ids), dtype=torch.int64)
    stops = torch.isin(tokens, stop_ids).nonzero().flatten()
    length = int(stops[0]) + 1 if len(stops) else count    # what came after the end is dropped
    logprobs = batch.logprobs[row, :length].to("cpu", copy=True)
    return Response(tokens[:length], logprobs, bool(len(stops)))
