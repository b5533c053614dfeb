"""Checkpoints: everything a run needs to go on to the bit, in safetensors and JSON.

    OUT/checkpoints/step-000020/model/                 a Hugging Face folder like any other
                                optimizer.safetensors  AdamW's moments, and low-rank weights
                                state.json             a State, size and SHA-256 of every file, and
                                                       a SHA-256 of all that

There is no random state: everything random in a run follows from the seed and the step. A
checkpoint is written beside, flushed to the disk and renamed, so it is whole or not there, and the
one before stays until then. What a bad disk or a stranger does to it afterwards shows in the
checksums; nothing in it is ever executed.
"""
from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from dataclasses import asdict, dataclass, field
from typing import get_args, get_type_hints

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from model import Transformer, read_weights, save_model
from support import parallel
from support.common import InputError, flag, read_json, written_whole
from support.lora import LowRankMaster, whole_model


@dataclass
class State:
    """Where a run stands: all that a checkpoint holds besides weights and moments."""
    step: int = 0                   # steps done
    bad_steps: int = 0              # the last so many had a gradient that was not finite
    before: float | None = None     # held-out accuracy: before training,
    after: float | None = None      # at the last evaluation,
    best: float | None = None       # at the best one after a step,
    best_step: int | None = None    # which was after this step
    # The order of problems (train.next_problems)
    epoch: int = 0                  # passes over the data before this one
    taken: int = 0                  # place in this epoch's order, those `dropped` not counted
    solved: list = field(default_factory=list)     # --resample history: all rollouts were right
    dropped: list = field(default_factory=list)    # … when this epoch began, so left out of it

    def note_evaluation(self, accuracy: float | None) -> None:
        """Held-out accuracy after `step` steps; None: there are no held-out problems."""
        self.after = accuracy
        if accuracy is not None and (self.best is None or accuracy > self.best):
            self.best = accuracy
            self.best_step = self.step


KINDS = {name: get_args(kind) or (kind,) for name, kind in get_type_hints(State).items()}
MOMENTS = ("exp_avg", "exp_avg_sq", "step")    # what AdamW keeps of each parameter
FILES = {"optimizer.safetensors", "model/config.json", "model/model.safetensors"}


# ---- Writing -------------------------------------------------------------------------------------

def save_checkpoint(
    out: str,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    state: State,
    tokenizer_from: str,
    keep: int,
) -> None:
    """Write OUT/checkpoints/step-N, and remove all but the last `keep` and the best. All processes
    must call this, as each may have a shard of the model; the first of them writes."""
    first = parallel.rank() == 0
    moments = {}
    for name, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            moments[f"{name}.{key}"] = value
    if isinstance(model, LowRankMaster):    # of these the model that is saved is only the sum
        moments |= {f"{name}.weight": p for name, p in model.named_parameters()}
    moments = parallel.gather_to_cpu(moments, keep=first)
    if not first:
        return save_model(whole_model(model), "", write=False)

    root = os.path.join(out, "checkpoints")
    path = os.path.join(root, step_name(state.step))
    beside = os.path.join(root, "next.writing")
    shutil.rmtree(beside, ignore_errors=True)
    os.makedirs(beside)
    save_model(whole_model(model), os.path.join(beside, "model"), tokenizer_from)
    save_file(moments, os.path.join(beside, "optimizer.safetensors"))
    files = {}
    for name in files_in(beside):
        file = os.path.join(beside, name)
        files[name] = [os.path.getsize(file), sha256(file)]
    with open(os.path.join(beside, "state.json"), "w", encoding="utf-8") as f:
        content = {**asdict(state), "files": files}
        json.dump({**content, "digest": digest_of(content)}, f, indent=2)

    for name in [*files, "state.json"]:
        flush_to_disk(os.path.join(beside, name))
    for at, _, _ in os.walk(beside):
        flush_to_disk(at)
    shutil.rmtree(path, ignore_errors=True)
    os.rename(beside, path)
    flush_to_disk(root)
    remove_old(out, state, keep)


def remove_old(out: str, state: State, keep: int) -> None:
    """All but the last `keep` and the best. Later ones do not count: they are damaged, and this run
    resumed from before them."""
    names = [name for name in checkpoints(out) if step_of(name) <= state.step]
    best = step_name(state.best_step or 0)
    for name in names[:-keep]:
        if name != best:
            shutil.rmtree(os.path.join(out, "checkpoints", name))


