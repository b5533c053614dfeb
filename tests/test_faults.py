"""Runs that are killed, stopped, starved and lied to. Each fault is done, not simulated, to a process of its own.

    python tests/test_faults.py            every fault, more often than the tests do, and a table
"""
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time

import pytest
import torch
from safetensors.torch import load_file


ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from gcpo import ALGORITHMS  # noqa: E402
from model import load_model  # noqa: E402
from support.checkpoint import checkpoint_fault, newest_checkpoint, save_checkpoint  # noqa: E402
from support.common import exit_cleanly  # noqa: E402
from support.toy import build_toy  # noqa: E402
from train import main  # noqa: E402


SETTINGS = ["--instruction", "", "--dtype", "float32", "--threads", "1", "--prompts", "4", "--group-size", "4", "--max-new-tokens", "24", "--steps", "12",
            "--rows-per-pass", "64", "--updates", "2", "--lr", "1e-3", "--eval-every", "4", "--eval-limit", "8", "--save-every", "2"]
start = multiprocessing.get_context("forkserver")
start.set_forkserver_preload(["train", "torch.distributed.fsdp", "torch.distributed.tensor"])  # seconds each, once


def in_process(argv, log, limits):
    """A program of its own: its output in a file, its status that of the shell."""
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1), os.dup2(fd, 2)
    sys.stdout = sys.stderr = os.fdopen(fd, "w", buffering=1, closefd=False)
    for kind, value in limits.items():
        resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a file over its limit is an error of write(), as on a full disk
    sys.argv = ["train.py", *argv]
    exit_cleanly(main)


class Run:
    """train.py on the toy's files, in a folder of its own."""
    def __init__(self, folder, *flags, toy=None):
        self.toy = toy or build_toy(os.path.join(folder, "toy"), 0)
        if not toy:                                                  # few problems: a run is to start at once
            with open(self.toy["data"]) as f:
                lines = f.readlines()[:200]
            with open(self.toy["data"], "w") as f:
                f.writelines(lines)
        self.out, self.log = os.path.join(folder, "out"), os.path.join(folder, "log")
        self.flags = [*SETTINGS, "--model", self.toy["model"], "--data", self.toy["data"], "--eval-data", self.toy["eval_data"], "--out", self.out, *flags]

    def start(self, *flags, limits={}):
        self.process = start.Process(target=in_process, args=([*self.flags, *flags], self.log, limits))
        self.process.start()
        return self

    def end(self):
        self.process.join(120)
        return self.process.exitcode

    def finish(self, *flags, **limits):
        return self.start(*flags, **limits).end()

    def resume_flag(self):
        return ["--resume"] if os.path.exists(os.path.join(self.out, "run.json")) else []

    def kill_after(self, seconds, sig=signal.SIGKILL):
        self.process.join(seconds)
        if self.process.is_alive():
            os.kill(self.process.pid, sig)
        return self.end()

    def wait_for_step(self, step):
        until = time.time() + 60
        while time.time() < until and self.process.is_alive():
            if os.path.exists(f"{self.out}/metrics.jsonl") and any(r["step"] >= step for r in self.metrics(whole=False)):
                return
            time.sleep(0.005)

    def metrics(self, whole=True):
        rows = []
        with open(os.path.join(self.out, "metrics.jsonl")) as f:
            for line in f:
                if not whole and not line.endswith("\n"):
                    continue
                rows.append({k: v for k, v in json.loads(line).items() if not k.startswith(("time/", "memory/"))})
        return rows

    def weights(self):
        return load_file(os.path.join(self.out, "model", "model.safetensors"))

    def said(self):
        with open(self.log) as f:
            return f.read()


