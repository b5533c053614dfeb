r"""data.py: what the grader accepts, what the readers read, what the tokenizer writes, and what is refused.

Most of the file is tables: the long one at the top says, row by row, which answers are the same. The grader is the one
part of the program that training works against, so a row that expects 0.0 matters as much as one that expects 1.0.
"""
import gzip
import json
import time
from fractions import Fraction

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import data
from support import chat
from data import INSTRUCTIONS, Problem, grade_group, load_reward, load_tokenizer, prepare, read_problems
from gcpo import Group
from grader import canonical, extract_answer, grade, last_boxed, last_number
from support.common import InputError


property_test = settings(max_examples=150, deadline=None, derandomize=True, database=None)


# ---------------------------------------------------------------------------------------------------------------------
# Helpers

def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def refusal(call, *words):
    """call() must raise InputError with one line that says all of `words`; returns the line."""
    with pytest.raises(InputError) as caught:
        call()
    line = str(caught.value)
    assert line.strip() and len(line.splitlines()) == 1 and len(line) < 800, line
    assert all(word in line for word in words), line
    return line


def by_name(table):
    """pytest.mark.parametrize arguments for a dict of rows, so that a failing row is called by its name."""
    return [pytest.param(*row, id=name) for name, row in table.items()]


# ---------------------------------------------------------------------------------------------------------------------
# The grader

TALK = " which is correct, because every step was checked" * 10    # about 500 characters, no digit
GRADES = [
    # response                                          answer         grade
    # --- markers: ####, then \boxed, then "answer is"; of several the last; nothing else counts
    ("It is 9 + 9.\n#### 18",                           "18",          1.0),
    ("It is 9 + 9.\n####18",                            "18",          1.0),
    ("####\t18\nThat was fun. 19 candles.",             "18",          1.0),
    ("#### 17\nNo, wait.\n#### 18",                     "18",          1.0),
    ("#### 18\nNo, wait.\n#### 17",                     "18",          0.0),
    ("#### 17 #### 18",                                 "18",          1.0),
    ("#### 18 #### 17",                                 "18",          0.0),
    ("#### 18\n####",                                   "18",          1.0),
    ("#### 18\n#### \\$",                               "18",          1.0),
    ("\\boxed{17}\n#### 18",                            "18",          1.0),
    ("#### 18\n\\boxed{17}",                            "18",          1.0),
    ("#### 17\n\\boxed{18}",                            "18",          0.0),
    ("The answer is 18. \\boxed{17}",                   "18",          0.0),
    ("\\boxed{18} so the answer is 17",                 "18",          1.0),
    ("First \\boxed{17}, then \\boxed{18}",             "18",          1.0),
    ("First \\boxed{18}, then \\boxed{17}",             "18",          0.0),
    ("\\boxed{18}, and then \\boxed{17",                "18",          1.0),
    ("$\\boxed {18}$.",                                 "18",          1.0),
    ("The answer is 18.",                               "18",          1.0),
    ("The answer is: 18",                               "18",          1.0),
    ("Final Answer: $18",                               "18",          1.0),
    ("The answer is 17. No: the answer is 18.",         "17",          0.0),
    ("The answer is 17.\nNo, the answer is 18.",        "18",          1.0),
    ("The answer isn't 18",                             "18",          0.0),
    ("I got 18. This took 3 steps",                     "18",          0.0),
    ("I got 18. This took 3 steps",                     "3",           0.0),
    ("18",                                              "18",          0.0),
    ("= 18",                                            "18",          0.0),
    ("### 18",                                          "18",          0.0),
    ("# # # # 18",                                      "18",          0.0),
    ("####\n18",                                        "18",          0.0),
    ("####",                                            "18",          0.0),
    ("\\boxed{}",                                       "18",          0.0),
    ("The answer is",                                   "18",          0.0),
    ("",                                                "18",          0.0),
    # --- dress: currency, percent, commas, stars, a final period, LaTeX
    ("#### $18",                                        "18",          1.0),
    ("#### \\$18",                                      "18",          1.0),
    ("#### $18$",                                       "18",          1.0),
    ("#### $ 18",                                       "$18.00",      1.0),
    ("#### 18.",                                        "18",          1.0),
    ("#### 18 .",                                       "18",          1.0),
    ("#### 18.00",                                      "18",          1.0),
    ("#### 18",                                         "18.0",        1.0),
    ("#### **18**",                                     "18",          1.0),
    ("#### *18*.",                                      "18",          1.0),
    ("**#### 18**",                                     "18",          1.0),
    ("#### `18`",                                       "18",          1.0),
    ("#### 18%",                                        "18",          1.0),
    ("#### 18\\%",                                      "18 %",        1.0),
    ("#### 18\r\n",                                     "18",          1.0),
    ("#### 1,080",                                      "1080",        1.0),
    ("#### 1080",                                       "1,080",       1.0),
    ("#### 1,234,567.50",                               "1234567.5",   1.0),
    ("\\boxed{1{,}080}",                                "1080",        1.0),
    ("\\boxed{10,\\!800}",                              "10800",       1.0),    # how MATH writes thousands
    ("\\boxed{10\\,800}",                               "10800",       1.0),
    ("\\boxed{\\text{18}}",                             "18",          1.0),
    ("\\boxed{\\mathbf{18}}",                           "18",          1.0),
    ("\\boxed{\\left( 3, 4 \\right)}",                  "(3,4)",       1.0),
    ("The answer is \\(18\\).",                         "18",          1.0),
    ("The answer is $x = 18$.",                         "18",          1.0),
    ("#### 12 + 6 = 18",                                "18",          1.0),
    ("#### 12 + 6 = 18",                                "12",          0.0),
    # --- units, and talk after the answer
    ("#### 18 apples",                                  "18",          1.0),
    ("#### $18 per week",                               "18",          1.0),
    ("#### 18 m",                                       "18",          1.0),
    ("#### $18 a week",                                 "18",          1.0),
    ("#### 18 (apples)",                                "18",          1.0),
    ("\\boxed{18\\text{ cm}}",                          "18",          1.0),
    ("\\boxed{18\\,\\mathrm{cm}^2}",                    "18",          1.0),
    ("#### 18, which is correct...",                    "18",          1.0),
    ("#### 18. That was hard",                          "18",          1.0),
    ("#### 18" + TALK,                                  "18",          1.0),
    ("#### 18\n" + TALK,                                "18",          1.0),
    ("#### 17" + TALK,                                  "18",          0.0),
    ("#### Paris" + TALK,                               "Paris",       0.0),
    ("####" + TALK + " 18",                             "18",          0.0),
    # --- values: exact, never rounded, never a substring
    ("#### 007",                                        "7",           1.0),
    ("#### 7",                                          "007",         1.0),
    ("#### .5",                                         "1/2",         1.0),
    ("#### 0.75",                                       "3/4",         1.0),
    ("#### 3 / 4",                                      "0.750",       1.0),
    ("#### 6/8",                                        "3/4",         1.0),
    ("#### 36/2",                                       "18",          1.0),
    ("\\boxed{\\frac{3}{4}}",                           "0.75",        1.0),
    ("\\boxed{\\dfrac{3}{4}}",                          "\\tfrac{6}{8}", 1.0),
    ("\\boxed{-\\frac{3}{4}}",                          "\\frac{-3}{4}", 1.0),
    ("\\boxed{\\frac{3}{-4}}",                          "-0.75",       1.0),
    ("\\boxed{-\\frac{-3}{4}}",                         "3/4",         1.0),
    ("\\boxed{\\frac{ 3 }{ 4 }}",                       "3/4",         1.0),
    ("\\boxed{\\frac{4}{3}}",                           "3/4",         0.0),
    ("#### 0.33",                                       "1/3",         0.0),
    ("#### 0.3333333333333333",                         "1/3",         0.0),
    ("#### 18.0000000000000001",                        "18",          0.0),
    ("#### 9007199254740993",                           "9007199254740992", 0.0),
    ("#### 118",                                        "18",          0.0),
    ("#### 180",                                        "18",          0.0),
    ("#### 18.5",                                       "18",          0.0),
    ("#### 1.8",                                        "18",          0.0),
    ("#### 18.5.3",                                     "18.5",        0.0),
    ("#### 0",                                          "-0",          1.0),
    # --- signs
    ("#### -7",                                         "-7",          1.0),
    ("####-7",                                          "-7",          1.0),
    ("#### - 7",                                        "-7",          1.0),
    ("#### \u22127",                                    "-7",          1.0),    # U+2212, the minus sign of typesetting
    ("#### \u2212$7",                                   "-7",          1.0),
    ("#### $-7",                                        "-7",          1.0),
    ("#### -$7.00",                                     "-7",          1.0),
    ("#### -7",                                         "7",           0.0),
    ("#### 7",                                          "-7",          0.0),
    ("#### 3-7",                                        "-7",          0.0),
    # --- two numbers are no number: ranges, lists, ratios, mixed fractions
    ("range 10-15",                                     "15",          0.0),
    ("#### 10-15",                                      "10",          0.0),
    ("#### 10-15",                                      "15",          0.0),
    ("#### 10-15",                                      "-5",          0.0),
    ("#### 10 \u2212 15",                               "10",          0.0),
    ("#### 10 to 15",                                   "10",          0.0),
    ("#### 18 or 19",                                   "18",          0.0),
    ("#### 18 and 19",                                  "18",          0.0),
    ("#### 18, 19",                                     "18",          0.0),
    ("#### 18, 19",                                     "19",          0.0),
    ("#### 18; 19",                                     "18",          0.0),
    ("#### 1,2",                                        "12",          0.0),
    ("#### 1,2",                                        "1, 2",        1.0),
    ("#### -21",                                        "-2,1",        0.0),
    ("\\boxed{(3,4)}",                                  "(3, 4)",      1.0),
    ("\\boxed{(3,4)}",                                  "(4,3)",       0.0),
    ("#### 1 8",                                        "18",          0.0),
    ("#### 1 1/2",                                      "11/2",        0.0),
    ("#### 3:4",                                        "3",           0.0),
    ("#### 10:30 am",                                   "10",          0.0),
    ("#### 2 million",                                  "2",           0.0),
    # --- expressions are compared as text, whole
    ("\\boxed{x+1}",                                    "x + 1",       1.0),
    ("\\boxed{2x+1}",                                   "2",           0.0),
    ("\\boxed{2^{10}}",                                 "2",           0.0),
    ("\\boxed{2\\sqrt{3}}",                             "2\\sqrt{3}",  1.0),
    ("\\boxed{2\\sqrt{3}}",                             "2",           0.0),
    ("\\boxed{\\frac{1}{\\sqrt{2}}}",                   "\\frac{1}{\\sqrt{2}}", 1.0),
    ("\\boxed{2}",                                      "2(x+1)",      0.0),
    ("\\boxed{2(x-5)}",                                 "2(x+1)",      0.0),
    ("\\boxed{2}",                                      "2 x + 1",     0.0),
    ("\\boxed{2 i}",                                    "2",           0.0),
    ("#### 2 sqrt(3)",                                  "2",           0.0),
    ("\\boxed{5}",                                      "x >= 5",      0.0),
    ("\\boxed{2}",                                      "x=5, y=2",    0.0),
    ("#### x != 3",                                     "3",           0.0),
    ("#### yes.",                                       "Yes",         1.0),
    ("#### (B)",                                        "(b)",         1.0),
    ("#### (B)",                                        "(C)",         0.0),
    # --- nothing is evaluated, nothing divides by zero
    ("#### 1/0",                                        "0",           0.0),
    ("#### 0/0",                                        "0",           0.0),
    ("\\boxed{\\frac{1}{0}}",                           "1",           0.0),
    ("#### 9+9",                                        "18",          0.0),
    ("#### 2*9",                                        "18",          0.0),
    ("#### 18**1",                                      "18",          0.0),
    ("#### __import__('os').getpid()",                  "18",          0.0),
    # --- numbers too long to be meant
    ("#### " + "1" * 10_000,                            "1",           0.0),
    ("#### " + "1" * 299 + "2",                         "1" * 299 + "3", 0.0),
    ("#### 18." + "0" * 400 + "5",                      "18",          0.0),
]


