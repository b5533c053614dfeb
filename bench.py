"""Speed and memory, beside a peer in the same run: the one place where they are measured.

    python bench.py sample --model DIR --data FILE
        sampling, beside transformers' generate
    python bench.py update --model DIR --data FILE
        forward and backward of an update, beside full padded sequences
    python bench.py step --model DIR --data FILE
        whole training steps, beside TRL's GRPOTrainer
    python bench.py memory --model DIR --data FILE
        peak memory of one update of full-length responses
    python bench.py grow
        how cost grows with G, response length, rows, and model size
    python bench.py cost
        how much memory a GPU needs, by model size: estimated, nothing is run

Machines are shared and noisy, so each side is a process of its own, the two take turns `--rounds`
times, and the ratio of their medians comes first. Only useful tokens count: a row's tokens up to
its end, never what comes after. Every row of a table is one JSON line on stderr as well. The peers
are optional: pip install transformers, pip install trl.
"""
import argparse
import contextlib
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile, record_function

import sampler
import train
from data import Limits, Tokenizer, load_tokenizer, prepare, read_problems
from gcpo import ALGORITHMS, Group, group_advantages
from grader import Reward
from model import ModelConfig, Transformer, load_model, read_config, save_model
from sampler import sample
from support.batches import micro_batches
from support.common import InputError, as_flags, exit_cleanly, pick_device, pick_dtype
from support.cpu import keep_freed_memory
from support.estimate import Circumstances, estimate, needs
from support.memory import peak_bytes
from support.options import Config, rows_that_fill
from support.policy import make_policy


SHAPES = {  # of random weights; the names say whose shape it is
    "SmolLM2-135M": dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152),
    "SmolLM2-360M": dict(
        hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15,
        num_key_value_heads=5, vocab_size=49152),
    "Qwen2.5-0.5B": dict(
        model_type="qwen2",
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, vocab_size=151936),
    "Qwen2.5-1.5B": dict(
        model_type="qwen2",
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, vocab_size=151936),
    "Qwen2.5-3B": dict(
        model_type="qwen2",
        hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
        num_key_value_heads=2, vocab_size=151936),
    "Qwen2.5-7B": dict(
        model_type="qwen2",
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False),
}
PEERS = {"transformers": "transformers", "trl": "TRL"}    # package: what it is called
GIB = 2**30


# ---- The command ---------------------------------------------------------------------------------

