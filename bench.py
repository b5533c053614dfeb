"""Speed and memory, side by side with a peer in one run: the one place where they are measured.

    python bench.py sample --model DIR --data FILE        tokens/s of sampling, against transformers' generate
    python bench.py update --model DIR --data FILE        tokens/s of an update's forward and backward, against full padded sequences
    python bench.py memory --model DIR --data FILE        peak memory of both, each in a process of its own

Machines are shared and noisy: both sides run in turn, `--rounds` times, and ratios of medians come first. Tokens are
useful ones: a row's tokens up to its end, never what comes after. Each row of a table is printed as JSON, too.
Needs transformers (pip install transformers) for the peer.
"""
import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile, record_function

import sampler
import train
from data import load_tokenizer, prepare, read_problems
from gcpo import ALGORITHMS
from model import InputError, Transformer, exit_cleanly, keep_freed_memory, load_model, pick_device, pick_dtype
from sampler import sample


def peer_model(args, device, dtype):
    try:
        import transformers
    except ImportError:
        raise InputError("bench.py compares with transformers: pip install transformers") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device)


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(f, device):
    synchronize(device)
    began = time.perf_counter()
    result = f()
    synchronize(device)
    return result, time.perf_counter() - began


def compare(ours, theirs, rounds, device, what):
    """Run both in turn; f() returns the number of useful tokens. Prints tokens/s and their ratio."""
    speeds = {"ours": [], "peer": []}
    for i in range(rounds):
        for name, f in (("ours", ours), ("peer", theirs)):
            tokens, seconds = timed(f, device)
            speeds[name].append(tokens / seconds)
            print(f"  round {i + 1} {name}: {tokens} tokens, {seconds:.1f} s", file=sys.stderr)
    median = {name: statistics.median(values) for name, values in speeds.items()}
    print(f"\n{what}: {median['ours'] / median['peer']:.2f} x the peer\n{'':8}{'tokens/s':>10}{'lowest':>10}{'highest':>10}")
    for name, values in speeds.items():
        print(f"{name:8}{median[name]:10.0f}{min(values):10.0f}{max(values):10.0f}")
        print(json.dumps({"bench": what, "who": name, "tokens_per_second": median[name], "all": values, "ratio": median["ours"] / median["peer"]}), file=sys.stderr)
    return median


# ---------------------------------------------------------------------------------------------------------------------
# Sampling

def ours_sampled(args, model, problems, tokenizer, seed=0):
    return sample(model, [p.prompt for p in problems], args.group_size, args.max_new_tokens, stop_ids=tokenizer.stop_ids, seed=seed, max_rows=args.rows)


def peer_sampled(args, model, problems, tokenizer, device):
    """transformers' way: every prompt left-padded and repeated G times. Returns the number of useful tokens."""
    width = max(len(p.prompt) for p in problems)
    ids = torch.stack([F.pad(p.prompt, (width - len(p.prompt), 0), value=tokenizer.end_id) for p in problems]).to(device)
    mask = torch.stack([F.pad(torch.ones_like(p.prompt), (width - len(p.prompt), 0)) for p in problems]).to(device)
    out = model.generate(input_ids=ids.repeat_interleave(args.group_size, 0), attention_mask=mask.repeat_interleave(args.group_size, 0), do_sample=True,
                         temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=args.max_new_tokens, eos_token_id=tokenizer.stop_ids, pad_token_id=tokenizer.end_id)
    ended = torch.isin(out[:, width:], torch.tensor(tokenizer.stop_ids, device=device)).int()
    return int((ended.cumsum(1) - ended == 0).sum())  # up to the first end token, and it too