@pytest.mark.parametrize("response, answer, expected", [pytest.param(*row, id=f"{row[0][:40]!r} for {row[1][:20]}") for row in GRADES])
def test_grade(response, answer, expected):
    """Forbids bug 19: a grader that evaluates, or accepts a substring, any last number, or a number that is not the same."""
    assert grade(response, answer) == expected


@pytest.mark.parametrize("text", ["", "18", "I got 18. This took 3 steps", "x = 18", "### 18", "####", "#### \n18", "#### $ .", "\\boxed{}",
                                  "\\boxed{18", "boxed{18}", "the answer is", "answer", "range 10-15"])
def test_no_marker_is_no_answer(text):
    """Forbids an answer guessed from a text that names none, and an empty answer that equals an empty reference."""
    assert extract_answer(text) is None
    assert grade(text, text) == 0.0


@pytest.mark.parametrize("text, expected", [("I got 18. This took 3 steps", "3"), ("range 10-15", "15"), ("at 3:45", "45"), ("", None),
                                            ("it fell by -7.", "-7"), ("$1,080.50!", "2161/2"), ("none", None)])
def test_last_number_stands_apart(text, expected):
    """Forbids the lenient last-number rule, which is for evaluation only, from leaking into the grade."""
    assert last_number(text) == expected
    assert extract_answer(text) is None


def test_boxed_braces():
    r"""Forbids a \boxed pattern that stops at the first closing brace, or takes a box that never closes."""
    assert last_boxed(r"\boxed{\frac{1}{\sqrt{2}}} and {more}") == r"\frac{1}{\sqrt{2}}"
    assert last_boxed(r"\boxed{a} \boxed{\{1,2\}} } \boxed{b") == r"\{1,2\}"
    assert last_boxed(r"\boxed{\boxed{18}}") == "18"
    assert last_boxed("no box { } here") is None


