r"""Pairs of answers, MATH-like, for comparison with math-verify.

    python tests/answer_pairs.py [--pairs 1000]      how often grader.py and math-verify agree

Each family below makes, from random numbers, several spellings of one answer, and answers that are
close to it and wrong. What is right is known from how they are made, by neither of the two.
"""
from __future__ import annotations

import argparse
import os
import random
import sys
from collections import Counter
from fractions import Fraction

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from grader import grade_boxed  # noqa: E402


def integers(r):
    n = r.randint(2, 9999)
    same = [f"{n}", f"{n}.0", f"x={n}", rf"{n}\text{{ cm}}", f"+{n}", rf"\mathbf{{{n}}}", f"({n})"]
    if n >= 1000:
        same += [f"{n:,}", rf"{n // 1000}{{,}}{n % 1000:03}"]
    return same, [f"-{n}", f"{n + 1}", f"{n}0", f"{n}.5", f"{n}x", f"{n}, {n + 1}", f"{n}^2"]


def fractions(r):
    q = r.randint(3, 9)
    p = r.choice([p for p in range(1, 30) if Fraction(p, q).denominator == q])
    same = [rf"\frac{{{p}}}{{{q}}}", rf"\dfrac{{{p}}}{{{q}}}", f"{p}/{q}",
            rf"\frac{{{2 * p}}}{{{2 * q}}}", rf"y=\frac{{{p}}}{{{q}}}"]
    if p < 10:
        same.append(rf"\frac{p}{q}")
    return same, [rf"\frac{{{q}}}{{{p}}}", rf"-\frac{{{p}}}{{{q}}}", f"{p}", f"{p}/{q + 1}",
                  f"{p / q:.2f}1", rf"\frac{{{p}}}{{{q}x}}"]


def decimals(r):
    n = r.randint(1, 999) * 4 + r.choice([1, 2, 3])
    value = Fraction(n, 4)
    text = f"{float(value)}"
    return ([text, text + "0", f"{n}/4", rf"\frac{{{n}}}{{4}}", rf"\${text}"],
            [f"-{text}", f"{float(value) + 0.01:.2f}", f"{int(value)}", text.replace(".", "")])


def roots(r):
    a, b = r.randint(2, 9), r.choice([2, 3, 5, 6, 7])
    same = [rf"{a}\sqrt{{{b}}}", rf"{a}\sqrt{b}", rf"{a} \sqrt {{{b}}}", rf"x = {a}\sqrt{{{b}}}"]
    return same, [rf"{b}\sqrt{{{a}}}", rf"\sqrt{{{b}}}", f"{a}", rf"-{a}\sqrt{{{b}}}",
                  rf"{a}+\sqrt{{{b}}}", rf"{a}\sqrt{{{b + 1}}}"]


def circles(r):
    a = r.randint(2, 99)
    return ([rf"{a}\pi", rf"{a} \pi", rf"{a}\pi\text{{ cm}}", rf"A = {a}\pi"],
            [f"{a}", rf"{a}\pi^2", rf"-{a}\pi", rf"{a + 1}\pi", r"\pi"])


def polynomials(r):
    a, b, c = (r.randint(2, 9) for _ in range(3))
    same = [f"{a}x^2+{b}x+{c}", f"{a}x^{{2}} + {b}x + {c}", f"y = {a}x^2 + {b}x + {c}"]
    return same, [f"{a}x^2+{b}x-{c}", f"{a}x^3+{b}x+{c}", f"{c}", f"{a}x^2+{c}", f"{a}x+{b}x+{c}"]


def points(r):
    a, b = r.sample(range(-9, 10), 2)
    same = [f"({a},{b})", f"({a}, {b})", rf"\left({a}, {b}\right)", f"(x,y) = ({a},{b})",
            f"({a}.0,{b})"]
    return same, [f"({b},{a})", f"({a},{b + 1})", rf"\{{{a},{b}\}}", f"[{a},{b}]",
                  f"({a},{b},0)"]


