"""Speed and memory, side by side with a peer in one run: the one place where they are measured.

    python bench.py sample --model DIR --data FILE              sampling, against transformers' generate
    python bench.py update --model DIR --data FILE              forward and backward of an update, against full padded sequences
    python bench.py step   --model DIR --data FILE --peer trl   whole training steps, against TRL's GRPOTrainer
    python bench.py memory --model DIR --data FILE              peak memory of one update of full-length responses
    python bench.py grow                                        how cost grows with G, response length, rows, and model size

Machines are shared and noisy: each side is a process of its own, the two take turns, `--rounds` times, and ratios of
medians come first. Tokens are useful ones: a row's tokens up to its end, never what comes after. Every row of a table is
one JSON line on stderr as well. The peers are optional: pip install transformers, pip install trl.
"""
import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile, record_function

import sampler
import train
from data import load_tokenizer, prepare, read_problems
from gcpo import ALGORITHMS, Group
from model import Transformer, load_model, read_config, save_model
from sampler import sample
from support.common import InputError, exit_cleanly, pick_device, pick_dtype
from support.cpu import keep_freed_memory


SHAPES = {  # of random weights; names say whose shape it is
    "SmolLM2-135M": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, vocab_size=49152),
    "SmolLM2-360M": dict(hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15, num_key_value_heads=5, vocab_size=49152),
    "Qwen2.5-0.5B": dict(model_type="qwen2", hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
                         vocab_size=151936),
    "Qwen2.5-1.5B": dict(model_type="qwen2", hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
                         vocab_size=151936),
}


# ---------------------------------------------------------------------------------------------------------------------
# Two processes that take turns

def timed(f, device):
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    result = f()
    wait()
    return result, time.perf_counter() - began