def test_grading_is_fast():
    """Forbids quadratic scans: a collapsed policy repeats one token to the length limit, and every such row is graded."""
    rows = ["####" * 5000, "####\n" * 5000, "#### " + "1" * 20_000, "#### " + "1," * 10_000, "#### " + "1/" * 10_000,
            "#### -" + "- " * 10_000, "#### \\text{" * 2000, "#### " + "\\frac{1}{" * 2000, "#### " + "=" * 20_000,
            "answer is " * 3000, "the answer is" + " :" * 10_000,
            "{" * 20_000, "\\boxed" + " " * 20_000, "\\boxed{1}" * 3000, "\\boxed{" * 2500]
    for row in rows:
        start = time.process_time()      # the machine may be busy
        assert grade(row, "18") == 0.0
        last_number(row)
        assert time.process_time() - start < 1, f"{row[:20]!r}… took {time.process_time() - start:.1f} s"


@st.composite
def dressed_numbers(draw):
    """(text, value): a random number in the clothes people put on numbers, and its exact value."""
    kind = draw(st.sampled_from(["integer", "decimal", "fraction"]))
    whole = draw(st.integers(0, 10**draw(st.integers(1, 15))))
    body, value = draw(st.sampled_from([f"{whole}", f"{whole:,}"])), Fraction(whole)
    if kind == "decimal":
        digits = draw(st.text("0123456789", min_size=1, max_size=6))
        body, value = f"{body}.{digits}" + "0" * draw(st.integers(0, 3)), value + Fraction(int(digits), 10 ** len(digits))
    if kind == "fraction":
        under = draw(st.integers(1, 999))
        body, value = draw(st.sampled_from([f"{whole}/{under}", f"{whole:,} / {under}", f"\\frac{{{whole}}}{{{under}}}"])), value / under
    sign = draw(st.sampled_from(["", "-", "\u2212", "- "]))
    currency = draw(st.sampled_from(["", "$", "\\$", "$ "]))
    body = draw(st.sampled_from([sign + currency + body, currency + sign + body]))
    outside = draw(st.sampled_from(["{}", "{}.", " {}  ", "**{}**", "${}$", "`{}`", "{} apples", "{}%", "\\text{{}}",
                                    "\\left{}\\right", "{}, as said"]))
    return outside.replace("{}", body, 1), -value if sign else value


@property_test
@given(dressed_numbers(), st.fractions(max_denominator=1000).filter(bool))
def test_dress_changes_nothing(number, difference):
    """Forbids clothes that change a number's value, and two different numbers that grade as equal."""
    text, value = number
    assert grade(f"Two steps, 3 numbers.\n#### {text}", str(value)) == 1.0
    assert grade(f"#### {value}", text) == 1.0
    assert grade(f"#### {text}", str(value + difference)) == 0.0


PIECES = ["####", "\\boxed{", "{", "}", "answer is", "\n", "\r", "\u2028", "\0", " ", "0", "1", "23", "4,5", "e9",
          "\u00b2", "\u0663", "\uff15", ",", ".", "/", "-", "--", "\u2212", "$", "%", "**", "_", "=", "(", ")", "!", "x", "inf", "nan", "\ud83d",
          "\\", "\\frac{1}{0}", "-\\frac{", "\\text{"]


@property_test
@given(st.one_of(st.lists(st.sampled_from(PIECES), max_size=30).map("".join), st.text()), st.text("0123456789,./- $", max_size=10))
def test_grading_never_raises(text, answer):
    """Forbids a text that crashes the grader hours into a run, and an answer found that is empty."""
    found = extract_answer(text)
    assert found is None or found
    assert isinstance(canonical(text), str)
    assert grade(text, answer) in (0.0, 1.0) and grade(answer, text) in (0.0, 1.0)
    assert grade(f"#### {text}", text) in (0.0, 1.0)
    last_number(text)


# ---------------------------------------------------------------------------------------------------------------------
# Files of problems

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
NESTED = r"Half of it, so \boxed{\frac{1}{\sqrt{2}}}."
FORMATS = {  # name: record, question, answer, the solution inside the gold (None: the set has none)
    "gsm8k": ({"question": "Q?", "answer": "48/2 = <<48/2=24>>24 in May.\nIn all <<48+24=72>>72.\n#### 72"},
              "Q?", "72", "48/2 = 24 in May.\nIn all 72."),
    "gsm8k comma": ({"question": "Q?", "answer": "Much.\n#### 1,080"}, "Q?", "1,080", "Much."),
    "gsm8k negative": ({"question": "Q?", "answer": "Less.\n#### -7"}, "Q?", "-7", "Less."),
    "mawps": ({"input": "Q?", "target": 43.0}, "Q?", "43", None),
    "mawps fraction": ({"input": "Q?", "target": 0.25}, "Q?", "0.25", None),
    "mawps tiny": ({"input": "Q?", "target": 0.00001}, "Q?", "0.00001", None),
    "svamp": ({"Body": "Ten hens.", "Question": "How many?", "Answer": 145.0, "Equation": "( 290.0 / 2.0 )"},
              "Ten hens. How many?", "145", None),
    "asdiv": ({"body": "Apples.", "question": "How many?", "answer": "9 (apples)", "formula": "7+2=9"}, "Apples. How many?", "9", None),
    "math": ({"problem": "Q?", "solution": NESTED, "level": "Level 5"}, "Q?", r"\frac{1}{\sqrt{2}}", NESTED),
    "math answer": ({"problem": "Q?", "solution": NESTED, "answer": r"\frac{1}{\sqrt{2}}"}, "Q?", r"\frac{1}{\sqrt{2}}", NESTED),
    "math no box": ({"problem": "Q?", "solution": "Five.", "answer": "5"}, "Q?", "5", "Five."),
    "aime": ({"id": 60, "problem": "Q?", "answer": "033", "solution": "So 33."}, "Q?", "033", "So 33."),
    "amc": ({"problem": "Q?", "answer": 27.0, "question": "Q?"}, "Q?", "27", None),
    "verl text": ({"prompt": "Q?", "reward_model": {"style": "rule", "ground_truth": "34"}, "data_source": "d"}, "Q?", "34", None),
    "verl chat": ({"prompt": CHAT, "reward_model": {"style": "rule", "ground_truth": 34}, "ability": "math"}, CHAT, "34", None),
    "dapo": ({"prompt": "Q?", "answer": "34"}, "Q?", "34", None),
    "plain": ({"question": "Q?", "answer": "  5 "}, "Q?", "5", None),
    "plain chat": ({"question": CHAT, "answer": 5}, CHAT, "5", None),
    "unicode": ({"question": "Où? 雪 😀", "answer": "雪"}, "Où? 雪 😀", "雪", None),
}


def jsonl(*records):
    return b"".join(json.dumps(r, ensure_ascii=False).encode() + b"\n" for r in records)


