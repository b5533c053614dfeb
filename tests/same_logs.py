"""Are the logs of two sets of runs equal, to the bit, but for times and memory?

    python tests/same_logs.py OLD NEW       folders of runs; each run of OLD must be in NEW

What it is for: a change that should not change any number. Train a few presets before it and after
it (`train.py --algo NAME --steps 40 --seed 0 --threads 1 --out OLD/NAME`) and compare.
"""
import json
import os
import sys


def lines(path):
    """The records of a .jsonl file, without what a clock, an allocator or a path decides."""
    with open(path, encoding="utf-8") as f:
        records = [json.loads(line) for line in f]
    varies = lambda name: name.startswith(("time/", "memory/")) or name == "source"    # a path
    return [{name: r[name] for name in r if not varies(name)} for r in records]


def main(old, new):
    runs = sorted(r for r in os.listdir(old) if os.path.isfile(f"{old}/{r}/metrics.jsonl"))
    different = 0
    for run in runs:
        for kind in ("metrics", "samples"):
            a, b = lines(f"{old}/{run}/{kind}.jsonl"), lines(f"{new}/{run}/{kind}.jsonl")
            first = next((x["step"] for x, y in zip(a, b) if x != y), None)
            same = a == b
            different += not same
            where = "equal" if same else f"DIFFERENT, first at step {first}"
            print(f"{run:36} {kind:8} {len(a):4} lines  {where}")
    sys.exit(bool(different) or not runs)


if __name__ == "__main__":
    main(*sys.argv[1:])