def bare_products(model, rows, repeats=5):
    """Seconds of one decoding step's matrix products alone, for so many rows."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed_tokens" not in name] + [model.output_weight]
    inputs = {m.shape[1]: torch.randn(rows, m.shape[1], dtype=m.dtype, device=m.device) for m in matrices}
    run = lambda: [F.linear(inputs[m.shape[1]], m) for m in matrices]
    run()
    return min(timed(run, matrices[0].device)[1] for _ in range(repeats))


@torch.no_grad()
def bound(model, groups):
    """Seconds that the bare products of these rollouts take: each step at its own number of rows."""
    lengths = torch.cat([g.lengths for g in groups])
    alive = [int((lengths > t).sum()) for t in range(1, int(lengths.max()))]
    known = sorted({max(1, round(max(alive) * share)) for share in (1, 0.75, 0.5, 0.25, 0.1, 0.02)})
    cost = {rows: bare_products(model, rows) for rows in known}

    def interpolated(rows):
        above = next(k for k in known if k >= rows)
        below = max((k for k in known if k <= rows), default=above)
        weight = 0 if above == below else (rows - below) / (above - below)
        return cost[below] * (1 - weight) + cost[above] * weight
    return sum(interpolated(rows) for rows in alive) + bare_products(model, sum(len(g.prompt) for g in groups))


@contextlib.contextmanager
def named_parts():
    """Attention and token choice as named ranges of the profiler."""
    forward, choose = Transformer.forward, sampler.choose

    def named(f, name):
        def wrapped(*args, **kwargs):
            with record_function(name):
                return f(*args, **kwargs)
        return wrapped
    Transformer.forward = lambda self, tokens, past=None, positions=None: forward(self, tokens, past and named(past, "PART attention"), positions)
    sampler.choose = named(choose, "PART sampling")
    try:
        yield
    finally:
        Transformer.forward, sampler.choose = forward, choose


def where_time_goes(run):
    """Shares of the CPU time of run(): products, attention, choice of tokens, the rest."""
    with named_parts(), profile(activities=[ProfilerActivity.CPU]) as prof:
        run()
    events = {e.key: e for e in prof.key_averages()}
    total = sum(e.self_cpu_time_total for e in events.values())
    parts = {"products": sum(e.self_cpu_time_total for k, e in events.items() if k in ("aten::mm", "aten::addmm"))}
    parts |= {k.removeprefix("PART "): e.cpu_time_total for k, e in events.items() if k.startswith("PART ")}
    return {name: value / total for name, value in parts.items()} | {"rest": 1 - sum(parts.values()) / total}


def bench_sample(args, problems, tokenizer, device, dtype):
    model, peer = load_model(args.model, device, dtype), peer_model(args, device, dtype)
    groups = {}

    def ours():
        groups["last"] = ours_sampled(args, model, problems, tokenizer)
        return sum(int(g.lengths.sum()) for g in groups["last"])
    median = compare(ours, lambda: peer_sampled(args, peer, problems, tokenizer, device), args.rounds, device,
                     f"sample {len(problems)} x {args.group_size} x {args.max_new_tokens} {dtype}")
    tokens = sum(int(g.lengths.sum()) for g in groups["last"])
    share = bound(model, groups["last"]) / (tokens / median["ours"])
    print(f"\nthe bare matrix products, each step at its number of rows, would take {share:.0%} of our time")
    if device.type == "cpu":
        print("where our time goes: " + ", ".join(f"{name} {value:.0%}" for name, value in where_time_goes(ours).items()))


# ---------------------------------------------------------------------------------------------------------------------
# Update

def items_of(groups):
    """The groups with made-up rewards, so that each has contrast: what is timed does not depend on them."""
    items = []
    for g in groups:
        rewards = torch.zeros(len(g.lengths))
        rewards[0] = 1
        items.append(train.Item(None, g, train.group_advantages(rewards)))
    return items


def ours_updated(args, compute, items):
    rows, tokens = sum(len(i.group.lengths) for i in items), sum(int(i.group.lengths.sum()) for i in items)
    config = train.Config(max_new_tokens=args.max_new_tokens, rows_per_pass=args.rows_per_pass)
    for batch in train.passes(items, config):
        train.backward(compute, batch, ALGORITHMS["gcpo"], config, rows, tokens)
    return tokens


def peer_updated(model, items, device):
    """The plain way: prompt and response of every row as one padded sequence, all logits at once, group by group."""
    rows = sum(len(i.group.lengths) for i in items)
    for item in items:
        g, P = item.group, len(item.group.prompt)
        full = torch.cat([g.prompt.expand(len(g.lengths), -1), g.responses], dim=1).to(device)
        attention = torch.cat([torch.ones(len(g.lengths), P, dtype=torch.bool), g.mask], dim=1).to(device)
        logits = model(input_ids=full, attention_mask=attention, use_cache=False).logits[:, P - 1:-1].float()
        logprobs = logits.log_softmax(-1).gather(-1, full[:, P:, None])[..., 0]                  # (G, T)
        mask, lengths = g.mask.to(device), g.lengths.to(device)
        ratio = (torch.where(mask, logprobs - logprobs.detach(), 0.0).sum(1) / lengths).exp()    # GSPO's, 1 here
        (-(ratio * item.advantages.to(device)).sum() / rows).backward()
    return sum(int(i.group.lengths.sum()) for i in items)


def bench_update(args, problems, tokenizer, device, dtype):
    model, peer = load_model(args.model, device), peer_model(args, device, dtype)
    compute = train.compute_copy(model, dtype)
    items = items_of(ours_sampled(args, compute, problems, tokenizer))

    def fresh(f, *models):
        def run():
            for m in models:
                m.zero_grad(set_to_none=True)
            return f()
        return run
    compare(fresh(lambda: ours_updated(args, compute, items), model), fresh(lambda: peer_updated(peer, items, device), peer), args.rounds, device,
            f"update {len(items)} x {args.group_size} x {args.max_new_tokens} {dtype}")
    ours = torch.cat([p.grad.flatten() for p in model.parameters()])
    named = dict(peer.named_parameters())
    theirs = torch.cat([named[n if n.startswith("lm_head") else f"model.{n}"].grad.float().flatten() for n, _ in model.named_parameters()])
    print(f"\nthe two gradients differ by {float((ours - theirs).norm() / theirs.norm()):.1e} of their norm (rounding: try --dtype float32)")


# ---------------------------------------------------------------------------------------------------------------------
# Memory

def bench_memory(args, argv):
    """Peak resident memory of one update, ours and the peer's, each in a process of its own that does nothing else."""
    peaks = {}
    for who in ("ours", "peer"):
        done = subprocess.run([sys.executable, __file__, *argv, "--child", who], capture_output=True, text=True)
        if done.returncode:
            raise InputError(f"the measuring process failed: {done.stderr.strip().splitlines()[-1:]}")
        peaks[who] = json.loads(done.stdout.splitlines()[-1])
        print(f"{who:8} {peaks[who]['peak'] / 2**30:6.2f} GiB peak, {peaks[who]['idle'] / 2**30:5.2f} GiB with the model loaded")
        print(json.dumps({"bench": "memory", "who": who, **peaks[who]}), file=sys.stderr)
    above = {who: p["peak"] - p["idle"] for who, p in peaks.items()}
    print(f"memory of the update itself: {above['ours'] / above['peer']:.2f} x the peer's")


