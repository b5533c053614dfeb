"""Files that a run reads, mutated at random: none may end a program but with its one line.

    python tests/fuzz.py [--tries 10000] [--seed 0] [--only TARGET]

Each try spoils one file of a good folder and reads it as the programs do. The end must be success,
or status 2 with one line. A traceback, a death, over 10 seconds or over 6 GiB is a failure, and so
is an altered checkpoint that is believed. Prints a table, and every failure with how to repeat it.
"""
from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import asdict

import torch
from safetensors.torch import save_file

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import plot  # noqa: E402
from data import Limits, Notes, load_tokenizer, prepare, read_problems  # noqa: E402
from gcpo import ALGORITHMS, Algorithm  # noqa: E402
from model import Transformer, load_model, read_config  # noqa: E402
from support.checkpoint import (  # noqa: E402
    State, cut_log, digest_of, load_checkpoint, newest_checkpoint, refuse_changes, save_checkpoint,
    sha256)
from support.common import exit_cleanly  # noqa: E402
from support.options import Config  # noqa: E402
from support.toy import toy_tokenizer  # noqa: E402


SECONDS = 10
GIB = 6
SHAPE = dict(
    model_type="llama", vocab_size=64, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-5,
    rope_theta=10000.0, tie_word_embeddings=False)
TEMPLATE = ("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}"
            "{% if loop.last %}!{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}<a>{% endif %}")
PROBLEMS = [
    {"question": "tom has 3 3 3", "answer": "so 9\n#### 9"},
    {"problem": "ann has 4", "solution": r"it is \boxed{4}", "answer": "4"},
    {"question": "which", "choices": {"text": ["3", "4"], "label": ["A", "B"]}, "answerKey": "B"},
    {"prompt": [{"role": "user", "content": "5"}], "reward_model": {"ground_truth": "5"}},
]


# ---- A good folder -------------------------------------------------------------------------------