def step_name(step: int) -> str:
    return f"step-{step:06d}"


def step_of(name: str) -> int:
    return int(name.removeprefix("step-"))


def checkpoints(out: str) -> list[str]:
    """Names under OUT/checkpoints, oldest first. What else lies there is the user's own."""
    root = os.path.join(out, "checkpoints")
    names = []
    for name in os.listdir(root) if os.path.isdir(root) else []:
        path = os.path.join(root, name)
        is_ours = re.fullmatch(r"step-[0-9]{6,}", name) and name == step_name(step_of(name))
        if is_ours and os.path.isdir(path) and not os.path.islink(path):
            names.append(name)
    return sorted(names, key=step_of)


def digest_of(content: dict) -> str:
    """Of all else that state.json holds."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def files_in(folder: str) -> list[str]:
    found = []
    for at, _, names in os.walk(folder):
        found += [os.path.relpath(os.path.join(at, name), folder) for name in names]
    return sorted(found)


def sha256(path: str) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def flush_to_disk(path: str) -> None:
    """A file's content, or a folder's names: a rename is safe only once what it names is."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# ---- Reading -------------------------------------------------------------------------------------

def checkpoint_fault(path: str) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        state = read_json(os.path.join(path, "state.json"))
        content = {name: value for name, value in state.items() if name != "digest"}
        if state["digest"] != digest_of(content):
            return "state.json was altered"
        return files_fault(path, state["files"]) or state_fault(path, state)
    except OSError as e:
        return f"{e.filename or 'a file'} cannot be read: {e.strerror}"
    except (InputError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as e:
        return f"state.json cannot be used ({e})"


def files_fault(path: str, files: dict) -> str | None:
    """Whether the files are those that state.json lists."""
    for name, (size, digest) in files.items():
        file = os.path.join(path, name)
        if name != os.path.normpath(name) or name.startswith(("..", "/")):
            return f"{name!r} lies outside it"
        if not os.path.isfile(file):
            return f"{name} is missing"
        if os.path.getsize(file) != size:
            return f"{name} has {os.path.getsize(file)} bytes, not {size}"
        if sha256(file) != digest:
            return f"{name} was altered"
    return None


def state_fault(path: str, state: dict) -> str | None:
    """Whether state.json has everything, in the right form."""
    numbers = []
    for value in state.values():
        if type(value) in (int, float, list):
            numbers += value if type(value) is list else [value]
    known = all(type(state[name]) in kinds for name, kinds in KINDS.items())
    finite = all(type(n) in (int, float) and 0 <= n < 2**53 for n in numbers)
    if not known or not finite or not FILES <= set(state["files"]):
        return "state.json lacks something, or has it in another form"
    if os.path.basename(path) != step_name(state["step"]):
        return f"it is of step {state['step']}"
    return None


def newest_checkpoint(out: str) -> str | None:
    """Path of the newest whole checkpoint; each that is damaged is named on stderr."""
    for name in reversed(checkpoints(out)):
        path = os.path.join(out, "checkpoints", name)
        fault = checkpoint_fault(path)
        if fault is None:
            return path
        print(f"warning: checkpoint {path} is damaged ({fault}); going back to the one before",
              file=sys.stderr)
    return None


def checkpoint_to_resume(out: str) -> str | None:
    """The newest whole one; None if the run had not come to its first."""
    checkpoint = parallel.from_first(newest_checkpoint(out) if parallel.rank() == 0 else None)
    if checkpoint is None and checkpoints(out):
        raise InputError(f"--resume: no checkpoint in {out}/checkpoints is whole; mend one, or "
                         "begin a new run")
    return checkpoint


@torch.no_grad()
def load_checkpoint(
    path: str, model: Transformer, optimizer: torch.optim.Optimizer,
) -> State:
    """Put weights and moments back in place."""
    by_name = dict(model.named_parameters())
    needed = set()
    if isinstance(model, LowRankMaster):
        needed = {f"{name}.weight" for name in by_name}
    else:
        read_weights(os.path.join(path, "model"), model)
    with safe_open(os.path.join(path, "optimizer.safetensors"), framework="pt") as f:
        names = set(f.keys())
        wanted = {f"{name}.{key}" for name in by_name for key in MOMENTS} | needed
        if names not in (needed, wanted):
            odd = min(names ^ wanted)
            what = "lacks" if odd in wanted else "holds"
            raise InputError(f"{path}: optimizer.safetensors {what} {odd}; this model's has "
                             "others")
        for name in sorted(names):
            parameter, key = name.rsplit(".", 1)
            p = by_name[parameter]
            tensor = f.get_tensor(name)
            if key == "weight":
                refuse_moment(tensor, p.shape, "exp_avg", f"{path}/optimizer.safetensors: {name}")
                p.copy_(tensor)
                continue
            shape = torch.Size() if key == "step" else p.shape
            refuse_moment(tensor, shape, key, f"{path}/optimizer.safetensors: {name}")
            if tensor.dim():
                moment = torch.empty_like(p)
            else:    # the number of steps
                moment = torch.empty((), device=p.device)
            parallel.copy_into(moment, tensor)
            optimizer.state[p][key] = moment
    state = read_json(os.path.join(path, "state.json"))
    return State(**{name: state[name] for name in KINDS})


def refuse_moment(tensor: torch.Tensor, shape: torch.Size, key: str, where: str) -> None:
    """Raises InputError for what AdamW cannot have written."""
    fault = None
    if tensor.shape != shape:
        fault = f"has shape {list(tensor.shape)}, not {list(shape)}"
    elif not tensor.is_floating_point():
        fault = f"is of {str(tensor.dtype).removeprefix('torch.')}"
    elif not tensor.isfinite().all():
        fault = "is not finite"
    elif key != "exp_avg" and (tensor < 0).any():
        fault = "is below 0"
    if fault:
        raise InputError(f"{where} {fault}; begin a new run, or go back to an earlier checkpoint")


# ---- The folder of a run -------------------------------------------------------------------------

LOCKED = {}    # folder: its file descriptor


def lock_folder(folder: str) -> None:
    """Keep other processes out for as long as this one lives. Raises InputError if one is in it."""
    folder = os.path.realpath(folder)
    if folder in LOCKED:    # an earlier run of this process
        os.close(LOCKED.pop(folder))
    try:
        import fcntl
        LOCKED[folder] = os.open(folder, os.O_RDONLY)
        fcntl.flock(LOCKED[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{folder}: another process is training there; wait for it, end it (the "
                         "workers of a torchrun that was killed go on), or name another folder "
                         "with --out") from None
    except (ImportError, OSError):
        pass    # Windows, or a file system without locks


def refuse_changes(out: str, settings: dict, defaults: dict) -> None:
    """Raises InputError at the first setting that is not as in OUT/run.json. One that the run did
    not know has its default there."""
    path = os.path.join(out, "run.json")
    record = read_json(path)
    was = record.get("settings") if isinstance(record, dict) else None
    if not isinstance(was, dict):
        raise InputError(f"--resume: {path} names no settings; it was altered, or is of another "
                         "version; begin a new run")
    switches = was.get("algorithm")
    if not isinstance(switches, dict):
        raise InputError(f"--resume: {path} names no algorithm; it was altered; begin a new run")
    now = {**settings, **settings["algorithm"], "algorithm": None}
    was = {**was, **switches, "algorithm": None}
    for name in {**now, **was}:
        old, new = was.get(name, defaults.get(name)), now.get(name)
        is_gone = name not in now and name.isidentifier()
        if old == new:
            continue
        name = flag(name).removeprefix("--")
        if is_gone:
            raise InputError(f"--resume: {name} was {old!r} when {out} began, and this version of "
                             "the program has no such setting; use that version, or begin a new "
                             "run")
        raise InputError(f"--resume: {name} was {old!r} when {out} began, and is {new!r} now; "
                         "use what it was, or begin a new run")


def cut_log(path: str, step: int) -> None:
    """Leave the whole lines of steps up to `step`: later ones will be written again."""
    kept = []
    with open(path, "rb") as f:
        for line in f:
            try:
                if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                    kept.append(line.decode())
            except (ValueError, KeyError, TypeError, RecursionError):
                pass
    with written_whole(path) as f:
        f.writelines(kept)