def main():
    args = parse_arguments()
    if args.child == "ours":
        keep_freed_memory()
    if args.what == "cost":
        cost()
    elif args.what == "grow" and args.child:
        grow_child(args)
    elif args.what == "grow":
        grow(sys.argv[1:])
    elif args.child:
        child(args)
    else:
        compare(args, sys.argv[1:])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("what", choices=("sample", "update", "step", "memory", "grow", "cost"))
    flag("--model", help="Hugging Face model folder (grow: random weights without)")
    flag("--data", help="problems whose prompts are used")
    flag("--peer", choices=(*PEERS, "none"), default=None,
         help="whom to compare with (default: transformers; trl for step)")
    flag("--prompts", type=int, default=8, help="the first so many problems")
    flag("--group-size", type=int, default=8, help="G, responses per prompt")
    flag("--max-new-tokens", type=int, default=200, help="longest response")
    flag("--rows", type=int, default=0, help="our rows in flight (default: what fits)")
    flag("--rows-per-pass", type=int, default=0,
         help="our rows in one backward pass (default: train.py's)")
    flag("--gradient-checkpointing", action="store_true",
         help="compute our activations again in backward")
    flag("--lora-rank", type=int, default=0, help="of our steps (step)")
    flag("--rounds", type=int, default=3, help="times each side runs")
    flag("--device", default="auto")
    flag("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    for hidden in ("--child", "--shared", "--shape"):
        flag(hidden, help=argparse.SUPPRESS)
    flag("--no-update", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    check(args)
    return args


def check(args) -> None:
    """Fill in the peer and rows_per_pass. Raises InputError for settings that cannot be."""
    if min(args.rounds, args.prompts, args.max_new_tokens) < 1 or args.group_size < 2:
        raise InputError("--rounds, --prompts and --max-new-tokens must be 1 or more, "
                         "--group-size 2 or more")
    if args.what == "cost" and len(sys.argv) > 2:
        raise InputError("cost: takes no flags; what a run needs it says before it starts")
    if args.lora_rank and args.what != "step":
        raise InputError("--lora-rank: it is measured by `step` alone")
    if min(args.lora_rank, args.rows_per_pass, args.rows) < 0:
        raise InputError("--lora-rank, --rows-per-pass and --rows must be 0 or more")
    if not args.rows_per_pass:
        args.rows_per_pass = max(8, rows_that_fill(args.device, args.max_new_tokens))
    peer = "trl" if args.what == "step" else "transformers"
    if args.peer not in (None, "none", peer):
        raise InputError(f"--peer {args.peer}: TRL is the peer of `step`, transformers of the "
                         "others")
    args.peer = args.peer or peer
    if args.what in ("grow", "cost"):
        return
    for name in ("model", "data"):
        if not getattr(args, name):
            raise InputError(f"--{name} is missing")


# ---- Two processes that take turns: the parent ---------------------------------------------------

class Side:
    """A child process that runs one round of its side whenever it is told to."""
    def __init__(self, who: str, argv: list[str]):
        self.who = who
        self.rounds = []
        self.process = subprocess.Popen(
            [sys.executable, __file__, *argv, "--child", who],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.idle = self.read()["idle"]

    def read(self) -> dict:
        """What the child says next. Libraries print too: its own lines begin with BENCH."""
        for line in self.process.stdout:
            if line.startswith("BENCH "):
                return json.loads(line.removeprefix("BENCH "))
        raise child_failed(self.process.wait(), f" ({self.who})")

    def ask(self, word: str) -> dict:
        with contextlib.suppress(BrokenPipeError):    # read() says how the child ended
            self.process.stdin.write(word + "\n")
            self.process.stdin.flush()
        return self.read()

    def go(self) -> None:
        done = self.ask("go")
        self.rounds.append(done)
        print(f"  {self.who}: {done['tokens']} tokens, {done['seconds']:.2f} s", file=sys.stderr)

    def end(self) -> list[str]:
        """The lines of the child's report."""
        lines = self.ask("report")["report"]
        self.process.stdin.close()
        self.process.wait()
        return lines

    @property
    def speeds(self) -> list[float]:
        return [r["tokens"] / r["seconds"] for r in self.rounds]

    @property
    def speed(self) -> float:
        return statistics.median(self.speeds)

    @property
    def seconds(self) -> float:
        return statistics.median(r["seconds"] for r in self.rounds)

    @property
    def peak(self) -> float:
        return max(r["peak"] for r in self.rounds)


def child_failed(status: int, which: str = "") -> InputError:
    return InputError(f"the measuring process{which} ended with status {status}; what it said "
                      "stands above")


def compare(args, argv: list[str]) -> None:
    """All sides in turn; then the ratios, the table, and what the sides report."""
    names = ["ours"]
    if args.peer != "none":
        names.append(args.peer)
        if importlib.util.find_spec(args.peer) is None:
            raise InputError(f"this compares with {PEERS[args.peer]}: pip install {args.peer}, or "
                             "--peer none")
    with tempfile.TemporaryDirectory() as folder:
        sides = [Side(name, [*argv, "--shared", folder]) for name in names]
        for _ in range(args.rounds):
            for side in sides:
                side.go()
        print_comparison(args, sides)
        for side in sides:
            for line in side.end():
                print(line)
        if args.what == "update" and len(sides) == 2:
            compare_gradients(args, *(gradient_file(folder, name) for name in names))


def compare_gradients(args, ours: str, theirs: str) -> None:
    """Prints how much they differ. In fp32 that is rounding; more is a bug."""
    a = load_file(ours)["gradient"]
    b = load_file(theirs)["gradient"]
    difference = float((a - b).norm() / b.norm())
    print(f"the two gradients differ by {difference:.1e} of their norm (without the pad token's "
          "row of the embedding, which transformers gives no gradient from the input)")
    if pick_dtype(args.dtype, pick_device(args.device)) == torch.float32:
        assert difference < 1e-4, "the gradients of an update differ by more than rounding"


def print_comparison(args, sides: list[Side]) -> None:
    size = f"{args.prompts} x {args.group_size} x {args.max_new_tokens}"
    what = f"{args.what} {size}, {args.device}, {args.dtype}"
    ours, peer = sides[0], sides[-1]
    speed = ours.speed / peer.speed
    memory = ours.peak / peer.peak
    beside = f"{speed:.2f} x the tokens/s of {peer.who}, at {memory:.0%} of its peak memory"
    print(f"\n{what}: {beside if peer is not ours else 'ours alone'}")
    print_row(14, "", ["tokens/s", "lowest", "highest", "seconds", "GiB peak", "GiB idle"])
    for side in sides:
        print_row(14, side.who, [
            f"{side.speed:.0f}",
            f"{min(side.speeds):.0f}",
            f"{max(side.speeds):.0f}",
            f"{side.seconds:.2f}",
            f"{side.peak / GIB:.2f}",
            f"{side.idle / GIB:.2f}",
        ])
        print_json({
            "bench": what,
            "who": side.who,
            "tokens_per_second": side.speed,
            "all": side.speeds,
            "seconds": side.seconds,
            "peak": side.peak,
            "ratio": speed,
            "memory_ratio": memory,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        })


def print_row(width: int, label: str, cells: list[str]) -> None:
    """A line of a table whose first column has this width."""
    print(label.ljust(width) + "".join(cell.rjust(10) for cell in cells), flush=True)


def print_json(record: dict) -> None:
    print(json.dumps(record), file=sys.stderr)


# ---- Two processes that take turns: the children -------------------------------------------------

class Turns:
    """The child's end of a Side: it waits for a word, and answers."""
    def __init__(self, device: torch.device):
        self.device = device
        self.is_first = True

    def say(self, **record) -> None:
        print("\nBENCH " + json.dumps(record), flush=True)

    def another(self) -> bool:
        """Wait for a word. True: run one more round. False: the report is wanted."""
        if self.is_first:
            self.say(idle=peak_bytes(self.device))
        self.is_first = False
        return sys.stdin.readline().strip() == "go"

    def done(self, tokens: int, seconds: float) -> None:
        self.say(tokens=tokens, seconds=seconds, peak=peak_bytes(self.device))


def child(args) -> None:
    """Run rounds when told to, over stdin and stdout."""
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    turns = Turns(device)
    if args.what == "step":    # there the library has the loop, and calls us
        if args.child == "ours":
            report = our_steps(args, device, turns)
        else:
            report = trl_steps(args, device, dtype, turns)
        turns.say(report=report)
        return
    side = make_side(args, device, dtype)
    while turns.another():
        tokens, seconds = timed(side.work, device)
        turns.done(tokens, seconds)
    turns.say(report=side.report())


def make_side(args, device: torch.device, dtype: torch.dtype):
    """An object with work(), one round, which returns its useful tokens; and report(), lines."""
    if args.what == "sample":
        kind = OurSampling if args.child == "ours" else PeerSampling
    else:
        kind = OurUpdate if args.child == "ours" else PeerUpdate
    return kind(args, device, dtype)


def timed(f, device: torch.device) -> tuple[object, float]:
    """What f() returns, and its seconds."""
    wait_for(device)
    began = time.perf_counter()
    result = f()
    wait_for(device)
    return result, time.perf_counter() - began


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def read_prompts(args, count: int) -> tuple[Tokenizer, list[torch.Tensor]]:
    """The tokenizer, and the first problems' prompts (P,)."""
    tokenizer = load_tokenizer(args.model)
    problems = read_problems(args.data)[:count]
    problems = prepare(problems, tokenizer, Limits(args.max_new_tokens, positions=10**9))
    return tokenizer, [p.prompt for p in problems]


def load_peer(args, device: torch.device, dtype: torch.dtype):
    """transformers' model."""
    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    return model.to(device)


# ---- Sampling ------------------------------------------------------------------------------------

class OurSampling:
    """`sampler.sample`."""
    def __init__(self, args, device, dtype):
        self.args = args
        self.device = device
        self.tokenizer, self.prompts = read_prompts(args, args.prompts)
        self.model = load_model(args.model, device, dtype)
        self.groups = []

    def work(self) -> int:
        args = self.args
        self.groups = sample(
            self.model, self.prompts, args.group_size, args.max_new_tokens,
            stop_ids=self.tokenizer.stop_ids, seed=0, max_rows=args.rows or None)
        return sum(int(g.lengths.sum()) for g in self.groups)

    def report(self) -> list[str]:
        _, seconds = timed(self.work, self.device)
        share = bound(self.model, self.groups) / seconds
        lines = ["the bare matrix products of our rollouts, each step at its number of rows, "
                 f"would take {share:.0%} of our time"]
        if self.device.type == "cpu":
            shares = where_time_goes(self.work)
            parts = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
            lines.append(f"where our time goes: {parts}")
        return lines


class PeerSampling:
    """transformers' generate: prompts padded on the left, all rows in one batch."""
    def __init__(self, args, device, dtype):
        self.args = args
        self.tokenizer, prompts = read_prompts(args, args.prompts)
        self.model = load_peer(args, device, dtype)
        self.width = max(len(p) for p in prompts)
        self.stop_ids = torch.tensor(self.tokenizer.stop_ids, device=device)
        ids = [self.pad(p, self.tokenizer.end_id) for p in prompts]
        mask = [self.pad(torch.ones_like(p), 0) for p in prompts]
        self.ids = torch.stack(ids).to(device)      # (B, width)
        self.mask = torch.stack(mask).to(device)    # (B, width)

    def pad(self, prompt, value):
        return F.pad(prompt, (self.width - len(prompt), 0), value=value)

    def work(self) -> int:
        G = self.args.group_size
        out = self.model.generate(                                          # (B·G, width + T)
            input_ids=self.ids.repeat_interleave(G, 0),
            attention_mask=self.mask.repeat_interleave(G, 0),
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=self.args.max_new_tokens,
            eos_token_id=self.tokenizer.stop_ids, pad_token_id=self.tokenizer.end_id)
        is_end = torch.isin(out[:, self.width:], self.stop_ids).int()
        ends_before = is_end.cumsum(1) - is_end
        return int((ends_before == 0).sum())    # up to the first end token, and it too

    def report(self) -> list[str]:
        return []


# ---- Where sampling's time goes, and how little it could be --------------------------------------

@torch.no_grad()
def bound(model: Transformer, groups: list[Group]) -> float:
    """Seconds that the bare products of these rollouts take: each step at its own number of rows.

    Measured at a few numbers of rows, and interpolated between them."""
    prefill = bare_products(model, sum(len(g.prompt) for g in groups))
    lengths = torch.cat([g.lengths for g in groups])
    alive = [int((lengths > t).sum()) for t in range(1, int(lengths.max()))]    # after each token
    if not alive:    # every response is one token, which the prompts' pass gives
        return prefill
    known = {min(alive)}
    for share in (1, 0.75, 0.5, 0.25, 0.1, 0.02):
        known.add(max(1, round(max(alive) * share)))
    seconds = {rows: bare_products(model, rows) for rows in sorted(known)}
    return prefill + sum(interpolated(seconds, rows) for rows in alive)


def interpolated(values: dict[int, float], x: int) -> float:
    """Between the nearest keys on both sides."""
    below = max(known for known in values if known <= x)
    above = min(known for known in values if known >= x)
    if above == below:
        return values[x]
    weight = (x - below) / (above - below)
    return values[below] * (1 - weight) + values[above] * weight


def bare_products(model: Transformer, rows: int, repeats: int = 5) -> float:
    """Seconds of one decoding step's matrix products alone, with PyTorch's plain F.linear."""
    matrices = matrices_of(model)
    inputs = {}
    for m in matrices:
        width = m.shape[1]
        inputs[width] = torch.randn(rows, width, dtype=m.dtype, device=m.device)

    def products():
        return [F.linear(inputs[m.shape[1]], m) for m in matrices]

    run = recorded(products, model.device)
    return min(timed(run, model.device)[1] for _ in range(repeats))


def matrices_of(model: Transformer) -> list[torch.Tensor]:
    """Every matrix (out, in) that tokens are multiplied with."""
    inside = [p for p in model.layers.parameters() if p.dim() == 2]
    return [*inside, model.output_weight]


def recorded(f, device: torch.device):
    """f, run once; on a GPU as a CUDA graph, so that it does not wait for Python."""
    f()
    if device.type == "cpu":
        return f
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        f()
    return graph.replay


# As the profiler calls them
PRODUCTS = ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise")
OPERATORS = {
    "products": PRODUCTS,
    "attention's products": (
        "aten::bmm", "aten::_flash_attention_forward", "aten::_flash_attention_backward"),
    "softmax": ("aten::_softmax", "aten::exp_"),
    "copies": ("aten::copy_", "aten::cat", "aten::index_select", "aten::index_copy_",
               "aten::index_add_", "aten::fill_", "aten::index"),
    "sums and scalings": ("aten::add", "aten::add_", "aten::sub", "aten::mul", "aten::mul_",
                          "aten::addcmul", "aten::sum", "aten::neg", "aten::silu",
                          "aten::silu_backward", "aten::_fused_rms_norm",
                          "aten::_fused_rms_norm_backward"),
}


def where_operators_go(work, device: torch.device) -> dict[str, float]:
    """Shares of the time of work(), by kinds of operators. On a GPU, `waiting` is the share in
    which it had nothing to do; on a CPU it is the time between operators, in Python."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    _, seconds = timed(work, device)
    with profile(activities=activities) as profiler:
        timed(work, device)
    own = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    times = {event.key: getattr(event, own) / 1e6 for event in profiler.key_averages()
             if event.key.startswith(("aten::", "mkldnn::"))}
    shares = {}
    for name, operators in OPERATORS.items():
        shares[name] = sum(times.pop(operator, 0.0) for operator in operators) / seconds
    shares["other operators"] = sum(times.values()) / seconds
    shares["waiting"] = 1 - sum(shares.values())
    return shares


def where_time_goes(work) -> dict[str, float]:
    """Shares of the CPU time of work(): products, attention, choice of tokens, the rest."""
    with named_parts(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        work()
    events = {event.key: event for event in profiler.key_averages()}
    total = sum(event.self_cpu_time_total for event in events.values())
    products = [event for name, event in events.items() if name in PRODUCTS]
    parts = {"products": sum(event.self_cpu_time_total for event in products)}
    for name, event in events.items():
        if name.startswith("PART "):
            parts[name.removeprefix("PART ")] = event.cpu_time_total
    shares = {name: part / total for name, part in parts.items()}
    shares["rest"] = 1 - sum(parts.values()) / total
    return shares


@contextlib.contextmanager
def named_parts():
    """Attention and the choice of tokens as named ranges of the profiler."""
    forward = Transformer.forward
    choose_token = sampler.choose_token

    def forward_with_name(self, tokens, attend=None, positions=None):
        if attend:
            attend = named(attend, "PART attention")
        return forward(self, tokens, attend, positions)

    Transformer.forward = forward_with_name
    sampler.choose_token = named(choose_token, "PART choosing tokens")
    try:
        yield
    finally:
        Transformer.forward = forward
        sampler.choose_token = choose_token


def named(f, name: str):
    def wrapped(*args, **kwargs):
        with record_function(name):
            return f(*args, **kwargs)
    return wrapped


# ---- Update --------------------------------------------------------------------------------------

class OurUpdate:
    """`train.backward`, in the passes that `train.update` makes."""
    def __init__(self, args, device, dtype):
        self.args = args
        self.items = items_for(args, device, dtype)
        self.rows, self.tokens = count(self.items)
        self.run = run_for(args, load_model(args.model, device), dtype)
        self.batches = micro_batches(self.items, args.rows_per_pass)

    def work(self) -> int:
        self.run.master.zero_grad(set_to_none=True)
        for batch in self.batches:
            train.backward(self.run, batch, self.rows, self.tokens)
        return self.tokens

    def report(self) -> list[str]:
        if self.args.what != "update":
            return []
        leave_gradient(self.args, dict(self.run.master.named_parameters()))
        device = self.run.policy.device
        _, seconds = timed(self.work, device)
        bare = sum(products_of_a_pass(self.run.policy, batch) for batch in self.batches)
        shares = where_operators_go(self.work, device)
        parts = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        return [f"the bare matrix products of this update would take {bare / seconds:.0%} of our "
                "time", f"where our time goes: {parts}"]


def products_of_a_pass(model: Transformer, batch: list[train.Item], repeats: int = 3) -> float:
    """Seconds of its matrix products alone, forward and backward; the last layer's logits are
    computed twice, since they are not kept."""
    tokens = sum(len(i.group.prompt) + int(i.group.lengths.sum()) for i in batch)
    predicted = sum(int(i.group.lengths.sum()) for i in batch)
    total = 0.0
    for (out, width), count in Counter(tuple(m.shape) for m in matrices_of(model)).items():
        last = out == model.config.vocab_size
        rows = min(4096, predicted) if last else tokens
        x = torch.randn(rows, width, dtype=model.dtype, device=model.device)
        weight = torch.randn(out, width, dtype=model.dtype, device=model.device)

        def products():
            y = F.linear(x, weight)
            if last:
                y = F.linear(x, weight)
            return y @ weight, y.T @ x

        products()
        seconds = min(timed(products, model.device)[1] for _ in range(repeats))
        total += count * seconds * (predicted / rows if last else 1)
    return total


class PeerUpdate:
    """The plain way: prompt and response of every row as one padded sequence, all logits at once,
    group by group."""
    def __init__(self, args, device, dtype):
        self.args = args
        self.device = device
        self.items = items_for(args, device, dtype)
        self.rows, self.tokens = count(self.items)
        self.model = load_peer(args, device, dtype)

    def work(self) -> int:
        self.model.zero_grad(set_to_none=True)
        for item in self.items:
            self.backward(item.group, item.advantages.to(self.device))
        return self.tokens

    def backward(self, group: Group, advantages: torch.Tensor) -> None:
        G, P = len(group.lengths), len(group.prompt)
        mask = group.mask
        attended = torch.cat([torch.ones(G, P, dtype=torch.bool), mask], dim=1).to(self.device)
        tokens = torch.cat([group.prompt.expand(G, -1), group.responses], dim=1).to(self.device)
        logits = self.model(                                                # (G, P + T, V)
            input_ids=tokens, attention_mask=attended, use_cache=False).logits
        logits = logits[:, P - 1:-1].float()                                # (G, T, V)
        logprobs = logits.log_softmax(-1).gather(-1, tokens[:, P:, None])[..., 0]
        change = torch.where(mask.to(self.device), logprobs - logprobs.detach(), 0.0)
        ratio = (change.sum(1) / group.lengths.to(self.device)).exp()       # (G,) GSPO's, 1 here
        loss = -(ratio * advantages).sum() / self.rows
        loss.backward()

    def report(self) -> list[str]:
        if self.args.what == "update":
            parameters = {name.removeprefix("model."): p
                          for name, p in self.model.named_parameters()}
            leave_gradient(self.args, parameters)
        return []


def items_for(args, device: torch.device, dtype: torch.dtype) -> list[train.Item]:
    """What both sides update on. Rewards are made up so that each group has contrast: the time
    does not depend on them."""
    rewards = torch.zeros(args.group_size)
    rewards[0] = 1
    advantages = group_advantages(rewards)
    return [train.Item(0, None, group, advantages) for group in groups_for(args, device, dtype)]


def groups_for(args, device: torch.device, dtype: torch.dtype) -> list[Group]:
    """Sampled by our side and left for the other; made up where only memory is asked for."""
    tokenizer, prompts = read_prompts(args, args.prompts)
    if args.what == "memory":
        vocabulary = read_config(args.model).vocab_size
        return made_up(prompts, args.group_size, args.max_new_tokens, vocabulary)
    path = os.path.join(args.shared, "groups.safetensors")
    fields = list(Group.__dataclass_fields__)
    if not os.path.exists(path):
        model = load_model(args.model, device, dtype)
        groups = sample(model, prompts, args.group_size, args.max_new_tokens,
                        stop_ids=tokenizer.stop_ids, seed=0)
        save_file({f"{i}.{name}": getattr(group, name)
                   for i, group in enumerate(groups) for name in fields}, path)
    tensors = load_file(path)
    return [Group(*(tensors[f"{i}.{name}"] for name in fields)) for i in range(len(prompts))]


def made_up(
    prompts: list[torch.Tensor], group_size: int, length: int, vocabulary: int,
) -> list[Group]:
    """Groups of random tokens, all of full length."""
    generator = torch.Generator().manual_seed(0)
    responses = torch.randint(0, vocabulary, (group_size, length), generator=generator)
    nowhere = torch.zeros(group_size, dtype=torch.bool)
    return [
        Group(
            prompt=prompt,
            responses=responses,
            lengths=torch.full((group_size,), length),
            finished=~nowhere,
            logprobs=torch.zeros(group_size, length),
            correct=nowhere,
            rewards=torch.zeros(group_size),
            is_gold=nowhere)
        for prompt in prompts]


def count(items: list[train.Item]) -> tuple[int, int]:
    """Rows and tokens."""
    rows = sum(len(i.group.lengths) for i in items)
    tokens = sum(int(i.group.lengths.sum()) for i in items)
    return rows, tokens


def run_for(args, master: Transformer, dtype: torch.dtype) -> train.Run:
    """What train.backward needs."""
    config = Config(max_new_tokens=args.max_new_tokens, rows_per_pass=args.rows_per_pass)
    policy = make_policy(master, dtype)
    policy.gradient_checkpointing = args.gradient_checkpointing
    no_optimizer = None    # only gradients are measured, no steps
    return train.Run(config, ALGORITHMS["gcpo"], master, policy, no_optimizer)


def leave_gradient(args, parameters: dict[str, torch.nn.Parameter]) -> None:
    """For the parent, which compares both sides': in the order of the names, so that they fit.

    Without the embedding's row of the pad token. transformers' embedding has padding_idx, so that
    row gets no gradient from the input; and in SmolLM2 the pad token ends every turn of a chat."""
    pad = read_config(args.model).raw.get("pad_token_id")
    parts = []
    for name in sorted(parameters):
        gradient = parameters[name].grad.float().cpu()
        if name == "embed_tokens.weight" and pad is not None:
            gradient = torch.cat([gradient[:pad], gradient[pad + 1:]])
        parts.append(gradient.flatten())
    save_file({"gradient": torch.cat(parts)}, gradient_file(args.shared, args.child))


def gradient_file(folder: str, who: str) -> str:
    return os.path.join(folder, f"{who}.safetensors")


# ---- Whole steps ---------------------------------------------------------------------------------

class Enough(Exception):
    """Ends a training run from inside its log."""


def our_steps(args, device: torch.device, turns: Turns) -> list[str]:
    """`train.train` itself. A step ends when it logs its metrics; the next one begins when the log
    of its samples returns. Returns lines for the report."""
    config = Config(
        model=args.model,
        data=args.data,
        out=args.shared,
        steps=10**6,
        save_every=0,    # there is no run.json to save beside
        prompts=args.prompts,
        group_size=args.group_size,
        max_new_tokens=args.max_new_tokens,
        dtype=args.dtype,
        rows=args.rows,
        rows_per_pass=args.rows_per_pass,
        gradient_checkpointing=args.gradient_checkpointing,
        lora_rank=args.lora_rank)
    run = train.load_run(config, ALGORITHMS["gcpo"], device)
    draw = random.Random(0)
    # So that each group has contrast, as the peer's have.
    run.reward = Reward(lambda response, answer: draw.random())
    not_finite = []

    def log(kind, record):
        before_training = record["step"] == 0
        if kind == "metrics" and not before_training:
            not_finite.append(record["update/not_finite"])
            seconds = record["time/sample"] + record["time/update"]
            turns.done(round(record["time/tokens_per_second"] * seconds), seconds)
        if kind == "samples" or before_training:
            if not turns.another():
                raise Enough

    with contextlib.suppress(Enough):
        train.train(run, log)
    need = estimate(
        config, run.algorithm, run.policy.config, run.problems, device, run.policy.dtype)
    return [f"our estimate of memory before the run: {need.total / GIB:.2f} GiB; updates "
            f"with a gradient that was not finite: {sum(not_finite):.0f}"]


def trl_steps(args, device: torch.device, dtype: torch.dtype, turns: Turns) -> list[str]:
    """TRL's GRPOTrainer, with micro-batches of one group."""
    import datasets
    import transformers
    import trl
    torch.manual_seed(0)
    tokenizer, prompts = read_prompts(args, args.prompts * (args.rounds + 1))
    generator = torch.Generator().manual_seed(0)
    tokens = []    # of each call of reward() in the step

    def reward(completions, completion_ids, **_):
        tokens.append(sum(len(ids) for ids in completion_ids))
        # So that each group has contrast.
        return torch.rand(len(completions), generator=generator).tolist()

    class TakeTurns(transformers.TrainerCallback):
        def on_step_begin(self, arguments, state, control, **_):
            if not turns.another():
                control.should_training_stop = True
            self.began = time.perf_counter()

        def on_step_end(self, arguments, state, control, **_):
            turns.done(sum(tokens), time.perf_counter() - self.began)
            tokens.clear()
            if state.global_step == args.rounds:
                turns.another()    # what the trainer does at its end must not disturb our side

    decode = tokenizer.backend.decode
    texts = [{"prompt": decode(p.tolist(), skip_special_tokens=False)} for p in prompts]
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.GRPOTrainer(
            model=args.model,
            reward_funcs=reward,
            args=trl.GRPOConfig(**trl_settings(args, device, dtype, folder)),
            train_dataset=datasets.Dataset.from_list(texts),
            callbacks=[TakeTurns()])
        trainer.train()
    return []


def trl_settings(args, device: torch.device, dtype: torch.dtype, folder: str) -> dict:
    """Of a GRPOConfig: what our side does, as far as it can be said."""
    return dict(
        per_device_train_batch_size=args.group_size,
        gradient_accumulation_steps=args.prompts,
        num_generations=args.group_size,
        max_completion_length=args.max_new_tokens,
        max_steps=args.rounds,
        temperature=1.0,
        beta=0.0,
        learning_rate=1e-5,
        bf16=dtype == torch.bfloat16,
        use_cpu=device.type == "cpu",
        model_init_kwargs={"dtype": "float32"},
        gradient_checkpointing=False,
        output_dir=folder,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=10**6)


# ---- How cost grows ------------------------------------------------------------------------------

class Table(NamedTuple):
    title: str
    flag: str         # what is varied
    values: tuple
    fixed: dict = {}  # what else differs from GROW


GROW = dict(shape="SmolLM2-135M", prompts=1, group_size=8, max_new_tokens=200, rows=0,
            rows_per_pass=8)
TABLES = [
    Table("group size G", "group_size", (4, 8, 16, 32)),
    Table("rows of a pass, G = 32", "rows_per_pass", (32, 16, 8, 4), dict(group_size=32)),
    Table("response length", "max_new_tokens", (100, 200, 400, 800)),
    Table("rows in flight, 16 prompts", "rows", (8, 16, 32, 64, 128),
          dict(prompts=16, max_new_tokens=100, no_update=True)),
    Table("model", "shape", ("SmolLM2-135M", "SmolLM2-360M", "Qwen2.5-0.5B")),
]


def grow(argv: list[str]) -> None:
    """Sampling and update of made-up groups, ours alone: one setting at a time, and each in a
    process of its own."""
    head = ["sample s", "tokens/s", "update s", "tokens/s", "GiB idle", "GiB peak"]
    for table in TABLES:
        print()
        print_row(28, table.title, head)
        for value in table.values:
            settings = {**GROW, **table.fixed, table.flag: value}
            result = measure_growth(argv, settings)
            print_row(28, str(value), growth_cells(result))
            print_json({"bench": f"grow: {table.title}", **settings, **result})


def measure_growth(argv: list[str], settings: dict) -> dict:
    """What grow_child prints."""
    command = [sys.executable, __file__, *argv, *as_flags(settings), "--child", "ours"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise child_failed(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def growth_cells(result: dict) -> list[str]:
    cells = []
    for part in ("sample", "update"):
        seconds = result[part]
        if seconds is None:
            cells += ["-", "-"]
        else:
            cells += [f"{seconds:.2f}", f"{result['tokens'] / seconds:.0f}"]
    return [*cells, f"{result['idle'] / GIB:.2f}", f"{result['peak'] / GIB:.2f}"]


def grow_child(args) -> None:
    """One setting: the better of `--rounds`, of sampling and of an update, as a line of JSON."""
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    run = run_for(args, load_or_make(args, device), dtype)
    vocabulary = run.master.config.vocab_size
    idle = peak_bytes(device)
    prompts = []
    for i in range(args.prompts):
        generator = torch.Generator().manual_seed(i)
        prompts.append(torch.randint(0, vocabulary, (110,), generator=generator))

    def sampling():
        sample(run.policy, prompts, args.group_size, args.max_new_tokens, stop_ids=[], seed=0,
               max_rows=args.rows or None)

    sampled = min(timed(sampling, device)[1] for _ in range(args.rounds))
    tokens = args.prompts * args.group_size * args.max_new_tokens
    updated = None
    if not args.no_update:
        groups = made_up(prompts, args.group_size, args.max_new_tokens, vocabulary)
        advantages = group_advantages(torch.arange(args.group_size))
        items = [train.Item(0, None, group, advantages) for group in groups]

        def updating():
            train.backward(run, items, *count(items))

        updated = min(timed(updating, device)[1] for _ in range(args.rounds))
    print(json.dumps({"tokens": tokens, "sample": sampled, "update": updated, "idle": idle,
                      "peak": peak_bytes(device)}))


def load_or_make(args, device: torch.device) -> Transformer:
    """--model, or random weights of --shape."""
    if args.model:
        return load_model(args.model, device)
    with tempfile.TemporaryDirectory() as folder:
        write_random_model(folder, args.shape)
        return load_model(os.path.join(folder, "model"), device)


def write_random_model(folder: str, shape: str) -> None:
    """folder/model, of this shape."""
    model = Transformer(config_of(folder, shape)).init_weights(torch.Generator().manual_seed(0))
    save_model(model.bfloat16(), os.path.join(folder, "model"))


def config_of(folder: str, shape: str) -> ModelConfig:
    """Of a shape, through a config.json in the folder."""
    config = {"model_type": "llama", "max_position_embeddings": 32768, "tie_word_embeddings": True,
              "rms_norm_eps": 1e-5, **SHAPES[shape]}
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(config, f)
    return read_config(folder)


# ---- What it costs -------------------------------------------------------------------------------

def cost() -> None:
    """GiB of each GPU, for README's command on one GPU."""
    ways = {
        "one GPU": {},
        "--gradient-checkpointing": {"gradient_checkpointing": True},
        "and --lora-rank 16": {"gradient_checkpointing": True, "lora_rank": 16},
        "--shard, 2 GPUs": {"gradient_checkpointing": True, "shard": True, "processes": 2},
        "--shard, 4 GPUs": {"gradient_checkpointing": True, "shard": True, "processes": 4},
    }
    print_row(14, "GiB", [f"  {way}" for way in ways])
    for name in SHAPES:
        if not name.startswith("Qwen"):
            continue
        with tempfile.TemporaryDirectory() as folder:
            shape = config_of(folder, name)
        cells = []
        for way, settings in ways.items():
            settings = dict(settings)
            place = Circumstances(
                device="cuda", dtype=torch.bfloat16, prompt=200, response=512, group=8,
                processes=settings.pop("processes", 1), has_reference=False)
            config = Config(prompts=32, max_new_tokens=512, rows_per_pass=16, **settings)
            total = needs(shape, config, place).total
            cells.append(f"{total / GIB:.0f}".rjust(len(way) + 2))
        print_row(14, name, cells)


if __name__ == "__main__":
    exit_cleanly(main)