def memory_child(args, problems, tokenizer, device, dtype):
    """One update on made-up responses of full length. Both sides: weights in the compute dtype, gradients, no optimizer."""
    generator = torch.Generator().manual_seed(0)
    model = load_model(args.model, device, dtype) if args.child == "ours" else peer_model(args, device, dtype)
    idle, (G, T) = train.peak_bytes(device), (args.group_size, args.max_new_tokens)
    items = items_of([sampler.Group(p.prompt, torch.randint(0, model.config.vocab_size, (G, T), generator=generator), torch.full((G,), T), torch.ones(G, dtype=torch.bool),
                                    torch.zeros(G, T), torch.zeros(G, dtype=torch.bool), torch.zeros(G), torch.zeros(G, dtype=torch.bool)) for p in problems])
    ours_updated(args, model, items) if args.child == "ours" else peer_updated(model, items, device)
    print(json.dumps({"peak": train.peak_bytes(device), "idle": idle}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("sample", "update", "memory"))
    parser.add_argument("--model", required=True, help="Hugging Face model folder")
    parser.add_argument("--data", required=True, help="problems whose prompts are used")
    parser.add_argument("--prompts", type=int, default=8, help="the first so many problems")
    parser.add_argument("--group-size", type=int, default=8, help="G, responses per prompt")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="longest response")
    parser.add_argument("--rows", type=int, default=None, help="our rows in flight (default: what fits)")
    parser.add_argument("--rows-per-pass", type=int, default=0, help="our rows in one backward pass (0: a group)")
    parser.add_argument("--rounds", type=int, default=3, help="times each side runs")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--child", choices=("ours", "peer"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    keep_freed_memory()
    if args.what == "memory" and not args.child:
        return bench_memory(args, sys.argv[1:])
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    tokenizer = load_tokenizer(args.model)
    problems = read_problems(args.data)[:args.prompts]
    prepare(problems, tokenizer, args.max_new_tokens, 10**9)
    run = {"sample": bench_sample, "update": bench_update, "memory": memory_child}[args.what]
    run(args, problems, tokenizer, device, dtype)


if __name__ == "__main__":
    exit_cleanly(main)
