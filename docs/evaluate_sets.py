"""evaluate.py on several files, in one process: on a GPU starting takes longer than sampling.

    python docs/evaluate_sets.py RESULT MODEL FILE [FILE …] [flags of evaluate.py]

For docs/run_real.sh. Leaves RESULT--FILE.txt, which is what evaluate.py prints, and
RESULT--FILE.jsonl with every completion. What is there is not done again.
"""
from __future__ import annotations

import contextlib
import os
import sys


sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import evaluate  # noqa: E402
from support.common import exit_cleanly, written_whole  # noqa: E402


def main():
    result, model, *rest = sys.argv[1:]
    flags_from = next((i for i, word in enumerate(rest) if word.startswith("--")), len(rest))
    files, flags = rest[:flags_from], rest[flags_from:]
    for file in files:
        stem = f"{result}--{os.path.basename(file).removesuffix('.jsonl')}"
        if not os.path.exists(f"{stem}.txt"):    # the last to be written
            evaluate_one(stem, ["--model", model, "--data", file, *flags])


def evaluate_one(stem: str, flags: list[str]) -> None:
    completions = f"{stem}.jsonl"
    with contextlib.suppress(FileNotFoundError):
        os.remove(completions)    # of an evaluation that was cut off before its .txt
    sys.argv = ["evaluate.py", *flags, "--out", completions]
    with written_whole(f"{stem}.txt") as text, contextlib.redirect_stdout(text):
        evaluate.main()


if __name__ == "__main__":
    exit_cleanly(main)