@pytest.mark.parametrize("answer_format, last_line", [("hash", "#### {}"), ("boxed", "\\boxed{}")])
@pytest.mark.parametrize("record, question, answer, solution", by_name(FORMATS))
def test_formats(tmp_path, record, question, answer, solution, answer_format, last_line):
    """Forbids a format read into the wrong fields, and a gold that the grader would call wrong."""
    path = write(tmp_path / "a.jsonl", jsonl(record))
    [problem] = read_problems(path, answer_format)
    assert (problem.question, problem.answer) == (question, answer)
    last_line = last_line.replace("{}", "{" + answer + "}" if answer_format == "boxed" else answer)
    if solution is None:
        assert problem.gold is None                                    # no "#### 43" unless asked for: it teaches to skip the reasoning
        [problem] = read_problems(path, answer_format, answer_only_gold=True)
        assert problem.gold == last_line
    elif answer_format == "boxed" and "\\boxed" in solution:
        assert problem.gold == solution                                # says it already
    else:
        assert problem.gold == f"{solution}\n{last_line}"
    assert grade(problem.gold, problem.answer) == 1.0


def test_own_gold_is_taken_as_it_is(tmp_path):
    """Forbids a record's own gold, a larger model's response, being edited, or lost to the data set's solution."""
    own = "Think: <<2+2=4>> 4.\n\\boxed{4}"
    records = [{"question": "Q?", "answer": answer, "gold": own} for answer in ("4", "Short.\n#### 4")]
    path = write(tmp_path / "a.jsonl", jsonl(*records))
    assert [p.gold for p in read_problems(path)] == [own, own]


def test_zero_padded_answers_grade():
    """Forbids AIME's 033 graded as text: a model that writes 33 is right."""
    assert grade("#### 33", "033") == grade("\\boxed{033}", "33") == 1.0


