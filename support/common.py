"""What every program here needs: errors of one line, a device, a file that is whole."""
from __future__ import annotations

import contextlib
import json
import os
import sys

import torch
from safetensors import SafetensorError


class InputError(Exception):
    """Something the user gave us cannot be used. The message is one line that says what, where and what to do."""


def exit_cleanly(main) -> None:
    """Run a program; what a user can cause ends in one line on stderr and a status: 2 for bad input, 130 for Ctrl-C."""
    status = 0
    try:
        main()
    except InputError as e:
        message, status = f"error: {' '.join(str(e).split())}", 2
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read our output has gone; so may we
        status = 1
    except OSError as e:
        message, status = f"error: {e.filename or 'a file'}: {e.strerror or e}", 2
    except SafetensorError as e:
        message, status = f"error: weights cannot be read or written ({e})", 2
    except RuntimeError as e:  # torch.OutOfMemoryError is one, and on a CPU there is no class of its own
        if not isinstance(e, torch.OutOfMemoryError) and not any(words in str(e) for words in ("DefaultCPUAllocator", "could not create a primitive", "bad_alloc")):
            raise
        message, status = "error: out of memory; lower --rows-per-pass (updates), --rows (sampling) or --max-new-tokens", 2
    if status > 1:
        print("\n" * (status == 130) + message, file=sys.stderr)
    sys.exit(status)


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)   # CUDA graphs are recorded on the current one
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise InputError(f"--device {name}: cannot be used ({str(e).splitlines()[0]})") from None


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where matrix products in it are faster: GPUs, and CPUs with bf16 instructions of their own."""
    if name == "auto":
        if device.type == "cpu":
            try:
                with open("/proc/cpuinfo") as f:
                    fast = bool({"amx_bf16", "avx512_bf16"} & set(f.read().split()))
            except OSError:
                fast = False
        else:
            fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bfloat16" if fast else "float32"
    return getattr(torch, name)


@contextlib.contextmanager
def written_whole(path: str):
    """A text file to write to, which is written beside and renamed, so that it is whole or not there."""
    with open(path + ".writing", "w", encoding="utf-8") as f:
        yield f
    os.replace(f.name, path)


def read_json(path: str):
    """The parsed file, or InputError with file and line."""
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except json.JSONDecodeError as e:
        raise InputError(f"{path}, line {e.lineno}: not valid JSON ({e.msg})") from None
    except (OSError, ValueError, RecursionError) as e:   # ValueError: not UTF-8, or a number of thousands of digits
        raise InputError(f"{path}: cannot be read ({getattr(e, 'strerror', None) or e})") from None


def one_line(e: BaseException) -> str:
    return " ".join(f"{type(e).__name__}: {e}".split())[:200]