def same(a: Run, b: Run):
    """Metrics and weights, to the bit; every step once."""
    assert [r["step"] for r in a.metrics()] == list(range(13))
    assert a.metrics() == b.metrics()
    samples = [json.loads(line) for line in open(f"{a.out}/samples.jsonl")]
    assert [s["step"] for s in samples] == list(range(1, 13))
    x, y = a.weights(), b.weights()
    assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happened to."""
    run = Run(str(tmp_path_factory.mktemp("whole")))
    assert run.finish() == 0, run.said()
    return run


# ---------------------------------------------------------------------------------------------------------------------
# Each fault is a function of a folder and the undisturbed run; it raises where the run was lost, poisoned or fooled

def killed_at_random(folder, whole, seed=0):
    """kill -9 at random moments, resumed until it ends. Returns the number of kills."""
    draw, run = random.Random(seed), Run(folder, toy=whole.toy)
    kills = 0
    while True:
        if not run.resume_flag() and os.path.exists(run.out):
            shutil.rmtree(run.out)                      # killed before run.json was there: nothing to resume
        run.start(*run.resume_flag())
        if kills == 4:                                  # each try gets further only if checkpoints do
            assert run.end() == 0, run.said()
            break
        if run.kill_after(draw.uniform(0.05, 1.5)) == 0:
            break
        kills += 1
    same(run, whole)
    return kills


def killed_between_step_and_checkpoint(folder, whole, algo=(), of=None):
    """kill -9 right after a step was logged."""
    run = Run(folder, *algo, toy=whole.toy)
    run.start().wait_for_step(5)
    run.kill_after(0)
    assert run.finish("--resume") == 0, run.said()
    same(run, of or whole)


def stopped(folder, whole, sig=signal.SIGINT):
    """SIGINT or SIGTERM: the step is finished and saved, and the message says how to go on."""
    run = Run(folder, toy=whole.toy)
    run.start().wait_for_step(3)
    assert run.kill_after(0, sig) == 130
    assert "--resume" in run.said() and "Traceback" not in run.said()
    steps = [r["step"] for r in run.metrics()]
    assert os.path.exists(f"{run.out}/checkpoints/step-{steps[-1]:06d}") and steps[-1] < 12
    assert run.finish("--resume") == 0, run.said()
    same(run, whole)


def checkpoint_damaged(folder, whole, how="cut"):
    """The newest checkpoint cut short, altered or without a file: noticed and named, and the one before used."""
    run = Run(folder, toy=whole.toy)
    run.start().wait_for_step(7)
    run.kill_after(0)
    root = os.path.join(run.out, "checkpoints")
    newest = os.path.join(root, sorted(n for n in os.listdir(root) if n.startswith("step-"))[-1])
    victim = os.path.join(newest, "optimizer.safetensors")
    with open(victim, "r+b") as f:
        if how == "cut":
            f.truncate(os.path.getsize(victim) // 2)
        elif how == "altered":
            f.seek(-5, os.SEEK_END)
            byte = f.read(1)
            f.seek(-5, os.SEEK_END)
            f.write(bytes([byte[0] ^ 1]))
    if how == "missing":
        os.remove(victim)
    elif how == "state":
        with open(os.path.join(newest, "state.json"), "w") as f:
            f.write('{"step": ')
    assert run.finish("--resume") == 0, run.said()
    assert f"{newest} is damaged" in run.said()
    same(run, whole)


def disk_full(folder, whole):
    """Writes that fail as on a full disk: one line, status 2, and the run goes on from what is there once there is room."""
    run = Run(folder, toy=whole.toy)
    run.start().wait_for_step(3)
    run.kill_after(0, signal.SIGTERM)
    assert run.finish("--resume", limits={resource.RLIMIT_FSIZE: 500_000}) == 2
    assert "Traceback" not in run.said() and "error: " in run.said()
    assert run.finish("--resume") == 0, run.said()
    same(run, whole)


def memory_exhausted(folder, whole):
    """An update that finds no memory: one line that says what to lower, and the run goes on once that is done."""
    run = Run(folder, toy=whole.toy)
    run.start().wait_for_step(3)
    run.kill_after(0, signal.SIGTERM)
    greedy = Run(f"{folder}/greedy", "--prompts", "64", "--group-size", "64", "--rows-per-pass", "4096", "--eval-every", "0")
    assert greedy.finish(limits={resource.RLIMIT_DATA: 600 * 2**20}) == 2, greedy.said()
    assert "lower --rows-per-pass" in greedy.said() and "Traceback" not in greedy.said()
    assert run.finish("--resume", "--rows-per-pass", "2") == 0, run.said()
    assert [r["step"] for r in run.metrics()] == list(range(13))


def model_folder_deleted(folder, whole):
    """The model's folder goes while the run lasts: what is saved is whole all the same."""
    run = Run(folder)
    run.start().wait_for_step(1)
    shutil.rmtree(run.toy["model"])
    assert run.end() == 0, run.said()
    assert os.path.exists(f"{run.out}/model/tokenizer.json")
    same(run, whole)


