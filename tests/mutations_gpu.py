"""Bugs that only a GPU shows, put into a copy of the repository one at a time: does
test_pretended_gpu.py catch each?

    python tests/mutations_gpu.py [WORDS]      all, or those whose description has these words
"""
import os
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple


ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TEST = os.path.join("tests", "test_pretended_gpu.py")


class Bug(NamedTuple):
    what: str
    file: str
    old: str    # stands there once
    new: str


def left_on_the_cpu(column, part="[part]"):
    return Bug(
        f"{column} of an update left on the CPU", "support/batches.py",
        "batches.append(Rows(*columns))",
        f"batches.append(Rows(*columns)._replace({column}=rows.{column}{part}))")


BUGS = [
    # A step that is recorded
    Bug("an index on the CPU in a decode step", "sampler.py",
        "step = Step(torch.arange(N, device=self.device), at, prompt_length, cell, B)",
        "step = Step(torch.arange(N), at, prompt_length, cell, B)"),
    Bug("an .item() in a step", "sampler.py",
        "        at = self.length[:N] - 1\n",
        "        at = self.length[:N] - (1 if self.length.min().item() >= 0 else 0)\n"),
    Bug("an index by mask in a step", "sampler.py",
        "self.finished[rows] |= (token[:, None] == self.stop_ids).any(1)",
        "self.finished[index[(token[:, None] == self.stop_ids).any(1)]] = True"),
    Bug("a tensor made from a list of the host in a step", "sampler.py",
        "prompt_length = self.prompt_length[cell // self.size.group] ",
        "prompt_length = torch.tensor(self.seat_lengths + [0] * 99, device=self.device)"
        "[cell // self.size.group] "),
    Bug("a tensor rebound in a step", "sampler.py",
        "self.length[rows] += 1",
        "self.length = self.length.index_add(0, index, torch.ones_like(index))"),
    Bug("frequencies not kept, so copied in each step", "model.py",
        "@functools.lru_cache(maxsize=8)", "@functools.lru_cache(maxsize=0)"),
    Bug("frequencies left on the CPU", "model.py", "return freq.to(device)", "return freq"),
    Bug("stop tokens left on the CPU", "sampler.py",
        "torch.tensor(sorted(sampling.stop_ids), dtype=torch.int64, device=device)",
        "torch.tensor(sorted(sampling.stop_ids), dtype=torch.int64)"),
    Bug("a mask made on the CPU in a step", "support/caches.py",
        "mask = torch.zeros(absent.shape, device=device)", "mask = torch.zeros(absent.shape)"),

    # What is recorded and replayed
    Bug("caches that move while recordings read them", "sampler.py",
        "if not self.recorder:\n            self.caches", "if True:\n            self.caches"),
    Bug("a grid of only the seats taken, recorded", "sampler.py",
        "B = self.size.seats if self.recorder else len(self.alive_in)", "B = len(self.alive_in)"),
    Bug("a step that is recorded, and not run", "support/gpu.py",
        "            self.graphs[size] = graph\n",
        "            self.graphs[size] = graph\n            return\n"),
    Bug("a step that is run and recorded, and so run twice", "support/gpu.py",
        "            self.graphs[size] = None\n            return\n",
        "            self.graphs[size] = None\n"),

    # FlashAttention
    Bug("a row reads one key too few", "support/gpu.py",
        "used = (column + 1).int()", "used = column.int()"),
    Bug("a row's end in int64", "support/gpu.py", "used = (column + 1).int()", "used = column + 1"),
    Bug("where rows begin, in int64", "support/gpu.py",
        "Spans(F.pad(lengths.cumsum(0), (1, 0)).int(),", "Spans(F.pad(lengths.cumsum(0), (1, 0)),"),
    Bug("caches that stay where their rows were", "support/gpu.py",
        "cache[to] = cache[source]", "pass"),
    Bug("prompts laid out place by place, not seat by seat", "support/gpu.py",
        "x.transpose(1, 2).repeat_interleave(self.G, dim=0)",
        "x.transpose(1, 2).repeat(self.G, 1, 1, 1)"),
    Bug("a row's own keys begin one too late", "support/gpu.py",
        "own = own_at[row] + column - before[row]",
        "own = (own_at[row] + column - before[row] + 1).clamp(max=own_at.max())"),
    Bug("a row reads the first prompt, not its own", "support/gpu.py",
        "torch.cat([nothing, own_at[prompt_of]]), own_at)",
        "torch.cat([nothing, own_at[prompt_of] * 0]), own_at)"),
    Bug("the kernel asked for a longest row that is too short", "support/gpu.py",
        "max(lengths.tolist(), default=0))", "max(lengths.tolist(), default=0) - 1)"),

    # Rows that fill up the batch
    Bug("rows not alive run past the cache", "sampler.py",
        "self.length[len(self.rows):] = 1", "pass"),
    Bug("seats of rows not alive beyond the last", "support/caches.py",
        "seat = (cell // G).clamp(max=B - 1)", "seat = cell // G"),
    Bug("cells of rows that left are kept", "sampler.py",
        "self.cell[N:] = self.size.seats * self.size.group", "pass"),
    Bug("what a row says after its stop token is kept", "sampler.py",
        "length = int(stops[0]) + 1 if len(stops) else count", "length = count"),
    Bug("a row's tokens are read without a copy to the host", "sampler.py",
        'batch.tokens[row, :count].to("cpu", copy=True)', "batch.tokens[row, :count].clone()"),

    # Scoring and updates
    left_on_the_cpu("prompt_of"),
    left_on_the_cpu("responses", "[part, :T]"),
    left_on_the_cpu("lengths"),
    left_on_the_cpu("mask", "[part, :T]"),
    left_on_the_cpu("is_gold"),
    left_on_the_cpu("advantages"),
    left_on_the_cpu("logprobs", "[part, :T]"),
    Bug("prompts left on the CPU when they run apart", "logprobs.py",
        "tokens = torch.cat(prompts).to(model.device)", "tokens = torch.cat(prompts)"),
    Bug("prompts left on the CPU in a single pass", "logprobs.py",
        "torch.cat([*(p.to(tokens.device) for p in prompts), tokens])",
        "torch.cat([*prompts, tokens])"),
    Bug("the columns of first tokens on the CPU", "logprobs.py",
        "torch.cat([torch.zeros_like(prompt_of), inputs.columns + 1])",
        "torch.cat([torch.zeros(N, dtype=torch.int64), inputs.columns + 1])"),
    Bug("the attention mask on the CPU", "support/ragged.py",
        "torch.zeros(blocked.shape, device=blocked.device)", "torch.zeros(blocked.shape)"),
    Bug("a metric on the CPU", "train.py",
        'metrics["loss"] = loss.detach()', 'metrics["loss"] = loss.detach().cpu()'),
    Bug("the bf16 copy on the CPU", "support/policy.py",
        "to_empty(device=master.device)", 'to_empty(device="cpu")'),

    # Going on
    Bug("moments on the CPU after a checkpoint", "support/checkpoint.py",
        "moment = torch.empty_like(p)", "moment = torch.empty(p.shape)"),
    Bug("the number of steps on the CPU after a checkpoint", "support/checkpoint.py",
        "moment = torch.empty((), device=p.device)", "moment = torch.empty(())"),
]


