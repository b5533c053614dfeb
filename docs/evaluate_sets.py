"""evaluate.py on several files, in one process: on a GPU starting takes longer than sampling.

    python docs/evaluate_sets.py RESULT MODEL FILE [FILE …] [flags of evaluate.py]

For docs/run_real.sh. Leaves RESULT--FILE.txt, which is what evaluate.py prints, and
RESULT--FILE.jsonl with every completion. What is there is not done again.
"""
from __future__ import annotations

import contextlib
import os
import sys


ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)


def main():
    result, model, *rest = sys.argv[1:]
    flags_from = next((i for i, word in enumerate(rest) if word.startswith("--")), len(rest))
    files, flags = rest[:flags_from], rest[flags_from:]
    for file in files:
        stem = f"{result}--{os.path.basename(file).removesuffix('.jsonl')}"
        if not os.path.exists(f"{stem}.txt"):
            evaluate_one(stem, ["--model", model, "--data", file, *flags])


def evaluate_one(stem: str, flags: list[str]) -> None:
    """Both files are written beside and renamed, so that they are there once they are whole."""
    import evaluate    # here: nothing is to be imported if all is there
    text, completions = (f"{stem}.{os.getpid()}.writing{end}" for end in (".txt", ".jsonl"))
    sys.argv = ["evaluate.py", *flags, "--out", completions]
    try:
        with open(text, "w") as f, contextlib.redirect_stdout(f):
            evaluate.main()
        os.replace(completions, f"{stem}.jsonl")
        os.replace(text, f"{stem}.txt")
    finally:
        for path in (text, completions):
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)


if __name__ == "__main__":
    from support.common import exit_cleanly
    exit_cleanly(main)