class Side:
    """A child process that runs one round of its side of a comparison whenever it is told to."""
    def __init__(self, argv, who):
        self.who, self.rounds = who, []
        self.process = subprocess.Popen([sys.executable, __file__, *argv, "--child", who], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.idle = self.read()["idle"]

    def read(self):
        line = self.process.stdout.readline()
        while line and not line.startswith("BENCH "):  # libraries print
            line = self.process.stdout.readline()
        if not line:
            raise InputError(f"the measuring process ({self.who}) ended with status {self.process.wait()}; what it said stands above")
        return json.loads(line.removeprefix("BENCH "))

    def ask(self, word):
        try:
            self.process.stdin.write(word + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        return self.read()

    def go(self):
        self.rounds.append(self.ask("go"))
        print(f"  {self.who}: {self.rounds[-1]['tokens']} tokens, {self.rounds[-1]['seconds']:.2f} s", file=sys.stderr)

    @property
    def speeds(self):
        return [r["tokens"] / r["seconds"] for r in self.rounds]

    @property
    def peak(self):
        return max(r["peak"] for r in self.rounds)

    def end(self):
        report = self.ask("report")
        self.process.stdin.close()
        self.process.wait()
        return report


def compare(args, argv):
    """Both sides in turn; prints ratios first, then the table."""
    with tempfile.TemporaryDirectory() as folder:
        argv = [*argv, "--shared", folder]
        sides = [Side(argv, "ours"), Side(argv, args.peer)]
        for _ in range(args.rounds):
            for side in sides:
                side.go()
        ours, peer = sides
        median = {side: statistics.median(side.speeds) for side in sides}
        speed, memory = median[ours] / median[peer], ours.peak / peer.peak
        what = f"{args.what} {args.prompts} x {args.group_size} x {args.max_new_tokens}, {args.device}, {args.dtype}"
        print(f"\n{what}: {speed:.2f} x the tokens/s of {args.peer}, at {memory:.0%} of its peak memory")
        print(f"{'':14}{'tokens/s':>10}{'lowest':>10}{'highest':>10}{'seconds':>10}{'GiB peak':>10}{'GiB idle':>10}")
        for side in sides:
            seconds = statistics.median(r["seconds"] for r in side.rounds)
            print(f"{side.who:14}{median[side]:10.0f}{min(side.speeds):10.0f}{max(side.speeds):10.0f}{seconds:10.2f}{side.peak / 2**30:10.2f}{side.idle / 2**30:10.2f}")
            print(json.dumps({"bench": what, "who": side.who, "tokens_per_second": median[side], "all": side.speeds, "seconds": seconds, "peak": side.peak,
                              "ratio": speed, "memory_ratio": memory, "torch": torch.__version__, "threads": torch.get_num_threads()}), file=sys.stderr)
        for side in sides:
            for line in side.end()["report"]:
                print(line)
        if args.what == "update":
            a, b = (load_file(os.path.join(folder, f"{side.who}.safetensors"))["gradient"] for side in sides)
            print(f"the two gradients differ by {float((a - b).norm() / b.norm()):.1e} of their norm")


def child(args):
    """Run rounds when told to, over stdin and stdout."""
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    say = lambda **record: print("\nBENCH " + json.dumps(record), flush=True)

    def rounds():
        """One word at a time, until "report"."""
        say(idle=train.peak_bytes(device))
        for word in sys.stdin:
            if word.strip() == "report":
                return
            yield
    if args.what == "step":
        steps, report = rounds(), lambda: []
        (our_steps if args.child == "ours" else trl_steps)(args, device, dtype, steps, lambda tokens, seconds: say(tokens=tokens, seconds=seconds, peak=train.peak_bytes(device)))
    else:
        run, report = {"sample": sampling, "update": updating, "memory": updating}[args.what](args, device, dtype)
        for _ in rounds():
            tokens, seconds = timed(run, device)
            say(tokens=tokens, seconds=seconds, peak=train.peak_bytes(device))
    say(report=report())


def peer_model(args, device, dtype):
    try:
        import transformers
    except ImportError:
        raise InputError("this compares with transformers: pip install transformers") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device)


def random_model(name):
    """A model folder of this shape, with random weights. The caller removes it."""
    folder = tempfile.mkdtemp()
    config = {"model_type": "llama", "max_position_embeddings": 32768, "tie_word_embeddings": True, "rms_norm_eps": 1e-5, **SHAPES[name]}
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(config, f)
    save_model(Transformer(read_config(folder)).init_weights(torch.Generator().manual_seed(0)).bfloat16(), os.path.join(folder, "model"))
    return os.path.join(folder, "model")


def prompts_of(args):
    tokenizer = load_tokenizer(args.model)
    problems = read_problems(args.data)[:args.prompts]
    prepare(problems, tokenizer, args.max_new_tokens, 10**9)
    return tokenizer, [p.prompt for p in problems]


def made_up(prompts, group_size, length, vocabulary):
    """Groups of random tokens, all of full length."""
    draw = lambda *size: torch.randint(0, vocabulary, size, generator=torch.Generator().manual_seed(0))
    no = torch.zeros(group_size, dtype=torch.bool)
    return [Group(p, draw(group_size, length), torch.full((group_size,), length), ~no, torch.zeros(group_size, length), no, torch.zeros(group_size), no)
            for p in prompts]


# ---------------------------------------------------------------------------------------------------------------------
# Sampling

def sampling(args, device, dtype):
    tokenizer, prompts = prompts_of(args)
    if args.child == "ours":
        model, groups = load_model(args.model, device, dtype), []

        def run():
            groups[:] = sample(model, prompts, args.group_size, args.max_new_tokens, stop_ids=tokenizer.stop_ids, seed=0, max_rows=args.rows or None)
            return sum(int(g.lengths.sum()) for g in groups)

        def report():
            seconds = timed(run, device)[1]
            lines = [f"the bare matrix products of our rollouts, each step at its number of rows, would take {bound(model, groups) / seconds:.0%} of our time"]
            if device.type == "cpu":
                lines += ["where our time goes: " + ", ".join(f"{name} {value:.0%}" for name, value in where_time_goes(run).items())]
            return lines
        return run, report

    model = peer_model(args, device, dtype)
    width = max(len(p) for p in prompts)
    ids = torch.stack([F.pad(p, (width - len(p), 0), value=tokenizer.end_id) for p in prompts]).to(device)  # padded on the left
    mask = torch.stack([F.pad(torch.ones_like(p), (width - len(p), 0)) for p in prompts]).to(device)

    def run():
        out = model.generate(input_ids=ids.repeat_interleave(args.group_size, 0), attention_mask=mask.repeat_interleave(args.group_size, 0), do_sample=True,
                             temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=args.max_new_tokens, eos_token_id=tokenizer.stop_ids, pad_token_id=tokenizer.end_id)
        ended = torch.isin(out[:, width:], torch.tensor(tokenizer.stop_ids, device=device)).int()
        return int((ended.cumsum(1) - ended == 0).sum())  # up to the first end token, and it too
    return run, lambda: []


def bare_products(model, rows, repeats=5):
    """Seconds of one decoding step's matrix products alone, for so many rows, with PyTorch's plain F.linear."""
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
    known = sorted({max(1, round(max(alive) * share)) for share in (1, 0.75, 0.5, 0.25, 0.1, 0.02)} | {min(alive)})
    cost = {rows: bare_products(model, rows) for rows in known}

    def interpolated(rows):
        above, below = min(k for k in known if k >= rows), max(k for k in known if k <= rows)
        weight = 0 if above == below else (rows - below) / (above - below)
        return cost[below] * (1 - weight) + cost[above] * weight
    return sum(interpolated(rows) for rows in alive) + bare_products(model, sum(len(g.prompt) for g in groups))


@contextlib.contextmanager
def named_parts():
    """Attention and token choice as named ranges of the profiler."""
    forward, choose = Transformer.forward, sampler.choose_token

    def named(f, name):
        def wrapped(*args, **kwargs):
            with record_function(name):
                return f(*args, **kwargs)
        return wrapped
    Transformer.forward = lambda self, tokens, attend=None, positions=None: forward(self, tokens, attend and named(attend, "PART attention"), positions)
    sampler.choose_token = named(choose, "PART choosing tokens")
    try:
        yield
    finally:
        Transformer.forward, sampler.choose_token = forward, choose


def where_time_goes(run):
    """Shares of the CPU time of run(): products, attention, choice of tokens, the rest."""
    with named_parts(), profile(activities=[ProfilerActivity.CPU]) as prof:
        run()
    events = {e.key: e for e in prof.key_averages()}
    total = sum(e.self_cpu_time_total for e in events.values())
    parts = {"products": sum(e.self_cpu_time_total for k, e in events.items() if k in ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise"))}
    parts |= {k.removeprefix("PART "): e.cpu_time_total for k, e in events.items() if k.startswith("PART ")}
    return {name: value / total for name, value in parts.items()} | {"rest": 1 - sum(parts.values()) / total}


# ---------------------------------------------------------------------------------------------------------------------
# Update

def groups_for(args, device, dtype):
    """What both sides update on: sampled by our side and left for the other; made up where only memory is asked."""
    tokenizer, prompts = prompts_of(args)
    if args.what == "memory":
        return made_up(prompts, args.group_size, args.max_new_tokens, read_config(args.model).vocab_size)
    path = os.path.join(args.shared, "groups.safetensors")
    if not os.path.exists(path):
        groups = sample(load_model(args.model, device, dtype), prompts, args.group_size, args.max_new_tokens, stop_ids=tokenizer.stop_ids, seed=0)
        save_file({f"{i}.{name}": getattr(g, name) for i, g in enumerate(groups) for name in Group.__dataclass_fields__}, path)
    columns = load_file(path)
    return [Group(*(columns[f"{i}.{name}"] for name in Group.__dataclass_fields__)) for i in range(len(prompts))]


def updating(args, device, dtype):
    """Rewards are made up so that each group has contrast: what is timed does not depend on them."""
    items = []
    for group in groups_for(args, device, dtype):
        rewards = torch.zeros(len(group.lengths))
        rewards[0] = 1
        items.append(train.Item(0, None, group, train.group_advantages(rewards)))
    rows, tokens = sum(len(i.group.lengths) for i in items), sum(int(i.group.lengths.sum()) for i in items)
    if args.child == "ours":
        model = load_model(args.model, device)
        compute = train.make_policy(model, dtype)
        compute.gradient_checkpointing = args.gradient_checkpointing
        config = train.Config(max_new_tokens=args.max_new_tokens, rows_per_pass=args.rows_per_pass)

        def run():
            model.zero_grad(set_to_none=True)
            for batch in train.passes(items, config):
                train.backward(compute, batch, ALGORITHMS["gcpo"], config, rows, tokens)
            return tokens
        gradient = lambda: [(n, p.grad) for n, p in model.named_parameters()]
    else:
        model = peer_model(args, device, dtype)

        def run():
            """The plain way: prompt and response of every row as one padded sequence, all logits at once, group by group."""
            model.zero_grad(set_to_none=True)
            for item in items:
                g, P = item.group, len(item.group.prompt)
                full = torch.cat([g.prompt.expand(len(g.lengths), -1), g.responses], dim=1).to(device)
                attention = torch.cat([torch.ones(len(g.lengths), P, dtype=torch.bool), g.mask], dim=1).to(device)
                logits = model(input_ids=full, attention_mask=attention, use_cache=False).logits[:, P - 1:-1].float()
                logprobs = logits.log_softmax(-1).gather(-1, full[:, P:, None])[..., 0]                  # (G, T)
                mask, lengths = g.mask.to(device), g.lengths.to(device)
                ratio = (torch.where(mask, logprobs - logprobs.detach(), 0.0).sum(1) / lengths).exp()    # GSPO's, 1 here
                (-(ratio * item.advantages.to(device)).sum() / rows).backward()
            return tokens
        gradient = lambda: [(n.removeprefix("model."), p.grad) for n, p in model.named_parameters()]

    def report():
        if args.what == "update":
            flat = torch.cat([g.float().flatten().cpu() for _, g in sorted(gradient(), key=lambda named: named[0])])
            save_file({"gradient": flat}, os.path.join(args.shared, f"{args.child}.safetensors"))
        return []
    return run, report


# ---------------------------------------------------------------------------------------------------------------------
# Whole steps

def our_steps(args, device, dtype, rounds, say):
    """`train.train` itself; a step ends when it writes its metrics."""
    config = train.Config(model=args.model, data=args.data, prompts=args.prompts, group_size=args.group_size, max_new_tokens=args.max_new_tokens,
                          steps=10**6, rows=args.rows, rows_per_pass=args.rows_per_pass, out=args.shared)
    algorithm = ALGORITHMS["gcpo"]
    _, problems, _, _, tokenizer, model = train.read_all(config, algorithm, device)
    draw = random.Random(0)
    reward = lambda *_: draw.random()       # so that each group has contrast, as the peer's have

    class Enough(Exception):
        pass

    def log(kind, record):
        if kind == "metrics" and record["step"]:
            say(round(record["time/tokens_per_second"] * (record["time/sample"] + record["time/update"])), record["time/sample"] + record["time/update"])
        if kind == "samples" or not record["step"]:
            if next(rounds, "no more") == "no more":
                raise Enough
    with contextlib.suppress(Enough):
        train.train(config, algorithm, model, train.make_policy(model, dtype), tokenizer, problems, [], reward, log)


def trl_steps(args, device, dtype, rounds, say):
    """TRL's GRPOTrainer, with micro-batches of one group."""
    try:
        import datasets
        import transformers
        import trl
    except ImportError:
        raise InputError("this compares with TRL: pip install trl") from None
    torch.manual_seed(0)
    tokenizer, prompts = prompts_of(replace_prompts(args, args.prompts * (args.rounds + 1)))
    generator = torch.Generator().manual_seed(0)
    tokens = []

    def reward(completions, completion_ids, **_):
        tokens.append(sum(len(ids) for ids in completion_ids))
        return torch.rand(len(completions), generator=generator).tolist()   # so that each group has contrast

    class TakeTurns(transformers.TrainerCallback):
        def on_step_begin(self, arguments, state, control, **_):
            if next(rounds, "no more") == "no more":
                control.should_training_stop = True
            self.began = time.perf_counter()

        def on_step_end(self, arguments, state, control, **_):
            say(sum(tokens), time.perf_counter() - self.began)
            tokens.clear()
            if state.global_step == args.rounds:
                next(rounds, None)
    with tempfile.TemporaryDirectory() as folder:
        settings = trl.GRPOConfig(
            output_dir=folder, per_device_train_batch_size=args.group_size, gradient_accumulation_steps=args.prompts, num_generations=args.group_size,
            max_completion_length=args.max_new_tokens, temperature=1.0, beta=0.0, learning_rate=1e-5, bf16=dtype == torch.bfloat16, use_cpu=device.type == "cpu",
            max_steps=args.rounds, save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=10**6, gradient_checkpointing=False,
            model_init_kwargs={"dtype": "float32"})
        data = datasets.Dataset.from_list([{"prompt": tokenizer.decode(p.tolist())} for p in prompts])
        trl.GRPOTrainer(model=args.model, reward_funcs=reward, args=settings, train_dataset=data, callbacks=[TakeTurns()]).train()


def replace_prompts(args, prompts):
    return argparse.Namespace(**{**vars(args), "prompts": prompts})


# ---------------------------------------------------------------------------------------------------------------------
# How cost grows

def grow(args, argv):
    """Sampling and update of made-up groups, ours alone, one setting at a time and each in a process of its own."""
    base = dict(shape="SmolLM2-135M", prompts=1, group_size=8, max_new_tokens=200, rows=0, rows_per_pass=8)
    tables = {
        "group size G": [dict(group_size=g) for g in (4, 8, 16, 32)],
        "rows of a pass, G = 32": [dict(group_size=32, rows_per_pass=r) for r in (32, 16, 8, 4)],
        "response length": [dict(max_new_tokens=t) for t in (100, 200, 400, 800)],
        "rows in flight, 16 prompts": [dict(prompts=16, rows=r, max_new_tokens=100, update=False) for r in (8, 16, 32, 64, 128)],
        "model": [dict(shape=s) for s in list(SHAPES)[:3]],
    }
    for name, settings in tables.items():
        print(f"\n{name:28}{'sample s':>10}{'tokens/s':>10}{'update s':>10}{'tokens/s':>10}{'GiB idle':>10}{'GiB peak':>10}")
        for setting in settings:
            flags = {**base, **setting}
            words = [x for k, v in flags.items() if k != "update" for x in ("--" + k.replace("_", "-"), str(v))] + ["--no-update"] * (not flags.get("update", True))
            done = subprocess.run([sys.executable, __file__, *argv, *words, "--child", "ours"], stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise InputError(f"the measuring process ended with status {done.returncode}; what it said stands above")
            r = json.loads(done.stdout.splitlines()[-1])
            label = ", ".join(f"{v}" for k, v in setting.items() if k != "update" and (len(setting) == 1 or k in ("rows", "rows_per_pass")))
            number = lambda x, digits: "-".rjust(10) if x is None else f"{x:10.{digits}f}"
            speed = lambda seconds: seconds and r["tokens"] / seconds
            print(f"{label:28}{number(r['sample'], 2)}{number(speed(r['sample']), 0)}{number(r['update'], 2)}{number(speed(r['update']), 0)}"
                  f"{number(r['idle'] / 2**30, 2)}{number(r['peak'] / 2**30, 2)}", flush=True)
            print(json.dumps({"bench": f"grow: {name}", **flags, **r}), file=sys.stderr)


def grow_child(args):
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    folder = args.model or random_model(args.shape)
    model = load_model(folder, device)
    compute = train.make_policy(model, dtype)
    if not args.model:
        os.remove(os.path.join(folder, "model.safetensors"))
    V, idle = model.config.vocab_size, train.peak_bytes(device)
    prompts = [torch.randint(0, V, (110,), generator=torch.Generator().manual_seed(i)) for i in range(args.prompts)]
    tokens = args.prompts * args.group_size * args.max_new_tokens
    run = lambda: sample(compute, prompts, args.group_size, args.max_new_tokens, stop_ids=[], seed=0, max_rows=args.rows or None)
    sampled = min(timed(run, device)[1] for _ in range(args.rounds))
    updated = None
    if not args.no_update:
        groups = made_up(prompts, args.group_size, args.max_new_tokens, V)
        advantages = train.group_advantages(torch.arange(args.group_size))
        config = train.Config(max_new_tokens=args.max_new_tokens, rows_per_pass=args.rows_per_pass)
        run = lambda: train.backward(compute, [train.Item(0, None, g, advantages) for g in groups], ALGORITHMS["gcpo"], config, args.group_size, tokens)
        updated = min(timed(run, device)[1] for _ in range(args.rounds))
    print(json.dumps({"tokens": tokens, "sample": sampled, "update": updated, "idle": idle, "peak": train.peak_bytes(device)}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("sample", "update", "step", "memory", "grow"))
    parser.add_argument("--model", help="Hugging Face model folder (grow: random weights without)")
    parser.add_argument("--data", help="problems whose prompts are used")
    parser.add_argument("--peer", choices=("transformers", "trl"), default=None, help="whom to compare with (default: transformers; trl for step)")
    parser.add_argument("--prompts", type=int, default=8, help="the first so many problems")
    parser.add_argument("--group-size", type=int, default=8, help="G, responses per prompt")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="longest response")
    parser.add_argument("--rows", type=int, default=0, help="our rows in flight (default: what fits)")
    parser.add_argument("--rows-per-pass", type=int, default=8, help="our rows in one backward pass")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="compute our activations again in backward")
    parser.add_argument("--rounds", type=int, default=3, help="times each side runs")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    for hidden in ("--child", "--shared", "--shape"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--no-update", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rounds < 1 or args.prompts < 1 or args.group_size < 2 or args.max_new_tokens < 1:
        raise InputError("--rounds, --prompts and --max-new-tokens must be 1 or more, --group-size 2 or more")
    args.peer = args.peer or ("trl" if args.what == "step" else "transformers")
    if (args.peer == "trl") != (args.what == "step"):
        raise InputError(f"--peer {args.peer}: TRL is the peer of `step`, transformers of the others")
    if args.what != "grow" and not (args.model and args.data):
        raise InputError(f"--{'data' if args.model else 'model'} is missing")
    if args.child == "ours":
        keep_freed_memory()
    if args.what == "grow":
        return grow_child(args) if args.child else grow(args, sys.argv[1:])
    return child(args) if args.child else compare(args, sys.argv[1:])


if __name__ == "__main__":
    exit_cleanly(main)