RECORDS = [{"question": f"Question {i}: où?", "answer": i} for i in (1, 2, 3)]
LINES = jsonl(*RECORDS)
FILES = {
    "jsonl": ("a.jsonl", LINES, "line"),
    "no last newline": ("a.jsonl", LINES.rstrip(), "line"),
    "CRLF": ("a.jsonl", LINES.replace(b"\n", b"\r\n"), "line"),
    "BOM": ("a.jsonl", b"\xef\xbb\xbf" + LINES, "line"),
    "BOM and CRLF": ("a.jsonl", b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n"), "line"),
    "gz": ("a.jsonl.gz", gzip.compress(LINES), "line"),
    "gz in two parts": ("a.jsonl.gz", gzip.compress(LINES[:40]) + gzip.compress(LINES[40:]), "line"),
    "gz BOM": ("a.jsonl.gz", gzip.compress(b"\xef\xbb\xbf" + LINES), "line"),
    "list": ("a.json", json.dumps(RECORDS, indent=1), "item"),
    "list BOM and CRLF": ("a.json", b"\xef\xbb\xbf" + json.dumps(RECORDS, indent=1).replace("\n", "\r\n").encode(), "item"),
    "list gz": ("a.json.gz", gzip.compress(json.dumps(RECORDS).encode()), "item"),
}


@pytest.mark.parametrize("name, content, unit", by_name(FILES))
def test_files(tmp_path, name, content, unit):
    """Forbids a first record lost to a byte-order mark, a carriage return inside an answer, and a wrong place in messages."""
    path = write(tmp_path / name, content)
    problems = read_problems(path)
    assert [(p.question, p.answer) for p in problems] == [(r["question"], str(r["answer"])) for r in RECORDS]
    assert [p.source for p in problems] == [f"{path}, {unit} {i}" for i in (1, 2, 3)]


GOOD = jsonl({"question": "Q?", "answer": 1})
BAD_FILES = {  # name: file, content, what the message must say
    "empty": ("a.jsonl", b"", "no problems"),
    "blank lines": ("a.jsonl", b"\n \r\n\n", "no problems"),
    "empty list": ("a.json", b"[]", "no problems"),
    "no JSON": ("a.jsonl", GOOD + b"\n{question: 1}\n", "line 3"),          # blank lines count
    "cut line": ("a.jsonl", GOOD + b'{"question": "Q?", "ans', "line 2"),
    "two on a line": ("a.jsonl", GOOD + GOOD.strip() + GOOD, "line 2"),
    "no object": ("a.jsonl", GOOD + b'"Q?"\n', "line 2"),
    "a list a line": ("a.jsonl", GOOD + b"[1, 2]\n", "line 2"),
    "null": ("a.jsonl", GOOD + b"null\n", "line 2"),
    "unknown fields": ("a.jsonl", GOOD + jsonl({"frage": "Q?", "antwort": 1}), "line 2: fields frage, antwort"),
    "no fields": ("a.jsonl", GOOD + b"{}\n", "line 2"),
    "no answer": ("a.jsonl", GOOD + jsonl({"question": "Q?"}), "line 2"),
    "null answer": ("a.jsonl", GOOD + jsonl({"question": "Q?", "answer": None}), "line 2"),
    "empty answer": ("a.jsonl", GOOD + jsonl({"question": "Q?", "answer": " "}), "line 2"),
    "answer of dress alone": ("a.jsonl", GOOD + jsonl({"question": "Q?", "answer": "$."}), "line 2"),
    "empty question": ("a.jsonl", GOOD + jsonl({"question": "", "answer": 1}), "line 2"),
    "empty GSM8K answer": ("a.jsonl", GOOD + jsonl({"question": "Q?", "answer": "Long.\n####"}), "line 2"),
    "GSM8K answer in a list": ("a.jsonl", GOOD + jsonl({"question": "Q?", "answer": ["Long.", "#### 3"]}), "line 2"),
    "no box": ("a.jsonl", GOOD + jsonl({"problem": "Q?", "solution": "It is five."}), "line 2"),
    "solution in a list": ("a.jsonl", GOOD + jsonl({"problem": "Q?", "solution": ["\\boxed{5}"]}), "line 2"),
    "bool answer": ("a.jsonl", GOOD + jsonl({"question": "Q?", "answer": True}), "line 2"),
    "bool answer, ASDiv": ("a.jsonl", GOOD + jsonl({"body": "B.", "question": "Q?", "answer": True}), "line 2"),
    "NaN answer": ("a.jsonl", GOOD + jsonl({"input": "Q?", "target": float("nan")}), "line 2"),
    "NaN answer, ASDiv": ("a.jsonl", GOOD + jsonl({"body": "B.", "question": "Q?", "answer": float("nan")}), "line 2"),
    "infinite answer": ("a.jsonl", GOOD + jsonl({"input": "Q?", "target": float("inf")}), "line 2"),
    "answer in a dict": ("a.jsonl", GOOD + jsonl({"question": "Q?", "answer": {"value": 1}}), "line 2"),
    "gold in a list": ("a.jsonl", GOOD + jsonl({"question": "Q?", "answer": 1, "gold": ["#### 1"]}), "line 2"),
    "verl without truth": ("a.jsonl", GOOD + jsonl({"prompt": "Q?", "reward_model": {"style": "rule"}}), "line 2"),
    "verl truth in the wrong place": ("a.jsonl", GOOD + jsonl({"prompt": "Q?", "reward_model": "rule"}), "line 2"),
    "chat of text": ("a.jsonl", GOOD + jsonl({"prompt": ["Q?"], "answer": 1}), "line 2"),
    "empty chat": ("a.jsonl", GOOD + jsonl({"prompt": [], "answer": 1}), "line 2"),
    "chat of pictures": ("a.jsonl", GOOD + jsonl({"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": 1}), "line 2"),
    "chat without role": ("a.jsonl", GOOD + jsonl({"prompt": [{"content": "Q?"}], "answer": 1}), "line 2"),
    "field twice": ("a.jsonl", GOOD + b'{"question": "Q?", "answer": 1, "answer": 2}\n', "line 2"),
    "not UTF-8": ("a.jsonl", GOOD + b'{"question": "\xff", "answer": 1}\n', "line 2"),
    "UTF-16": ("a.jsonl", GOOD.decode().encode("utf-16"), "line 1"),
    "deep": ("a.jsonl", GOOD + b"[" * 100_000 + b"\n", "line 2"),
    "deep answer": ("a.jsonl", GOOD + b'{"question": "Q?", "answer": ' + b"[" * 900 + b"]" * 900 + b"}\n", "line 2"),
    "5,000 digits": ("a.jsonl", GOOD + b'{"question": "Q?", "answer": ' + b"1" * 5000 + b"}\n", "line 2"),
    "list: no JSON": ("a.json", b'[{"question": "Q?",\n "answer": 1},\n {"question": }]', "line 3"),
    "list: an object": ("a.json", GOOD, "list"),
    "list: JSONL": ("a.json", GOOD + GOOD, "line 2"),
    "list: item": ("a.json", b"[" + GOOD + b", 7]", "item 2"),
    "list: fields": ("a.json", b"[" + GOOD + b', {"q": 1}]', "item 2"),
    "list: field twice": ("a.json", b'[{"question": "Q?", "answer": 1, "answer": 2}]', "twice"),
    "list: not UTF-8": ("a.json", b'["\xff"]', "cannot be read"),
    "list: deep": ("a.json", b"[" * 100_000, "cannot be read"),
    "gz: not gz": ("a.jsonl.gz", GOOD, "cannot be read"),
    "gz: cut": ("a.jsonl.gz", gzip.compress(LINES)[:-12], "cannot be read"),
    "gz: cut in the head": ("a.jsonl.gz", gzip.compress(LINES)[:6], "cannot be read"),
    "gz: spoiled": ("a.jsonl.gz", gzip.compress(LINES)[:15] + b"\xff" * 20, "cannot be read"),
    "gz: bad line": ("a.jsonl.gz", gzip.compress(GOOD + b"{\n"), "line 2"),
}


@pytest.mark.parametrize("name, content, says", by_name(BAD_FILES))
def test_bad_files(tmp_path, name, content, says):
    """Forbids a bad record skipped in silence or met with a traceback: one line that names the file and the place."""
    path = write(tmp_path / name, content)
    refusal(lambda: read_problems(path), path, says)


def test_no_such_file(tmp_path):
    """Forbids a traceback for a wrong path or a directory."""
    for path in (tmp_path / "none.jsonl", tmp_path):
        refusal(lambda: read_problems(str(path)), str(path))


def test_endless_line(tmp_path, monkeypatch):
    """Forbids reading a line without end (weights, a disk image) into memory; the longest allowed line is still read."""
    monkeypatch.setattr(data, "LONGEST_LINE", 200)
    longest = GOOD.rstrip().ljust(199) + b"\n"
    path = write(tmp_path / "a.jsonl", longest + b"{" + b" " * 10_000 + b"}\n")
    refusal(lambda: read_problems(path), f"{path}, line 2")
    assert len(read_problems(write(tmp_path / "b.jsonl", longest + GOOD))) == 2


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer

def make_folder(folder, config=None, generation=None, template_file=None, missing="", end_is_special=True):
    """A model folder without the model: one token per byte, and <s> put before every text by the tokenizer itself.

    `missing` characters are left out of the vocabulary; config and generation are the contents of the two JSON files."""
    folder.mkdir(exist_ok=True)
    characters = [c for c in sorted(pre_tokenizers.ByteLevel.alphabet()) if c not in missing]
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "<|end|>", *characters])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    (tokenizer.add_special_tokens if end_is_special else tokenizer.add_tokens)(["</s>", "<|end|>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    write(folder / "tokenizer_config.json", json.dumps({"eos_token": "</s>", "bos_token": "<s>"} if config is None else config))
    if generation is not None:
        write(folder / "generation_config.json", json.dumps(generation))
    if template_file is not None:
        write(folder / "chat_template.jinja", template_file)
    return str(folder)


BOS, EOS, END, EOS_CONFIG = 1, 2, 3, {"eos_token": "</s>", "bos_token": "<s>"}
STOPS = {  # name: tokenizer_config.json, generation_config.json, end token, stop tokens
    "tokenizer alone": (EOS_CONFIG, None, EOS, [EOS]),
    "as a dict": ({"eos_token": {"content": "</s>", "special": True}}, None, EOS, [EOS]),
    "int": (EOS_CONFIG, {"eos_token_id": END}, EOS, [EOS, END]),
    "list": (EOS_CONFIG, {"eos_token_id": [END, 0]}, EOS, [0, EOS, END]),
    "the same": (EOS_CONFIG, {"eos_token_id": [EOS]}, EOS, [EOS]),
    "null": (EOS_CONFIG, {"eos_token_id": None}, EOS, [EOS]),
    "generation alone": ({}, {"eos_token_id": [END, EOS]}, END, [EOS, END]),
}


@pytest.mark.parametrize("config, generation, end, stops", by_name(STOPS))
def test_stop_tokens(tmp_path, config, generation, end, stops):
    """Forbids bug 21: only one of several end tokens honoured; and a gold that ends with another than the tokenizer's own."""
    tokenizer = load_tokenizer(make_folder(tmp_path, config, generation))
    assert (tokenizer.end_id, tokenizer.stop_ids) == (end, stops)
    assert tokenizer.encode_response("#### 4")[-1] == end


def test_encode_response(tmp_path):
    """Forbids a response that begins with the tokenizer's own <s>, lacks its end token, or does not decode to itself."""
    tokenizer = load_tokenizer(make_folder(tmp_path))
    for text in ("#### 4", " 4\n", "", "où 雪 😀"):
        ids = tokenizer.encode_response(text)
        assert ids.dtype == torch.int64
        assert ids.tolist() == [*tokenizer.tokenizer.encode(text, add_special_tokens=False).ids, EOS]
        assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == text


def test_end_token_is_cut_even_if_it_is_not_special(tmp_path):
    """Forbids the end token's text inside the answer: in some folders it is an ordinary token, and "18</s>" is not 18."""
    tokenizer = load_tokenizer(make_folder(tmp_path, end_is_special=False))
    assert grade(tokenizer.decode(tokenizer.encode_response("#### 18")), "18") == 1.0


def test_saved_truncation_and_padding_are_off(tmp_path):
    """Forbids a gold or prompt cut or padded because tokenizer.json carries the settings of somebody's batch."""
    folder = make_folder(tmp_path)
    saved = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
    saved.enable_truncation(5)
    saved.enable_padding(length=500)
    saved.save(f"{folder}/tokenizer.json")
    tokenizer = load_tokenizer(folder, instruction="")
    assert len(tokenizer.encode_response("#### 1234567")) == 13
    assert [len(e) for e in tokenizer.encode_texts(["short", "a longer one"])] == [6, 13]


def test_prompt_without_template(tmp_path):
    """Forbids a prompt that differs from question, instruction, newline; messages without a template are lines."""
    folder = make_folder(tmp_path)
    for answer_format, instruction in INSTRUCTIONS.items():
        tokenizer = load_tokenizer(folder, answer_format)
        prompt = tokenizer.encode_prompt(Problem("2 + 2?", "4"))
        assert prompt[0] == BOS and (prompt == BOS).sum() == 1          # plain text gets what the tokenizer adds, once
        assert tokenizer.decode(prompt) == f"2 + 2?\n{instruction}\n"
    assert load_tokenizer(folder, instruction="Go.").prompt_texts([Problem(CHAT, "4")]) == ["Be brief.\nWhy?\nGo.\n"]
    assert load_tokenizer(folder, instruction="").prompt_texts([Problem("2 + 2?", "4")]) == ["2 + 2?\n"]


def test_instruction_is_added_once(tmp_path):
    """Forbids a data set's messages being changed in place: the instruction would grow with every call."""
    tokenizer = load_tokenizer(make_folder(tmp_path), instruction="Go.")
    problem = Problem([dict(m) for m in CHAT], "4")
    assert tokenizer.prompt_texts([problem]) == tokenizer.prompt_texts([problem])
    assert problem.question == CHAT


def test_template_writes_its_own_special_tokens(tmp_path):
    """Forbids <s> twice before a prompt: once by the template, once more by the tokenizer."""
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}>"
    tokenizer = load_tokenizer(make_folder(tmp_path, {**EOS_CONFIG, "chat_template": template}))
    prompt = tokenizer.encode_prompt(Problem("Hm?", "4"))
    assert (prompt == BOS).nonzero().tolist() == [[0]] and (prompt == EOS).sum() == 1


def test_where_the_template_stands(tmp_path):
    """Forbids the old template used where chat_template.jinja replaces it, and a list of templates read as none."""
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default {{ messages[0].content }}"}]
    config = {**EOS_CONFIG, "chat_template": several}
    one = load_tokenizer(make_folder(tmp_path / "one", config), instruction="")
    two = load_tokenizer(make_folder(tmp_path / "two", config, template_file="file {{ messages[0].content }}"), instruction="")
    assert one.prompt_texts([Problem("Q?", "4")]) == ["default Q?"]
    assert two.prompt_texts([Problem("Q?", "4"), Problem("R?", "4")]) == ["file Q?", "file R?"]   # all at once, in their order


CHATML = r"""{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
{%- else %}
    {{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) or message.role == 'assistant' %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
LLAMA3 = r"""{{- bos_token }}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\n" + (tools | tojson(indent=4)) }}
{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role not in ['user', 'assistant'] %}
        {{- raise_exception('Roles are user and assistant, not ' + (message.role | tojson)) }}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
LAYOUT = """
{# blocks without dashes: trim_blocks and lstrip_blocks decide about every line's end and indentation #}
{% for message in messages %}
    {% if message.role == 'system' %}
        {% continue %}
    {% endif %}
  <{{ message.role }}>
    {{ message.content }}
{% endfor %}
<assistant>
"""
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "layout": LAYOUT,
    "tojson": "{{ messages | tojson }} {{ messages | tojson(indent=2, sort_keys=true) }}",
    "tojson in ASCII": "{{ messages | tojson(ensure_ascii=true) }}",
    "tools is none": "{% if tools is not none %}TOOLS{% endif %}{% if documents is not none %}DOCS{% endif %}{{ messages[-1].content }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token }}{{ messages[0].content }}",
}


