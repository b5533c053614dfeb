"""Checkpoints: everything a run needs to go on to the bit, in safetensors and JSON.

    OUT/checkpoints/step-000020/model/               a Hugging Face folder like any other
                                optimizer.safetensors  AdamW's moments
                                state.json             step, best evaluation, and size and SHA-256 of every file

There is no random state: everything random in a run follows from the seed and the step. A checkpoint is written beside,
flushed to the disk and renamed, so a name without `.writing` at its end is a whole one, and the one before stays until
then. What a bad disk or a stranger does to it afterwards shows in the checksums; nothing in it is ever executed.
"""
from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from model import Transformer, on_cpu, read_weights, save_model
from support.common import InputError, read_json, written_whole
from support.parallel import copy_into


def sha256(path: str) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def flush_to_disk(path: str) -> None:
    """A file's content, or a folder's names; a rename is safe only once what it names is."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def lock_folder(folder: str) -> None:
    """Keep other runs out of a folder for as long as this process lives. Raises InputError if one is in it."""
    try:
        import fcntl
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{folder}: another process is training there; wait for it, or name another folder with --out") from None
    except (ImportError, OSError):
        pass    # Windows, or a file system without locks


def files_in(folder: str) -> list[str]:
    return sorted(os.path.relpath(os.path.join(at, name), folder) for at, _, names in os.walk(folder) for name in names)


def save_checkpoint(out: str, model: Transformer, optimizer: torch.optim.Optimizer, state: dict, tokenizer_from: str, keep: int, write: bool = True) -> None:
    """Write OUT/checkpoints/step-N and remove all but the last `keep` and the best. `state` names `step` and `best_step`.
    Of a model in shards, all processes must call this, and one of them write."""
    moments = on_cpu({f"{name}.{key}": value for name, p in model.named_parameters() for key, value in optimizer.state.get(p, {}).items()}, keep=write)
    if not write:
        return save_model(model, "", write=False)
    root = os.path.join(out, "checkpoints")
    path, beside = os.path.join(root, f"step-{state['step']:06d}"), os.path.join(root, "next.writing")
    shutil.rmtree(beside, ignore_errors=True)
    os.makedirs(beside)
    save_model(model, os.path.join(beside, "model"), tokenizer_from)
    save_file(moments, os.path.join(beside, "optimizer.safetensors"))
    files = {name: [os.path.getsize(os.path.join(beside, name)), sha256(os.path.join(beside, name))] for name in files_in(beside)}
    with open(os.path.join(beside, "state.json"), "w", encoding="utf-8") as f:
        json.dump({**state, "files": files}, f, indent=2)
    for name in [*files, "state.json"]:
        flush_to_disk(os.path.join(beside, name))
    for at, _, _ in os.walk(beside):
        flush_to_disk(at)
    shutil.rmtree(path, ignore_errors=True)
    os.rename(beside, path)
    flush_to_disk(root)
    # A damaged one of later steps, from which this run went back, does not count.
    for old in [name for name in checkpoints(out) if name <= os.path.basename(path)][:-keep]:
        if old != f"step-{state['best_step'] or 0:06d}":
            shutil.rmtree(os.path.join(root, old))


def checkpoints(out: str) -> list[str]:
    """Names under OUT/checkpoints, oldest first."""
    root = os.path.join(out, "checkpoints")
    return sorted(name for name in (os.listdir(root) if os.path.isdir(root) else []) if name.startswith("step-"))


NOTHING = type(None)
STATE = {"step": (int,), "bad_steps": (int,), "before": (float, NOTHING), "after": (float, NOTHING), "best": (float, NOTHING), "best_step": (int, NOTHING),
         "epoch": (int,), "taken": (int,), "solved": (list,), "dropped": (list,)}


def checkpoint_fault(path: str) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        state = read_json(os.path.join(path, "state.json"))
        for name, (size, digest) in state["files"].items():
            file = os.path.join(path, name)
            if name != os.path.normpath(name) or name.startswith(("..", "/")):
                return f"{name!r} lies outside it"
            if not os.path.isfile(file):
                return f"{name} is missing"
            if os.path.getsize(file) != size:
                return f"{name} has {os.path.getsize(file)} bytes, not {size}"
            if sha256(file) != digest:
                return f"{name} was altered"
        numbers = [n for value in state.values() if type(value) in (int, float, list) for n in (value if type(value) is list else [value])]
        if not all(type(state[name]) in kinds for name, kinds in STATE.items()) or not all(type(n) in (int, float) and 0 <= n < 2**53 for n in numbers) \
                or not {"optimizer.safetensors", "model/config.json", "model/model.safetensors"} <= set(state["files"]):
            return "state.json lacks something, or has it in another form"
        if os.path.basename(path) != f"step-{state['step']:06d}":
            return f"it is of step {state['step']}"
    except OSError as e:
        return f"{e.filename or 'a file'} cannot be read: {e.strerror}"
    except (InputError, KeyError, TypeError, ValueError, AttributeError) as e:
        return f"state.json cannot be used ({e})"
    return None


def newest_checkpoint(out: str) -> str | None:
    """Path of the newest whole checkpoint; each that is damaged is named on stderr."""
    for name in reversed(checkpoints(out)):
        path = os.path.join(out, "checkpoints", name)
        wrong = checkpoint_fault(path)
        if wrong is None:
            return path
        print(f"warning: checkpoint {path} is damaged ({wrong}); going back to the one before", file=sys.stderr)
    return None


@torch.no_grad()
def load_checkpoint(path: str, model: Transformer, optimizer: torch.optim.Optimizer) -> dict:
    """Put weights and moments back in place. Returns the state."""
    read_weights(os.path.join(path, "model"), model)
    by_name = dict(model.named_parameters())
    with safe_open(os.path.join(path, "optimizer.safetensors"), framework="pt") as f:
        for name in f.keys():
            parameter, key = name.rsplit(".", 1)
            if parameter not in by_name:
                raise InputError(f"{path}: optimizer.safetensors holds {name}, which this model does not have")
            p, tensor = by_name[parameter], f.get_tensor(name)
            moment = torch.empty_like(p) if tensor.dim() else torch.empty((), device=p.device)   # or the number of steps
            copy_into(moment, tensor)
            optimizer.state[p][key] = moment
    return read_json(os.path.join(path, "state.json"))


def refuse_changes(out: str, settings: dict) -> None:
    """Raises InputError at the first setting that is not as in OUT/run.json."""
    path = os.path.join(out, "run.json")
    was = read_json(path)
    was = was.get("settings") if isinstance(was, dict) else None
    if not isinstance(was, dict):
        raise InputError(f"--resume: {path} names no settings; it was altered, or is of another version; begin a new run")
    for name, new in settings.items():
        old = was.get(name)
        if name == "algorithm" and isinstance(old, dict) and old != new:
            name = next(key for key in new if new[key] != old.get(key))
            old, new = old.get(name), settings["algorithm"][name]
        if old != new:
            raise InputError(f"--resume: {name.replace('_', '-')} was {old!r} when {out} began, and is {new!r} now; use what it was, or begin a new run")


def cut_log(path: str, step: int) -> None:
    """Leave the whole lines of steps up to `step`: later ones will be written again."""
    kept = []
    with open(path, "rb") as f:
        for line in f:
            try:
                if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                    kept.append(line.decode())
            except (ValueError, KeyError, TypeError):
                pass
    with written_whole(path) as f:
        f.writelines(kept)