def put_in(bug, folder):
    path = os.path.join(folder, bug.file)
    with open(path, encoding="utf-8") as f:
        text = f.read()
    found = text.count(bug.old)
    assert found == 1, f"{bug.what}: {bug.file} has {bug.old!r} {found} times"
    with open(path, "w", encoding="utf-8") as f:
        f.write(text.replace(bug.old, bug.new))


def try_bug(bug):
    """The test that fails first and its error, both None if none does."""
    with tempfile.TemporaryDirectory() as folder:
        copy = os.path.join(folder, "repository")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(
            ".git", "runs", "shared", "docs", "__pycache__", ".*"))
        put_in(bug, copy)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-n", "0", "-x", "--tb=short", TEST],
            cwd=copy, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    lines = done.stdout.splitlines()
    assert done.returncode in (0, 1), done.stdout + done.stderr    # 1: a test has failed
    if done.returncode == 0:
        return None, None
    test = next(line.strip("_ ") for line in lines if line.startswith("___"))
    error = next(line[1:].strip() for line in lines if line.startswith("E "))
    return test, error


def main(words=""):
    """Prints a line for each bug. Returns those that were not caught."""
    missed = []
    for bug in BUGS:
        if words not in bug.what:
            continue
        test, error = try_bug(bug)
        if test is None:
            missed.append(bug.what)
        print(f"{bug.what:58} {test or 'NOT CAUGHT'}\n{'':8}{(error or '')[:160]}", flush=True)
    return missed


if __name__ == "__main__":
    sys.exit(len(main(" ".join(sys.argv[1:]))))