@pytest.mark.parametrize("template", [pytest.param(t, id=name) for name, t in TEMPLATES.items()])
def test_templates_as_transformers_renders_them(tmp_path, template):
    """Forbids a prompt that differs by a blank or a newline from what the model was trained on (oracle: transformers)."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<|end|>"}
    folder = make_folder(tmp_path, {**special, "pad_token": {"content": "<|end|>"}, "chat_template": template})
    oracle = PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json", chat_template=template, **special)
    tokenizer = load_tokenizer(folder, instruction="Go.")
    conversations = [[{"role": "user", "content": " 2 < 3 & 'où' \n"}], CHAT,
                     [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "雪?"}]]
    texts = tokenizer.prompt_texts([Problem(c, "4") for c in conversations])
    asked = [[*c[:-1], {**c[-1], "content": c[-1]["content"] + "\nGo."}] for c in conversations]
    assert texts == [oracle.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in asked]
    for ids, c in zip(tokenizer.encode_texts(texts), asked):
        assert ids.tolist() == oracle.apply_chat_template(c, add_generation_prompt=True, return_dict=False)


HOSTILE = {  # name: template, what the message must say
    "endless loop": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "does not end"),
    "endless arithmetic": ("{{ 9**(9**9) }}", "does not end"),
    "too much memory": ("{{ 'a' * 10**10 }}", "memory"),
    "too much memory, padded": ("{{ '%10000000000d' % 1 }}", "memory"),
    "long output": ("{{ 'a' * 200000 }}", "100,000 characters"),
    "long range": ("{{ range(10**9) | list }}", "Range too big"),
    "subclasses": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "__class__"),
    "subclasses by format": ("{{ '{0.__class__.__mro__}'.format(messages) }}", "__class__"),
    "globals": ("{{ cycler.__init__.__globals__ }}", "__init__"),
    "include": ("{% include '/etc/passwd' %}", "cannot be used"),
    "change of the data": ("{{ messages.append(1) }}", "append"),
    "raise_exception": ("{{ raise_exception('no\nsystem role') }}", "no system role"),
    "syntax": ("{% for %}", "TemplateSyntaxError"),
    "macro of itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "Recursion"),
    "deep": ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "cannot be used"),
    "undefined": ("{{ messages[0].tools[0].name }}", "UndefinedError"),
}


@pytest.mark.parametrize("template, says", by_name(HOSTILE))
def test_hostile_templates(tmp_path, monkeypatch, template, says):
    """Forbids a downloaded template that hangs the program, eats its memory or reaches into it."""
    if says == "does not end":
        monkeypatch.setattr(chat, "RENDER_SECONDS", 1)
    tokenizer = load_tokenizer(make_folder(tmp_path, template_file=template))
    start = time.perf_counter()
    refusal(lambda: tokenizer.encode_prompt(Problem("Q?", "4")), "chat_template.jinja", says)
    assert time.perf_counter() - start < 5


def test_templates_see_neither_classes_nor_the_clock(tmp_path):
    """Forbids a prompt that shows Python's insides, or that changes from day to day."""
    template = "[{{ ''.__class__ }}{{ messages | attr('__class__') }}{{ strftime_now('%d %b %Y') if strftime_now is defined }}]"
    assert load_tokenizer(make_folder(tmp_path, template_file=template)).prompt_texts([Problem("Q?", "4")]) == ["[]"]