def intervals(r):
    a = r.randint(-9, 3)
    b = a + r.randint(1, 9)
    same = [f"[{a},{b})", rf"\left[{a}, {b}\right)", rf"x \in [{a},{b})"]
    return same, [f"({a},{b})", f"[{a},{b}]", f"[{a},{b + 1})", f"{a},{b}", f"[{b},{a})"]


def sets(r):
    a, b, c = r.sample(range(1, 60), 3)
    same = [rf"\{{{a},{b},{c}\}}", rf"\{{{c}, {a}, {b}\}}", rf"\left\{{{b},{a},{c}\right\}}"]
    return same, [rf"\{{{a},{b}\}}", rf"\{{{a},{b},{c + 60}\}}", f"{a}", f"({a},{b},{c})"]


def equations(r):
    a, b, c = r.randint(2, 9), r.randint(2, 9), r.randint(1, 30)
    same = [f"{a}x + {b}y = {c}", f"{a}x+{b}y={c}", rf"{a} x + {b} y \, = \, {c}"]
    return same, [f"{c}", f"{a}x - {b}y = {c}", f"{a + 1}x+{b}y={c}", f"{a}x+{b}y={c + 1}",
                  f"y={c}"]


def inequalities(r):
    a = r.randint(1, 40)
    return ([rf"x \le {a}", rf"x\leq {a}", f"x ≤ {a}"],
            [f"{a}", rf"x < {a}", rf"x \ge {a}", f"x = {a}", rf"x \le {a + 1}", rf"x \ne {a}"])


def matrices(r):
    a, b, c, d = r.sample(range(-9, 10), 4)
    form = r"\begin{{pmatrix}}{0}{4}&{4}{1}{4}\\{4}{2}{4}&{4}{3}\end{{pmatrix}}"
    same = [form.format(a, b, c, d, ""), form.format(a, b, c, d, " ")]
    return same, [form.format(b, a, c, d, ""), form.format(a, b, c, d + 1, " "), f"{a}"]


def degrees(r):
    a = r.randint(2, 179)
    return ([rf"{a}^\circ", f"{a}", rf"{a}^{{\circ}}", f"{a}°"],
            [f"{a + 1}", rf"-{a}^\circ", rf"\frac{{{a}}}{{180}}"])


def percents(r):
    a = r.randint(2, 99)
    return [rf"{a}\%", f"{a}%", rf"{a} \%"], [f"{a + 1}", rf"{a + 1}\%", f"-{a}"]


FAMILIES = (integers, fractions, decimals, roots, circles, polynomials, points, intervals, sets,
            equations, inequalities, matrices, degrees, percents)


def pairs(count: int, seed: int = 0):
    """(family, reference, answer, whether it is right), half of them right."""
    r = random.Random(seed)
    found = []
    for i in range(count):
        family = FAMILIES[i // 2 % len(FAMILIES)]
        same, others = family(r)
        others = [answer for answer in others if answer not in same]
        # The reference is the plainest spelling, as data sets have it.
        found.append((family.__name__, same[0], r.choice(same if i % 2 else others), bool(i % 2)))
    return found


def by_math_verify(reference: str, answer: str) -> float:
    from math_verify import parse, verify

    return float(verify(parse(f"${reference}$"), parse(f"\\boxed{{{answer}}}")))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=1000)
    count = parser.parse_args().pairs
    agreed = Counter()
    for family, reference, answer, right in pairs(count):
        ours = grade_boxed(f"\\boxed{{{answer}}}", reference)
        theirs = by_math_verify(reference, answer)
        agreed["both"] += ours == theirs
        agreed["grader.py is right"] += ours == right
        agreed["math-verify is right"] += theirs == right
        if ours != right or theirs != right:
            print(f"{family:<12} {answer!r} for {reference!r}: made {'right' if right else 'wrong'}"
                  f", grader.py {ours:g}, math-verify {theirs:g}")
    print(f"{count} pairs: the two agree on {agreed['both']}; grader.py is right on "
          f"{agreed['grader.py is right']}, math-verify on {agreed['math-verify is right']}")


if __name__ == "__main__":
    main()
