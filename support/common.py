"""What every program here needs: one-line errors, a device, files that are whole or not there."""
from __future__ import annotations

import contextlib
import gzip
import json
import math
import os
import shutil
import sys
import zlib
from collections.abc import Iterator

import torch
from safetensors import SafetensorError


# ---- Errors --------------------------------------------------------------------------------------

class InputError(Exception):
    """Something the user gave us cannot be used. The message says what, where, and what to do."""


def flag(name: str) -> str:
    """A setting's name on the command line."""
    return "--" + name.replace("_", "-")


def refuse_blank(settings, names: tuple[str, ...]) -> None:
    """Raises InputError for --out "" and the like: an empty path would mean another folder."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value.strip():
            raise InputError(f'{flag(name)} "{value}": is empty; is a variable of the shell not '
                             "set?")


def refuse_out_of_range(settings, least: dict[str, float]) -> None:
    """Raises InputError for a number that is below the least that it may be (-inf: any number), not
    finite, or too large for a tensor's size."""
    for name, low in least.items():
        value = getattr(settings, name)
        if value is not None and not (low <= value and -math.inf < value < math.inf):
            what = "a number" if low < 0 else f"{low} or more"
            raise InputError(f"{flag(name)} {value}: must be {what}, and finite")
        if isinstance(value, int) and value >= (2**63 if name == "seed" else 2**31):
            raise InputError(f"{flag(name)} {value}: too large")


def as_flags(settings: dict) -> list[str]:
    """Settings as the words of a command line; True is a flag without a value."""
    words = []
    for name, value in settings.items():
        if value is True:
            words.append(flag(name))
        elif str(value).startswith("-"):    # or it would be taken for a flag
            words.append(f"{flag(name)}={value}")
        else:
            words += [flag(name), str(value)]
    return words


def one_line(e: BaseException) -> str:
    """An exception of others, for use inside a message of ours."""
    return " ".join(f"{type(e).__name__}: {e}".split())[:200]


def is_out_of_memory(e: BaseException | None) -> bool:
    """On a CPU, running out of memory has no exception class of its own."""
    words = ("DefaultCPUAllocator", "could not create a primitive", "bad_alloc",
             "CUBLAS_STATUS_ALLOC_FAILED")
    while e is not None:    # while a CUDA graph is recorded, another error covers the first
        if isinstance(e, torch.OutOfMemoryError) or any(word in str(e) for word in words):
            return True
        e = e.__context__
    return False


def exit_cleanly(main) -> None:
    """Run a program. What a user can cause ends in one line on stderr and a status: 2 for bad
    input, 130 for Ctrl-C. Any other exception is a bug of ours, and keeps its traceback."""
    status = 0
    forgive_streams()
    try:
        main()
    except InputError as e:
        message, status = f"error: {' '.join(str(e).split())}", 2
    except KeyboardInterrupt:
        message, status = "\ninterrupted", 130
    except BrokenPipeError:    # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as e:
        name = e.filename2 or e.filename or "a file"    # the second: what was written
        message, status = f"error: {name}: {e.strerror or e}", 2
    except MemoryError:
        message, status = "error: out of memory; is one of the files far too large?", 2
    except SafetensorError as e:
        message, status = f"error: weights cannot be read or written ({e})", 2
    except RuntimeError as e:
        if not is_out_of_memory(e):
            raise
        message, status = ("error: out of memory; lower --rows-per-pass (updates), --rows "
                           "(sampling) or --max-new-tokens"), 2
    if status:
        print(message, file=sys.stderr)
    sys.exit(status)


class Forgiving:
    """A stream that may be full or gone: what cannot be written is lost, and the run goes on."""
    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text) -> int:
        with contextlib.suppress(OSError, ValueError):
            return self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()


def outlive_readers() -> None:
    """From now on what nobody reads any more (`train.py | tee log`, and tee has gone) is lost, and
    the program goes on."""
    sys.stdout = Forgiving(sys.stdout)