def not_finite(folder, whole):
    """Gradients that are never finite: skipped, the group recorded, and an end with one line and the weights as they were."""
    source = Run(folder)
    path = os.path.join(source.toy["model"], "model.safetensors")
    from safetensors.torch import save_file
    weights = load_file(path)
    weights["model.layers.1.mlp.down_proj.weight"].fill_(3e38)          # finite, as a model folder must be; what it computes is not
    save_file(weights, path, metadata={"format": "pt"})
    source.flags += ["--max-bad-steps", "3"]
    assert source.finish("--algo", "sft", "--eval-every", "0", "--save-every", "1") == 2, source.said()
    assert "not finite in 3 steps in a row" in source.said() and "Traceback" not in source.said()
    rows = [json.loads(line) for line in open(f"{source.out}/samples.jsonl")]
    assert len(rows) == 3 and all(r["gradient"] == "not finite" and r["responses"] for r in rows)
    last = load_file(f"{source.out}/checkpoints/step-000003/model/model.safetensors")
    assert all(torch.equal(last[k], weights[k].float()) for k in last)


def setting_changed(folder, whole):
    """A changed setting is refused by name with both values; harmless ones may change."""
    run = Run(folder, toy=whole.toy)
    run.start().wait_for_step(3)
    run.kill_after(0, signal.SIGTERM)
    for flag, old, new in (("--lr", "0.001", "0.002"), ("--clip-low", "0.0003", "0.1"), ("--seed", "0", "5")):
        assert run.finish("--resume", flag, new) == 2
        line = run.said().strip().splitlines()[-1]
        assert flag[2:] in line and old in line and new in line, line
    assert run.finish("--resume", "--save-every", "5", "--keep", "1") == 0, run.said()
    same(run, whole)


FAULTS = {
    "kill -9 at random moments": (killed_at_random, [dict(seed=s) for s in range(10)]),
    "kill -9 between step and checkpoint": (killed_between_step_and_checkpoint, [{}] * 3),
    "SIGINT": (stopped, [dict(sig=signal.SIGINT)] * 3),
    "SIGTERM": (stopped, [dict(sig=signal.SIGTERM)] * 3),
    "checkpoint cut short": (checkpoint_damaged, [dict(how="cut")]),
    "checkpoint altered by one bit": (checkpoint_damaged, [dict(how="altered")]),
    "checkpoint without a file": (checkpoint_damaged, [dict(how="missing")]),
    "checkpoint without its state": (checkpoint_damaged, [dict(how="state")]),
    "disk full": (disk_full, [{}]),
    "memory exhausted in an update": (memory_exhausted, [{}]),
    "model folder deleted during the run": (model_folder_deleted, [{}]),
    "gradients not finite": (not_finite, [{}]),
    "resumed with other settings": (setting_changed, [{}]),
}


SLOW = {"checkpoint cut short", "checkpoint without a file", "checkpoint without its state", "memory exhausted in an update"}  # left to the table


@pytest.mark.parametrize("how", ["cut", "altered", "missing", "state", "outside", "taken", "step", "unlisted"])
def test_damage_is_noticed(how, whole, tmp_path):
    """Forbids a checkpoint that is believed because it is there."""
    path = str(tmp_path / "step-000012")
    shutil.copytree(f"{whole.out}/checkpoints/step-000012", path)
    assert checkpoint_fault(path) is None
    victim = os.path.join(path, "model", "model.safetensors")
    if how == "missing":
        os.remove(victim)
    elif how in ("cut", "altered"):
        with open(victim, "r+b") as f:
            f.truncate(1000) if how == "cut" else f.write(b"\x01")
    else:
        state = json.load(open(f"{path}/state.json"))
        if how == "outside":
            state["files"]["../x"] = [0, ""]
        elif how == "unlisted":
            del state["files"]["model/model.safetensors"]
        else:
            state["taken" if how == "taken" else "step"] = -3
        with open(f"{path}/state.json", "w") as f:
            f.write("{" if how == "state" else json.dumps(state))
    assert checkpoint_fault(path)


