"""Problems for docs/run_contrast.sh: those of GSM8K that a small model can learn to solve now and
then.

    python docs/contrast_data.py TRAIN.jsonl DIR

TRAIN.jsonl is GSM8K's training file; its lines after the 7,000th are not used. Of the problems with
at most two calculations (`<<3*4=12>>`; 2,497 of them) it writes to DIR

    start.jsonl       the first 1,250, with gold, for SFT to make the start model
    held_out.jsonl    the next 247
    rl.jsonl          the other 1,000: every fourth with gold, the rest with an answer alone
    golds.jsonl       those of rl.jsonl that have gold
"""
from __future__ import annotations

import os
import sys

from experiments import answer_alone, read, write


FOR_START, HELD_OUT = 1250, 247


def main():
    source, folder = sys.argv[1:]
    short = [r for r in read(source)[:7000] if r["answer"].count("<<") <= 2]
    first_of_rl = FOR_START + HELD_OUT
    of_rl = short[first_of_rl:]
    with_gold = of_rl[::4]
    rest = [answer_alone(r) for i, r in enumerate(of_rl) if i % 4]
    files = {
        "start": short[:FOR_START],
        "held_out": short[FOR_START:first_of_rl],
        "rl": with_gold + rest,
        "golds": with_gold}
    for name, part in files.items():
        write(os.path.join(folder, f"{name}.jsonl"), part)
        print(f"{len(part):5} {name}.jsonl")


if __name__ == "__main__":
    main()