def build(folder: str) -> None:
    """A model, a file of problems, and the folder of a run with two checkpoints."""
    model_folder = os.path.join(folder, "model")
    os.makedirs(model_folder)
    tokenizer = toy_tokenizer([{"question": "tom ann has which 3 4", "answer": "so it is #### 9"}])
    write(folder, "model/config.json", json.dumps(SHAPE))
    write(folder, "model/tokenizer.json", tokenizer.to_str(pretty=True))
    write(folder, "model/chat_template.jinja", TEMPLATE)
    write(folder, "model/tokenizer_config.json", json.dumps(
        {"eos_token": "<end>", "pad_token": {"content": "<end>"}, "unk_token": "<unknown>"}))
    write(folder, "model/generation_config.json", json.dumps({"eos_token_id": [0]}))
    model = Transformer(read_config(model_folder)).init_weights(torch.Generator().manual_seed(0))
    tensors = {name if name.startswith("lm_head") else f"model.{name}": p.detach()
               for name, p in model.named_parameters()}
    save_file(tensors, os.path.join(model_folder, "model.safetensors"))
    shutil.copytree(model_folder, os.path.join(folder, "sharded"))
    os.rename(os.path.join(folder, "sharded", "model.safetensors"),
              os.path.join(folder, "sharded", "model-1.safetensors"))
    index = {"metadata": {}, "weight_map": {name: "model-1.safetensors" for name in tensors}}
    write(folder, "sharded/model.safetensors.index.json", json.dumps(index))
    write(folder, "data.jsonl", "".join(json.dumps(p) + "\n" for p in PROBLEMS))

    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for step in (1, 2):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        save_checkpoint(os.path.join(folder, "run"), model, optimizer, State(step=step),
                        model_folder, keep=2)
    settings = {"algorithm": asdict(ALGORITHMS["gcpo"]), "seed": 0, "lr": 1e-6}
    write(folder, "run/run.json", json.dumps({"settings": settings}))
    lines = [{"step": step, "reward/mean": 0.5, "eval/mean": 0.1} for step in range(3)]
    write(folder, "run/metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def write(folder: str, name: str, text: str) -> None:
    with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
        f.write(text)


# ---- How each file is read -----------------------------------------------------------------------

def read_model(folder: str) -> None:
    model = load_model(os.path.join(folder, "model"))
    model.logits(model(torch.tensor([[1, 2, 3]])))


def read_sharded(folder: str) -> None:
    load_model(os.path.join(folder, "sharded"))


def read_prompts(folder: str) -> None:
    tokenizer = load_tokenizer(os.path.join(folder, "model"))
    notes = Notes()
    problems = read_problems(os.path.join(folder, "data.jsonl"), notes=notes)
    for problem in prepare(problems, tokenizer, Limits(16, 512, 64), notes=notes):
        tokenizer.decode(problem.prompt)


def read_run(folder: str) -> None:
    settings = {"algorithm": asdict(ALGORITHMS["gcpo"]), "seed": 0, "lr": 1e-6}
    defaults = {**asdict(Algorithm("")), **asdict(Config())}
    refuse_changes(os.path.join(folder, "run"), settings, defaults)


def read_state(folder: str) -> None:
    """An altered state.json must never be believed."""
    newest = newest_checkpoint(os.path.join(folder, "run"))
    if newest is not None and newest.endswith("step-000002"):
        with open(os.path.join(newest, "state.json"), encoding="utf-8") as f:
            assert digest_of({**json.load(f), "digest": None}) == UNALTERED[0], "it is believed"


def read_optimizer(folder: str) -> None:
    """With checksums that fit, as a stranger would write them."""
    path = os.path.join(folder, "run", "checkpoints", "step-000002")
    with open(os.path.join(path, "state.json"), encoding="utf-8") as f:
        state = json.load(f)
    file = os.path.join(path, "optimizer.safetensors")
    state["files"]["optimizer.safetensors"] = [os.path.getsize(file), sha256(file)]
    del state["digest"]
    write(path, "state.json", json.dumps({**state, "digest": digest_of(state)}))
    assert newest_checkpoint(os.path.join(folder, "run")) == path
    model = Transformer(read_config(os.path.join(folder, "model")))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    load_checkpoint(path, model, optimizer)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def read_metrics(folder: str) -> None:
    rows = plot.read_run(os.path.join(folder, "run"))
    plot.curve(rows, "reward/mean", 9)
    plot.curve(rows, "eval/mean", 9)
    plot.elapsed(rows)


def read_log(folder: str) -> None:
    cut_log(os.path.join(folder, "run", "metrics.jsonl"), 1)


# name: file, how it is read, its share of the tries
TARGETS = {
    "config": ("model/config.json", read_model, 12),
    "tokenizer": ("model/tokenizer.json", read_prompts, 10),
    "tokenizer_config": ("model/tokenizer_config.json", read_prompts, 6),
    "generation_config": ("model/generation_config.json", read_prompts, 4),
    "template": ("model/chat_template.jinja", read_prompts, 6),
    "safetensors": ("model/model.safetensors", read_model, 12),
    "index": ("sharded/model.safetensors.index.json", read_sharded, 10),
    "data": ("data.jsonl", read_prompts, 10),
    "run": ("run/run.json", read_run, 6),
    "state": ("run/checkpoints/step-000002/state.json", read_state, 12),
    "optimizer": ("run/checkpoints/step-000002/optimizer.safetensors", read_optimizer, 12),
    "metrics": ("run/metrics.jsonl", read_metrics, 8),
    "log": ("run/metrics.jsonl", read_log, 4),
}
UNALTERED = []    # the digest of the good state.json


# ---- Mutations -----------------------------------------------------------------------------------

ODD = [
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 2**70, -2**63, 0.5, -0.5, 1e-300, 1e300,
    float("nan"), float("inf"), "", "a", "\ud800", "\0", "../x", "/dev/zero", "1" * 500, "é" * 50,
    "<end>", "nope", [], [None], [[[[]]]], [0, 1], {}, {"a": 1}, {"content": 3},
]
BYTES = [b"\0", b"\xff\xfe", b"{", b"}", b"[", b"]" * 3, b"[" * 5000, b'"', b"\\", b"\n", b"1e999",
         b"9" * 400, b"-", b"null", b"{{", b"}}", b"{%", b"%}", b" " * 2000, b"\xf0\x9f\x98\x80"]


def mutate(data: bytes, r: random.Random) -> bytes:
    """JSON by its structure half of the time; else by its bytes."""
    if r.random() < 0.6:
        try:
            lines = data.decode().splitlines() if b"}\n{" in data else [data.decode()]
            i = r.randrange(len(lines))
            value = json.loads(lines[i])
            for _ in range(r.choice([1, 1, 1, 2, 5])):
                value = mutated_value(value, r)
            lines[i] = json.dumps(value)
            return "\n".join(lines).encode("utf-8", "surrogatepass") + b"\n"
        except (ValueError, RecursionError):
            pass
    if data[8:9] == b"{" and r.random() < 0.5:    # the header of safetensors
        size = int.from_bytes(data[:8], "little")
        with contextlib.suppress(ValueError):
            header = json.dumps(mutated_value(json.loads(data[8:8 + size]), r)).encode()
            return len(header).to_bytes(8, "little") + header + data[8 + size:]
    for _ in range(r.choice([1, 1, 2, 4])):
        data = mutated_bytes(data, r)
    return data


def mutated_value(value, r: random.Random):
    """The value with one place in it changed."""
    if isinstance(value, dict) and value and r.random() < 0.9:
        value = dict(value)
        key = r.choice(sorted(value))
        action = r.random()
        if action < 0.15:
            del value[key]
        elif action < 0.2:
            value[str(r.choice(ODD))] = value[key]
        else:
            value[key] = mutated_value(value[key], r)
        return value
    if isinstance(value, list) and value and r.random() < 0.8:
        value = list(value)
        i = r.randrange(len(value))
        action = r.random()
        if action < 0.2:
            del value[i]
        elif action < 0.3:
            value.insert(i, r.choice(ODD))
        else:
            value[i] = mutated_value(value[i], r)
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool) and r.random() < 0.4:
        return r.choice([-value, value + 1, value * 2, value * 10**6, str(value), [value]])
    return r.choice(ODD)