def test_another_model_is_refused(whole, tmp_path):
    """Forbids going on from the right weights with another model's reference, config or tokenizer, or a run cut shorter than it is."""
    shutil.copytree(whole.out, tmp_path / "out"), shutil.copytree(os.path.dirname(whole.toy["model"]), tmp_path / "toy")
    run = Run(str(tmp_path), toy={k: v.replace(os.path.dirname(whole.toy["model"]), str(tmp_path / "toy")) for k, v in whole.toy.items()})
    assert run.finish("--resume", "--steps", "7") == 2 and "is at step 12 already" in run.said()
    path = tmp_path / "toy" / "model" / "model.safetensors"
    with open(path, "r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(b"\x3c")
    assert run.finish("--resume", "--steps", "14") == 2 and "model/model.safetensors was" in run.said()


def test_a_run_without_whole_checkpoints_is_left_alone(whole, tmp_path):
    """Forbids beginning again, over the logs, where every checkpoint is damaged or run.json is not a run's."""
    shutil.copytree(whole.out, tmp_path / "out")
    run = Run(str(tmp_path), toy=whole.toy)
    for name in os.listdir(f"{run.out}/checkpoints"):
        os.truncate(f"{run.out}/checkpoints/{name}/optimizer.safetensors", 9)
    assert run.finish("--resume", "--steps", "14") == 2 and "no checkpoint" in run.said() and run.metrics() == whole.metrics()
    with open(f"{run.out}/run.json", "w") as f:
        f.write("[]")
    assert run.finish("--resume") == 2 and "names no settings" in run.said() and "Traceback" not in run.said()


def test_the_only_whole_checkpoint_is_kept(whole, tmp_path):
    """Forbids a damaged checkpoint of later steps that takes a whole one's place."""
    model, optimizer = load_model(whole.toy["model"]), torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    def save(step):
        state = {"step": step, "bad_steps": 0, "before": None, "after": None, "best": None, "best_step": None, "epoch": 0, "taken": 0, "solved": [], "dropped": []}
        save_checkpoint(str(tmp_path), model, optimizer, state, whole.toy["model"], keep=1)
    save(10), save(20)
    os.truncate(tmp_path / "checkpoints" / "step-000020" / "state.json", 20)
    save(15)
    assert newest_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoints" / "step-000015")


@pytest.mark.parametrize("name", [name for name in FAULTS if name not in SLOW])
def test_survives(name, whole, tmp_path):
    fault, times = FAULTS[name]
    fault(str(tmp_path), whole, **times[0])


@pytest.mark.parametrize("algo", ["dapo", "dpo"])
def test_every_algorithm_resumes_to_the_bit(algo, whole, tmp_path):
    """Forbids a state that only GCPO's runs need."""
    other_algorithm(str(tmp_path), whole, algo)


def other_algorithm(folder, whole, algo):
    os.makedirs(f"{folder}/undisturbed")
    undisturbed = Run(f"{folder}/undisturbed", "--algo", algo, toy=whole.toy)
    assert undisturbed.finish() == 0, undisturbed.said()
    killed_between_step_and_checkpoint(folder, whole, ("--algo", algo), undisturbed)


FAULTS["kill -9, other algorithms"] = other_algorithm, [dict(algo=a) for a in ALGORITHMS if a != "gcpo"]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.makedirs(f"{folder}/whole")
        whole_run = Run(f"{folder}/whole")
        assert whole_run.finish() == 0, whole_run.said()
        print(f"{'fault':40}{'times':>6}{'survived':>10}")
        lost = 0
        for name, (fault, times) in FAULTS.items():
            survived = done = 0
            for i, settings in enumerate(times):
                os.makedirs(at := f"{folder}/{abs(hash(name))}-{i}")
                try:
                    count = fault(at, whole_run, **settings) or 1
                    survived += count
                except AssertionError as e:
                    print(f"{name}: {e}", file=sys.stderr)
                    count, lost = 1, lost + 1
                done += count
                shutil.rmtree(at)
            print(f"{name:40}{done:6}{survived:10}", flush=True)
    sys.exit(bool(lost))