BAD_FOLDERS = {  # name: file, content (None: no file), what the message must say
    "no tokenizer": ("tokenizer.json", None, "tokenizer.json"),
    "garbage": ("tokenizer.json", b"\x80\x02garbage\n\nmore", "tokenizer.json"),
    "a Git LFS pointer": ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "tokenizer.json"),
    "other JSON": ("tokenizer.json", "{}", "tokenizer.json"),
    "no end token": ("tokenizer_config.json", "{}", "no end token"),
    "no config at all": ("tokenizer_config.json", None, "no end token"),
    "end token null": ("tokenizer_config.json", '{"eos_token": null}', "no end token"),
    "end token a list": ("tokenizer_config.json", '{"eos_token": ["</s>"]}', "no end token"),
    "end token unknown": ("tokenizer_config.json", '{"eos_token": "<|im_end|>"}', "<|im_end|>"),
    "config no JSON": ("tokenizer_config.json", '{\n"eos_token": }', "tokenizer_config.json, line 2"),
    "config a list": ("tokenizer_config.json", "[]", "tokenizer_config.json"),
    "config not UTF-8": ("tokenizer_config.json", b'{"eos_token": "\xff"}', "tokenizer_config.json"),
    "template a number": ("tokenizer_config.json", '{"eos_token": "</s>", "chat_template": 7}', "chat_template"),
    "templates of numbers": ("tokenizer_config.json", json.dumps({**EOS_CONFIG, "chat_template": [{"name": "default", "template": 7}]}),
                             "chat_template"),
    "template not UTF-8": ("chat_template.jinja", b"\xff", "chat_template.jinja"),
    "generation no JSON": ("generation_config.json", "{", "generation_config.json"),
    "stop token outside": ("generation_config.json", '{"eos_token_id": [2, 100000]}', "100000"),
    "stop token negative": ("generation_config.json", '{"eos_token_id": -1}', "-1"),
    "stop token a word": ("generation_config.json", '{"eos_token_id": "</s>"}', "generation_config.json"),
    "stop token a truth": ("generation_config.json", '{"eos_token_id": true}', "generation_config.json"),
}


@pytest.mark.parametrize("name, content, says", by_name(BAD_FOLDERS))
def test_bad_tokenizer_folders(tmp_path, name, content, says):
    """Forbids a folder without a usable end token or tokenizer being found out hours later, by responses that never end."""
    folder = make_folder(tmp_path)
    (tmp_path / name).unlink() if content is None else write(tmp_path / name, content)
    refusal(lambda: load_tokenizer(folder), folder, says)


def test_text_the_tokenizer_refuses(tmp_path):
    """Forbids a traceback for half a surrogate pair, which JSON can spell, and for a vocabulary without its own <unk>."""
    tokenizer = load_tokenizer(make_folder(tmp_path))
    path = write(tmp_path / "a.jsonl", b'{"question": "smile \\ud83d", "answer": "1"}\n')
    refusal(lambda: prepare(read_problems(path), tokenizer, 10, 1000))
    words = tokenizers.Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="<unk>"))
    words.save(str(tmp_path / "tokenizer.json"))
    refusal(lambda: load_tokenizer(str(tmp_path)).encode_response("b"))


# ---------------------------------------------------------------------------------------------------------------------
# Ready to train on

def test_prepare_checks_every_gold(tmp_path):
    """Forbids bug 23 and its kin: a gold that is wrong, or longer than the limit, rewarded as if it were right."""
    tokenizer = load_tokenizer(make_folder(tmp_path / "model"), instruction="")
    golds = ["4.\n#### 4", "Five.\n#### 5", "It is four, after long thought.\n#### 4", None, "four", "9 bytes\n#### 4"]
    path = write(tmp_path / "a.jsonl", jsonl(*({"question": "2 + 2?", "answer": 4, "gold": gold} for gold in golds)))
    problems = read_problems(path)
    complaints = prepare(problems, tokenizer, max_new_tokens=15, max_positions=100)
    assert [p.gold_ids is not None for p in problems] == [True, False, False, False, False, True]
    assert all(torch.equal(p.prompt, tokenizer.encode_prompt(p)) for p in problems)                # each still trains
    assert problems[0].gold_ids.tolist() == tokenizer.encode_response(golds[0]).tolist()
    assert len(problems[5].gold_ids) == 15 and problems[5].gold_ids[-1] == tokenizer.end_id        # it just fits, end token included
    assert len(complaints) == 3 and all("\n" not in c for c in complaints)
    for line, complaint, says in zip((2, 3, 5), complaints, ("not grade as correct", "39 tokens", "not grade as correct")):
        assert complaint.startswith(f"{path}, line {line}:") and says in complaint
    assert len(prepare(problems, tokenizer, max_new_tokens=14, max_positions=100)) == 4


def test_prepare_grades_through_the_tokenizer(tmp_path):
    """Forbids a gold that is right as text and wrong as tokens: what the model learns is the tokens."""
    tokenizer = load_tokenizer(make_folder(tmp_path, missing="7"), instruction="")
    seven, eight = Problem("Q?", "17", "#### 17", source="a.jsonl, line 1"), Problem("Q?", "18", "#### 18")
    [complaint] = prepare([seven, eight], tokenizer, 20, 100)
    assert complaint.startswith("a.jsonl, line 1:")
    assert seven.gold_ids is None and seven.prompt is not None and eight.gold_ids is not None


def test_prepare_closes_an_open_think(tmp_path):
    """Forbids a gold whose answer stands inside the scratch pad that the prompt has opened."""
    tokenizer = load_tokenizer(make_folder(tmp_path, template_file="{{ messages[0].content }}<think>\n"), instruction="")
    golds = ["Two and two.\nFour.\n#### 4", "Hm.\n</think>\nFour.\n#### 4", "#### 4"]
    problems = [Problem("Q?", "4", gold) for gold in golds]
    assert prepare(problems, tokenizer, 50, 100) == []
    assert [tokenizer.decode(p.gold_ids) for p in problems] == ["Two and two.\nFour.\n</think>\n#### 4", golds[1], "\n</think>\n#### 4"]
    closed = load_tokenizer(make_folder(tmp_path, template_file="{{ messages[0].content }}<think>\n\n</think>\n"), instruction="")
    prepare(problems, closed, 50, 100)
    assert tokenizer.decode(problems[0].gold_ids) == golds[0]


def test_prepare_refuses_a_prompt_without_room(tmp_path):
    """Forbids positions beyond the model's last, and an empty prompt, which gives the first token nothing to follow."""
    tokenizer = load_tokenizer(make_folder(tmp_path), instruction="")
    problem = Problem("12345678", "4", source="a.jsonl, line 7")     # <s>, eight bytes and a newline: ten tokens
    assert prepare([problem], tokenizer, 20, 30) == [] and len(problem.prompt) == 10
    refusal(lambda: prepare([problem], tokenizer, 21, 30), "a.jsonl, line 7", "10 tokens", "--max-new-tokens")
    empty = load_tokenizer(make_folder(tmp_path, template_file="{{ '' }}"))
    refusal(lambda: prepare([problem], empty, 20, 30), "a.jsonl, line 7")