def forgive_streams() -> None:
    """Letters that a terminal cannot show become escapes, and a stream that is closed swallows."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:    # 2>&-
            stream = open(os.devnull, "w", encoding="utf-8")
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, Forgiving(stream) if name == "stderr" else stream)


# ---- Devices -------------------------------------------------------------------------------------

# cuDNN's attention returns NaN gradients for some masked shapes (pytorch#196678), and plans every
# new shape anew. Without it PyTorch takes its memory-efficient kernel.
torch.backends.cuda.enable_cudnn_sdp(False)


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU if there is one. Raises InputError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, dtype=torch.float64, device=device).item()    # Apple's mps has no float64
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)    # CUDA graphs are recorded on the current device
        return device
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as e:
        reason = str(e).splitlines()[0]
        raise InputError(f"--device {name}: cannot be used ({reason})") from None


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where matrix products in it are faster: on GPUs, and on CPUs with bf16
    instructions of their own."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and cpu_has_bf16()
    return torch.bfloat16 if fast else torch.float32


def cpu_has_bf16() -> bool:
    try:
        with open("/proc/cpuinfo") as f:
            return not {"amx_bf16", "avx512_bf16"}.isdisjoint(f.read().split())
    except OSError:
        return False


# ---- Files ---------------------------------------------------------------------------------------

def refuse_unwritable(path: str) -> None:
    if os.path.isdir(path) or not os.access(os.path.dirname(path) or ".", os.W_OK):
        raise InputError(f"{path}: cannot be written; it must be a file, in a folder that exists "
                         "and can be written to")


@contextlib.contextmanager
def written_whole(path: str):
    """A text file to write to. It is written beside and renamed: whole, or not there."""
    beside = path + ".writing"
    with contextlib.suppress(FileNotFoundError):
        os.remove(beside)    # it may be a link to a file of others
    with open(beside, "x", encoding="utf-8") as f:
        yield f
    os.replace(beside, path)


@contextlib.contextmanager
def replaced_folder(folder: str):
    """A new folder to fill, which then takes the place of `folder`: never half of one. If `folder`
    is a link, the one that it points to is replaced."""
    folder = os.path.realpath(folder)
    beside = f"{folder}.writing"
    remove(beside)
    os.makedirs(beside)
    yield beside
    if os.path.isdir(folder):
        old = f"{folder}.old"
        remove(old)
        os.rename(folder, old)
        os.rename(beside, folder)
        shutil.rmtree(old)
    else:
        os.rename(beside, folder)


def remove(path: str) -> None:
    """A folder with all that it holds, or a link; nothing if nothing is there."""
    if os.path.islink(path):
        os.remove(path)
    else:
        shutil.rmtree(path, ignore_errors=True)


def read_json(path: str):
    """The parsed file. Raises InputError with file and line."""
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except json.JSONDecodeError as e:
        raise InputError(f"{path}, line {e.lineno}: not valid JSON ({e.msg})") from None
    except (OSError, ValueError, RecursionError) as e:
        # ValueError: not UTF-8, or a number of thousands of digits
        raise InputError(f"{path}: cannot be read ({getattr(e, 'strerror', None) or e})") from None


LONGEST_LINE = 16 * 2**20  # bytes


def read_records(path: str) -> Iterator[tuple[str, object]]:
    """(where it stands, parsed value) of each record in a .jsonl or .json file, which may be
    compressed (.gz), or in a .parquet file. A .json file is a list, or has an object a line. Raises
    InputError with file and line."""
    if not os.path.isfile(path):
        what = "is a folder, not a file" if os.path.isdir(path) else "no such file"
        if os.path.exists(path) and not os.path.isdir(path):
            what = "not a regular file"
        raise InputError(f"{path}: {what}")
    try:
        with open(path, "rb") as f:
            start = f.read(4)
        if start == b"PAR1":
            yield from read_parquet(path)
            return
        with gzip.open(path, "rb") if start[:2] == b"\x1f\x8b" else open(path, "rb") as f:
            if path.lower().endswith((".json", ".json.gz")) and not has_object_a_line(f):
                yield from read_list(f.read(), path)
            else:
                yield from read_lines(f, path)
    except json.JSONDecodeError as e:
        raise InputError(f"{path}, line {e.lineno}: not valid JSON ({e.msg})") from None
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as e:
        raise InputError(f"{path}: cannot be read ({getattr(e, 'strerror', None) or e})") from None


def has_object_a_line(f) -> bool:
    """Whether the first line that says something is a JSON object, whatever the file's name is."""
    line = b"\n"
    while line and not line.strip():
        line = f.readline(LONGEST_LINE)
    f.seek(0)
    try:
        return isinstance(json.loads(line.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


def read_parquet(path: str) -> Iterator[tuple[str, object]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as e:
        raise InputError(
            f"{path}: Parquet needs pyarrow (pip install pyarrow; {one_line(e)})") from None
    try:
        row = 0
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1000):
            for i, column in enumerate(batch.schema):
                if pyarrow.types.is_float32(column.type):    # 0.1, and not 0.10000000149
                    as_text = batch.column(i).cast(pyarrow.string())
                    batch = batch.set_column(i, column.name, as_text.cast(pyarrow.float64()))
            for record in batch.to_pylist():
                row += 1
                yield f"{path}, row {row}", record
    except (pyarrow.ArrowException, OverflowError) as e:    # a date that Python does not have
        raise InputError(f"{path}: cannot be read ({one_line(e)})") from None


def read_list(data: bytes, path: str) -> list[tuple[str, object]]:
    records = json.loads(data.decode("utf-8-sig"), object_pairs_hook=refuse_repeated_fields)
    if not isinstance(records, list):
        raise InputError(f"{path}: a .json file must hold a list of problems (one object a line "
                         "is .jsonl)")
    return [(f"{path}, item {i}", record) for i, record in enumerate(records, 1)]


def read_lines(f, path: str):
    number = 0
    while True:
        line = f.readline(LONGEST_LINE + 1)
        if not line:
            return
        number += 1
        where = f"{path}, line {number}"
        if len(line) > LONGEST_LINE:
            raise InputError(
                f"{where}: longer than {LONGEST_LINE >> 20} MiB; is this a JSONL file?")
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8-sig")
            yield where, json.loads(text, object_pairs_hook=refuse_repeated_fields)
        except UnicodeDecodeError:
            raise InputError(f"{where}: not UTF-8 text") from None
        except (ValueError, RecursionError) as e:
            raise InputError(f"{where}: not valid JSON ({getattr(e, 'msg', e)})") from None


def refuse_repeated_fields(pairs):
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("a field appears twice")
    return record
