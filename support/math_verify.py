"""`--reward math_verify`: the package math-verify as the reward, in a process of its own.

The package hands what a model wrote to sympy, which can take for ever (10^{10^{10}}) or all memory.
So it works in a child, under limits on time and memory; a response it cannot judge earns 0.
"""
from __future__ import annotations

import atexit
import json
import select
import subprocess
import sys

from support.common import InputError


SECONDS = 10       # for one response
START_SECONDS = 60    # for loading the package

CHILD = """
import json, logging, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl-C lets the parent finish its step
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))
except (ImportError, ValueError, OSError):
    pass  # not on this system; the limit on time still holds
try:
    from math_verify import parse, verify
except ImportError as e:
    print(json.dumps(str(e)), flush=True)
    sys.exit()
logging.disable(logging.CRITICAL)
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    response, reference = json.loads(line)
    try:
        gold = parse(reference) or parse("$" + reference + "$")
        value = float(verify(gold, parse(response)))
    except Exception:
        value = 0.0
    print(json.dumps(value), flush=True)
"""


class MathVerify:
    """(response, reference) -> 1.0 or 0.0. Raises InputError where the package is missing."""
    def __init__(self):
        self.child = None
        self.start()
        atexit.register(lambda: self.child.kill())    # it may be lost in a long product

    def start(self) -> None:
        self.child = subprocess.Popen(
            [sys.executable, "-P", "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL)
        said = self.answer(START_SECONDS)
        if said != "ready":
            raise InputError(f"--reward math_verify: pip install math-verify ({said})")

    def answer(self, seconds: float):
        """What the child says within this time; None if it says nothing."""
        ready, _, _ = select.select([self.child.stdout], [], [], seconds)
        line = self.child.stdout.readline() if ready else b""
        return json.loads(line) if line else None

    def __call__(self, response: str, reference: str) -> float:
        job = json.dumps([response, reference]) + "\n"
        value = None
        try:
            self.child.stdin.write(job.encode())
            self.child.stdin.flush()
            value = self.answer(SECONDS)
        except OSError:    # it has died, of its memory limit perhaps
            pass
        if value is None:
            self.child.kill()
            self.child.wait()
            self.start()
        return value or 0.0