def mutated_bytes(data: bytes, r: random.Random) -> bytes:
    a, b = sorted(r.randrange(len(data) + 1) for _ in range(2))
    b = min(b, a + 40)
    action = r.randrange(5)
    if action == 0:
        return data[:a]
    if action == 1:
        return data[:a] + data[b:]
    if action == 2:
        return data[:a] + r.choice(BYTES) + data[a:]
    if action == 3:
        return data[:b] + data[a:b] * r.choice([1, 2, 50]) + data[b:]
    return data[:a] + bytes(r.randrange(256) for _ in data[a:b]) + data[b:]


# ---- A try ---------------------------------------------------------------------------------------

def end_of(read, folder: str) -> tuple[str, str]:
    """("accepted" or "refused", the line); or ("failed", what happened)."""
    said = io.StringIO()
    status = None
    began = time.monotonic()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            stderr = sys.stderr
            try:
                exit_cleanly(lambda: read(folder))
            except SystemExit as e:
                status = e.code
            finally:
                sys.stderr = stderr
    except BaseException:
        return "failed", traceback.format_exc(limit=-4)
    seconds = time.monotonic() - began
    lines = [line for line in said.getvalue().splitlines() if not line.startswith("warning: ")]
    if seconds > SECONDS:
        return "failed", f"took {seconds:.0f} s"
    if status == 0:
        return "accepted", ""
    if status != 2 or len(lines) != 1 or not lines[0].startswith("error: "):
        return "failed", f"status {status}, {said.getvalue()[:500]!r}"
    return "refused", lines[0]


def run(tries: int, seed: int, only: str | None = None) -> dict[str, Counter]:
    """How the tries ended, by target. Failures are printed."""
    ends = {name: Counter() for name in TARGETS if only in (None, name)}
    weights = [TARGETS[name][2] for name in ends]
    with tempfile.TemporaryDirectory() as folder:
        good = os.path.join(folder, "good")
        build(good)
        with open(os.path.join(good, TARGETS["state"][0]), encoding="utf-8") as f:
            UNALTERED[:] = [digest_of({**json.load(f), "digest": None})]
        work = shutil.copytree(good, os.path.join(folder, "work"))
        for number in range(tries):
            r = random.Random(f"{seed}/{number}")
            [name] = r.choices(list(ends), weights)
            file, read, _ = TARGETS[name]
            with open(os.path.join(good, file), "rb") as f:
                data = f.read()
            with open(os.path.join(work, file), "wb") as f:
                f.write(mutate(data, r))
            faulthandler.dump_traceback_later(6 * SECONDS, exit=True)    # what no exception ends
            end, why = end_of(read, work)
            faulthandler.cancel_dump_traceback_later()
            ends[name][end] += 1
            if end == "failed":
                print(f"FAILED {name}, try {number} of --seed {seed}: {why}", flush=True)
                sys.stdout.flush()
            shutil.copyfile(os.path.join(good, file), os.path.join(work, file))
            if name == "optimizer":
                state = TARGETS["state"][0]
                shutil.copyfile(os.path.join(good, state), os.path.join(work, state))
    return ends


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tries", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=TARGETS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (GIB * 2**30, GIB * 2**30))
    ends = run(args.tries, args.seed, args.only)
    print(f"{'file':<20}{'tries':>8}{'refused':>9}{'accepted':>10}{'failed':>8}")
    total = Counter()
    for name, counts in ends.items():
        total += counts
        print(f"{name:<20}{counts.total():>8}{counts['refused']:>9}{counts['accepted']:>10}"
              f"{counts['failed']:>8}")
    print(f"{'all':<20}{total.total():>8}{total['refused']:>9}{total['accepted']:>10}"
          f"{total['failed']:>8}")
    sys.exit(bool(total["failed"]))


if __name__ == "__main__":
    main()