def test_prepare_with_another_reward(tmp_path):
    """Forbids golds checked by the built-in grader where the user's own function rewards; its value is the gold's reward."""
    tokenizer = load_tokenizer(make_folder(tmp_path), instruction="")
    problem = Problem("Q?", "4", "four")
    assert prepare([problem], tokenizer, 20, 100, reward=lambda response, answer: 0.5, correct_at=0.5) == []
    assert problem.gold_ids is not None and problem.gold_reward == 0.5
    problem = Problem("Q?", "4", "#### 4")
    assert len(prepare([problem], tokenizer, 20, 100, reward=lambda response, answer: 0.5)) == 1 and problem.gold_ids is None


def make_group(tokenizer, rows, lengths=None):
    """A Group of texts. Each row ends with its end token unless `lengths` cuts it; the padding spells a right answer."""
    ids = [tokenizer.encode_response(row).tolist() for row in rows]
    lengths = lengths or [len(row) for row in ids]
    padding = tokenizer.encode_response("\n#### 4").tolist() * 9
    width, n = max(lengths) + len(padding), len(rows)
    responses = torch.tensor([(row[:length] + padding * 2)[:width] for row, length in zip(ids, lengths)])
    finished = torch.tensor([length == len(row) for row, length in zip(ids, lengths)])
    none = torch.zeros(n, dtype=torch.bool)
    return Group(prompt=torch.tensor([BOS]), responses=responses, lengths=torch.tensor(lengths), finished=finished,
                 logprobs=torch.zeros(n, width), correct=none, rewards=torch.zeros(n), is_gold=none)


def test_each_group_is_graded_against_its_own_problem(tmp_path):
    """Forbids bug 12: rows graded against another prompt's answer."""
    tokenizer = load_tokenizer(make_folder(tmp_path))
    group = make_group(tokenizer, ["#### 4", "#### 5", "four"])
    four, five = grade_group(group, Problem("Q?", "4"), tokenizer), grade_group(group, Problem("R?", "5"), tokenizer)
    assert four.rewards.tolist() == [1.0, 0.0, 0.0] and four.correct.tolist() == [True, False, False]
    assert five.rewards.tolist() == [0.0, 1.0, 0.0] and five.correct.tolist() == [False, True, False]
    assert four.rewards.dtype == torch.float32 and four.correct.dtype == torch.bool
    assert four.responses is group.responses and four.lengths is group.lengths and four.finished is group.finished
    assert group.rewards.tolist() == [0.0, 0.0, 0.0]                                               # a new Group: bug 4


def test_only_a_row_s_own_tokens_are_graded(tmp_path):
    """Forbids padding read as part of the response, and an unfinished response thrown away: it is graded as it stands."""
    tokenizer = load_tokenizer(make_folder(tmp_path))
    rows = ["#### 5", "Hm", "#### 4 apples", "#### 42 apples", "#### 42"]
    graded = grade_group(make_group(tokenizer, rows, lengths=[7, 1, 6, 6, 7]), Problem("Q?", "4"), tokenizer)
    assert graded.finished.tolist() == [True, False, False, False, False]
    assert graded.rewards.tolist() == [0.0, 0.0, 1.0, 1.0, 0.0]


def test_correct_at(tmp_path):
    """Forbids `correct` and `rewards` mixed up: one is the raw reward, the other whether it reaches the mark."""
    tokenizer = load_tokenizer(make_folder(tmp_path))
    group = make_group(tokenizer, ["a", "bb", "ccc"])
    reward = lambda response, answer: len(response) / 10 - 0.2
    for correct_at, expected in ((1.0, [False, False, False]), (0.1, [False, False, True]), (0.0, [False, True, True])):
        graded = grade_group(group, Problem("Q?", "4"), tokenizer, reward, correct_at)
        assert graded.correct.tolist() == expected
        assert graded.rewards.tolist() == pytest.approx([-0.1, 0.0, 0.1])


# ---------------------------------------------------------------------------------------------------------------------
# A reward of one's own

def test_own_reward(tmp_path):
    """Forbids the user's function ignored, its arguments swapped, or the built-in grader replaced where none was given."""
    path = write(tmp_path / "r.py", "def f(response, answer): return len(response) - 2 * len(answer)\n"
                                    "def g(response, answer): return True\n")
    assert load_reward(f"{path}:f")("abc", "d") == 1.0
    assert isinstance(load_reward(f"{path}:g")("abc", "d"), float)
    assert load_reward(None) is grade


def test_own_reward_with_a_dataclass(tmp_path):
    """Forbids a module unknown to sys.modules: dataclasses look themselves up there, and a good file fails to import."""
    path = write(tmp_path / "r.py", "from __future__ import annotations\nfrom dataclasses import dataclass\n\n"
                                    "@dataclass\nclass Rule:\n    bonus: float\n\n"
                                    "def f(response, answer):\n    return Rule(0.5).bonus\n")
    assert load_reward(f"{path}:f")("abc", "d") == 0.5


BAD_REWARDS = {  # name: the file's text, what the message must say
    "no function": ("x = 1", "f"),
    "not a function": ("f = 1", "f"),
    "syntax": ("def f(:", "SyntaxError"),
    "import": ("import a_module_that_is_not_there", "a_module_that_is_not_there"),
    "import, two lines": ("raise ValueError('first\\nsecond')", "first"),
    "import, exit": ("raise SystemExit(0)", "SystemExit"),
    "inside": ("def f(response, answer): return 1 / 0", "ZeroDivisionError"),
    "inside, two lines": ("def f(response, answer): raise ValueError('first\\nsecond')", "first"),
    "inside, without end": ("def f(response, answer): return f(response, answer)", "Recursion"),
    "arguments": ("def f(response): return 1.0", "TypeError"),
    "nothing": ("def f(response, answer): pass", "TypeError"),
    "NaN": ("def f(response, answer): return float('nan')", "nan"),
    "infinite": ("def f(response, answer): return float('-inf')", "inf"),
    "infinite in float32": ("def f(response, answer): return 1e39", "1e+39"),
    "a word": ("def f(response, answer): return 'good'", "ValueError"),
}


@pytest.mark.parametrize("text, says", by_name(BAD_REWARDS))
def test_bad_rewards(tmp_path, text, says):
    """Forbids a fault in the user's file shown as ours, and NaN rewards, which make every weight NaN."""
    path = write(tmp_path / "r.py", text)
    refusal(lambda: load_reward(f"{path}:f")("a response\nof two lines", "4"), path, says)


def test_no_such_reward(tmp_path):
    """Forbids a traceback for a reward that is not FILE.py:function."""
    path = write(tmp_path / "r.py", "def f(response, answer): return 1.0")
    for spec in (path, "f", "", ":", f"{tmp_path}/none.py:f", f"{tmp_path}:f", f"{path}:", f"{path}:g"):
        refusal(lambda: load_reward(spec), "--reward")
