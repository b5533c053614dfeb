r"""data.py: which files it reads, what the tokenizer writes, and what is refused.

Much of the file is tables, one case a row. The test below a table runs every row.
"""
import gzip
import json
import sys
import time
from decimal import Decimal

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import data
from data import (
    INSTRUCTIONS, Limits, Notes, Problem, grade_group, load_tokenizer, parse_record, prepare,
    read_problems)
from gcpo import Group
from grader import Reward, doubt, grade
from support import chat, common
from support.common import InputError
from support.options import load_reward


# ---- Helpers -------------------------------------------------------------------------------------

def write(path, content):
    """Write text or bytes, and return the path as text."""
    if isinstance(content, str):
        content = content.encode()
    path.write_bytes(content)
    return str(path)


def refusal(call, *words):
    """call() must raise InputError with one line that says all of `words`."""
    with pytest.raises(InputError) as caught:
        call()
    line = str(caught.value)
    assert line.strip(), line
    assert len(line.splitlines()) == 1, line
    assert len(line) < 800, line
    assert all(word in line for word in words), line


def by_name(table):
    """The table's rows for parametrize, so that a failing row is called by its name."""
    return [pytest.param(*row, id=name) for name, row in table.items()]


# ---- Files of problems ---------------------------------------------------------------------------

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Why?"},
]
NESTED = r"Half of it, so \boxed{\frac{1}{\sqrt{2}}}."

# name: record, question, answer, the solution inside the gold (None: the set has none)
FORMATS = {
    "gsm8k": (
        {
            "question": "Q?",
            "answer": "48/2 = <<48/2=24>>24 in May.\nIn all <<48+24=72>>72.\n#### 72",
        },
        "Q?",
        "72",
        "48/2 = 24 in May.\nIn all 72.",
    ),
    "gsm8k comma": ({"question": "Q?", "answer": "Much.\n#### 1,080"}, "Q?", "1,080", "Much."),
    "gsm8k negative": ({"question": "Q?", "answer": "Less.\n#### -7"}, "Q?", "-7", "Less."),
    "mawps": ({"input": "Q?", "target": 43.0}, "Q?", "43", None),
    "mawps fraction": ({"input": "Q?", "target": 0.25}, "Q?", "0.25", None),
    "mawps tiny": ({"input": "Q?", "target": 0.00001}, "Q?", "0.00001", None),
    "svamp": (
        {
            "Body": "Ten hens.",
            "Question": "How many?",
            "Answer": 145.0,
            "Equation": "( 290.0 / 2.0 )",
        },
        "Ten hens. How many?",
        "145",
        None,
    ),
    "asdiv": (
        {
            "body": "Apples.",
            "question": "How many?",
            "answer": "9 (apples)",
            "formula": "7+2=9",
        },
        "Apples. How many?",
        "9",
        None,
    ),
    "math": (
        {"problem": "Q?", "solution": NESTED, "level": "Level 5"},
        "Q?",
        r"\frac{1}{\sqrt{2}}",
        NESTED,
    ),
    "math answer": (
        {"problem": "Q?", "solution": NESTED, "answer": r"\frac{1}{\sqrt{2}}"},
        "Q?",
        r"\frac{1}{\sqrt{2}}",
        NESTED,
    ),
    "math no box": ({"problem": "Q?", "solution": "Five.", "answer": "5"}, "Q?", "5", "Five."),
    "aime": (
        {"id": 60, "problem": "Q?", "answer": "033", "solution": "So 33."},
        "Q?",
        "033",
        "So 33.",
    ),
    "amc": ({"problem": "Q?", "answer": 27.0, "question": "Q?"}, "Q?", "27", None),
    "verl text": (
        {
            "prompt": "Q?",
            "reward_model": {"style": "rule", "ground_truth": "34"},
            "data_source": "d",
        },
        "Q?",
        "34",
        None,
    ),
    "verl chat": (
        {
            "prompt": CHAT,
            "reward_model": {"style": "rule", "ground_truth": 34},
            "ability": "math",
        },
        CHAT,
        "34",
        None,
    ),
    "verl list": (
        {"prompt": "Q?", "reward_model": {"ground_truth": ["34"]}},
        "Q?",
        "34",
        None,
    ),
    "verl GSM8K": (
        {
            "prompt": CHAT,
            "reward_model": {"ground_truth": "72"},
            "extra_info": {"answer": "24 + 48 = <<24+48=72>>72\n#### 72", "question": "Q?"},
        },
        CHAT,
        "72",
        "24 + 48 = 72",
    ),
    "dapo": ({"prompt": "Q?", "answer": "34"}, "Q?", "34", None),
    "limo": (
        {"question": "Q?", "solution": "6*7 = 42.", "answer": "42"},
        "Q?",
        "42",
        "6*7 = 42.",
    ),
    "dapo, processed": (
        {
            "prompt": "Q?",
            "solution": "34",
            "source_prompt": CHAT,
            "reward_model": {"ground_truth": "34", "style": "rule"},
        },
        "Q?",
        "34",
        None,
    ),
    "skywork": ({"prompt": CHAT, "reward_model": {"ground_truth": '["3"]'}}, CHAT, "3", None),
    "metamath, gsm": (
        {"query": "Q?", "response": "Way.\n#### 3\nThe answer is: 3"}, "Q?", "3", "Way."),
    "arc, numbered": (
        {
            "question": "Q?",
            "choices": {"text": ["sun", "moon"], "label": ["1", "2"]},
            "answerKey": "2",
        },
        "Q?\n(A) sun\n(B) moon",
        "B",
        None,
    ),
    "labels in another order": (
        {
            "question": "Q?",
            "choices": {"text": ["sun", "moon"], "label": ["B", "A"]},
            "answerKey": "A",
        },
        "Q?\n(A) sun\n(B) moon",
        "B",
        None,
    ),
    "headings in a solution": (
        {"problem": "Q?", "solution": "#### Step 1\nAdd.\n#### Step 2\nSo $\\boxed{42}$."},
        "Q?",
        "42",
        "#### Step 1\nAdd.\n#### Step 2\nSo $\\boxed{42}$.",
    ),
    "verl, without ground truth": (
        {"prompt": "Q?", "extra_info": {"answer": "The answer is 24.\nIn all:\n#### 72"}},
        "Q?",
        "72",
        "The answer is 24.\nIn all:",
    ),
    "context": ({"context": "Let T = 5.", "question": "T + 1?", "answer": 6}, "Let T = 5.\nT + 1?",
                "6", None),
    "alpaca": ({"instruction": "Add.", "input": "3 and 4", "answer": "7"}, "Add.\n3 and 4", "7",
               None),
    "empty beside filled": (
        {"problem": "Q?", "question": " ", "answer": "", "final_answer": "42"}, "Q?", "42", None),
    "float noise": ({"question": "Q?", "answer": 0.30000000000000004}, "Q?", "0.3", None),
    "large float": ({"question": "Q?", "answer": 1e23}, "Q?", "1" + "0" * 23, None),
    "400 digits": ({"question": "Q?", "answer": 10**399}, "Q?", "1" + "0" * 399, None),
    "openmath, wrong": (
        {"question": "Q?", "expected_answer": "3", "is_correct": False,
         "generated_solution": "so \\boxed{4}."},
        "Q?",
        "3",
        None,
    ),
    "numbers as labels": (
        {"question": "Q?", "choices": {"text": ["7 m", "6 m"], "label": [1, 2]}, "answerKey": 2},
        "Q?\n(A) 7 m\n(B) 6 m",
        "B",
        None,
    ),
    "trl, bare": ({"prompt": CHAT, "solution": "$42$"}, CHAT, "$42$", None),
    "trl, boxed": ({"prompt": "Q?", "solution": NESTED}, "Q?", r"\frac{1}{\sqrt{2}}", NESTED),
    "ground_truth": ({"prompt": "Q?", "ground_truth": "42"}, "Q?", "42", None),
    "deepmath": ({"question": "Q?", "final_answer": "42"}, "Q?", "42", None),
    "olympiad": (
        {"question": "Q?", "solution": "So 42.", "final_answer": ["42"], "answer": None},
        "Q?",
        "42",
        "So 42.",
    ),
    "nemo": (
        {"problem": "Q?", "expected_answer": "42", "generated_solution": "So \\boxed{42}."},
        "Q?",
        "42",
        "So \\boxed{42}.",
    ),
    "metamath": (
        {"query": "Q?", "response": "6*7 = 42.\nThe answer is: 42", "type": "GSM"},
        "Q?",
        "42",
        "6*7 = 42.\nThe answer is: 42",
    ),
    "capitals": (
        {"ID": 1, "Problem": "Q?", "Solution": "So 42.", "Answer": 42},
        "Q?",
        "42",
        "So 42.",
    ),
    "GSM8K in the solution": (
        {"problem": "Q?", "solution": "7*6=42\n#### 42", "answer": None},
        "Q?",
        "42",
        "7*6=42",
    ),
    "boxed answer": ({"problem": "Q?", "answer": "$\\boxed{42}$"}, "Q?", "42", None),
    "list of one": ({"problem": "Q?", "answer": ["9.6"]}, "Q?", "9.6", None),
    "asdiv, two parts": (
        {"body": "Pens.", "question": "How many?", "answer": "17 (red); 8 (green)"},
        "Pens. How many?",
        "17 (red); 8 (green)",
        None,
    ),
    "mmlu": (
        {"question": "Which?", "choices": ["4", "6", "7", "9"], "answer": 2},
        "Which?\n(A) 4\n(B) 6\n(C) 7\n(D) 9",
        "C",
        None,
    ),
    "aqua": (
        {"question": "Which?", "options": ["A)4", "B)7"], "rationale": "7.", "correct": "B"},
        "Which?\n(A) 4\n(B) 7",
        "B",
        "7.",
    ),
    "arc": (
        {"question": "Which?", "choices": {"text": ["4", "7"], "label": ["A", "B"]},
         "answerKey": "B"},
        "Which?\n(A) 4\n(B) 7",
        "B",
        None,
    ),
    "choices by letter": (
        {"question": "Which?", "options": {"A": "4", "B": "7"}, "answer": "(b)"},
        "Which?\n(A) 4\n(B) 7",
        "B",
        None,
    ),
    "choices by text": (
        {"question": "Which?", "choices": ["a dog", "a cat"], "answer": "a cat"},
        "Which?\n(A) a dog\n(B) a cat",
        "B",
        None,
    ),
    "no choices": ({"question": "Q?", "choices": None, "answer": "5"}, "Q?", "5", None),
    "plain": ({"question": "Q?", "answer": "  5 "}, "Q?", "5", None),
    "plain chat": ({"question": CHAT, "answer": 5}, CHAT, "5", None),
    "numbers apart": (
        {"Question": "N_00 pens and N_01?", "Numbers": "8 2.5", "Answer": 10.5},
        "8 pens and 2.5?", "10.5", None),
    "solution in a list": (
        {"question": "Q?", "solution": ["So x = 2."], "final_answer": ["2"]}, "Q?", "2",
        "So x = 2."),
    "choices with initials": (
        {"question": "Who?", "choices": ["J. S. Mill", "I. Kant", "Plato"], "answer": 1},
        "Who?\n(A) J. S. Mill\n(B) I. Kant\n(C) Plato", "B", None),
    "letter in the second field": (
        {"question_stem": "Q?", "choices": ["4", "7"], "answer": " ", "answerKey": "B"},
        "Q?\n(A) 4\n(B) 7", "B", None),
    "aqua, text named": (
        {"question": "Q?", "options": ["A)4", "B)7"], "rationale": "So the\nanswer is 7",
         "correct": "B"}, "Q?\n(A) 4\n(B) 7", "B", "So the\nanswer is 7"),
    "choices, text in a box": (
        {"question": "Q?", "options": ["4", "7"], "rationale": "So \\boxed{7}.", "correct": "B"},
        "Q?\n(A) 4\n(B) 7", "B", "So \\boxed{7}."),
    "numbered headings": (
        {"problem": "Q?", "solution": "#### 1. **Set up**\nAdd.\n#### 2. **End**\n$\\boxed{42}$"},
        "Q?", "42", "#### 1. **Set up**\nAdd.\n#### 2. **End**\n$\\boxed{42}$"),
    "unicode": ({"question": "Où? 雪 😀", "answer": "雪"}, "Où? 雪 😀", "雪", None),
}

ANSWER_FORMATS = [
    ("hash", "#### {}"),
    ("boxed", "\\boxed{}"),
]


def jsonl(*records):
    lines = [json.dumps(r, ensure_ascii=False).encode() for r in records]
    return b"".join(line + b"\n" for line in lines)


@pytest.mark.parametrize("answer_format, last_line", ANSWER_FORMATS)
@pytest.mark.parametrize("record, question, answer, solution", by_name(FORMATS))
def test_formats(tmp_path, record, question, answer, solution, answer_format, last_line):
    """Each known format gives its question and answer, and a gold that grades as correct.

    (Bugs: a format read into the wrong fields; a gold that the grader would call
    wrong.)
    """
    path = write(tmp_path / "a.jsonl", jsonl(record))
    [problem] = read_problems(path, answer_format)
    assert problem.question == question
    assert problem.answer == answer
    assert doubt(problem.answer) is None
    in_braces = "{" + answer + "}"
    written = in_braces if answer_format == "boxed" else answer
    last_line = last_line.replace("{}", written)
    if solution is None:
        # a bare "#### 43" only if asked for: it teaches to skip the reasoning
        assert problem.gold is None
        [problem] = read_problems(path, answer_format, answer_only_gold=True)
        assert problem.gold == last_line
    elif answer_format == "boxed" and f"\\boxed{{{answer}}}" in solution:
        # the solution has its box already
        assert problem.gold == solution
    else:
        assert problem.gold == f"{solution}\n{last_line}"
    assert grade(problem.gold, problem.answer, answer_format) == 1.0


ANSWER_FIELDS = {    # answer field: the answer, and the gold that it holds
    "Each has \\boxed{9} apples.\n#### 18": ("18", "Each has \\boxed{9} apples."),    # names 9
    "We add.\n#### \\boxed{18}": ("18", "We add.\n#### 18"),
    "We add 9 and 9.\nSo \\boxed{18}.": ("18", "We add 9 and 9.\nSo \\boxed{18}.\n#### 18"),
    "\\boxed{a + b + c + d}": ("a + b + c + d", None),
    "It is $\\boxed{18}$.": ("18", None),
    1234567890123456.0: ("1234567890123456", None),
    9007199254740991.0: ("9007199254740991", None),
    0.30000000000000004: ("0.3", None),
}


@pytest.mark.parametrize("field", ANSWER_FIELDS, ids=str)
def test_what_an_answer_field_holds(field):
    """#### goes before a box, what stands before either is the way, and whole numbers are exact.
    The first's way names another answer, so `prepare` will not use it as gold, and say so. (Bugs: 9
    as the answer of the first; the gold of others lost; ...460 for ...456.)"""
    answer, gold = ANSWER_FIELDS[field]
    problem = parse_record({"question": "Q?", "answer": field}, "hash", False)
    assert problem.answer == answer
    assert problem.gold == gold


def test_blank_fields_are_absent():
    """As a CSV exported to JSON has them, and Parquet's objects. (Bug: such records left out.)"""
    assert parse_record({"question": "Q?", "answer": 18, "gold": " "}, "hash", False).gold is None
    assert parse_record({"prompt": [], "question": "Q?", "answer": 1}, "hash", False).answer == "1"
    choices = {"question": "Q?", "options": {"A": "x", "B": "y", "C": None}, "answer": "B"}
    assert parse_record(choices, "hash", False).question == "Q?\n(A) x\n(B) y"


def test_a_solution_that_ends_with_its_answer_is_gold_as_it_is():
    """(Bug: #### 7 twice.)"""
    record = {"question": "Q?", "answer": "7", "solution": "Way.\n#### 7"}
    assert parse_record(record, "hash", False).gold == "Way.\n#### 7"


def test_gold_counts_as_correct_as_a_rollout_does(tmp_path):
    """A reward of 0.9 in fp32 against --correct-at 0.9. (Bug: rollouts right, every gold not.)"""
    tokenizer = load_tokenizer(make_folder(tmp_path), instruction="")
    reward = Reward(lambda response, answer: float(torch.tensor(0.9)), correct_at=0.9)
    [problem] = prepare([Problem("Q?", "4", "#### 4")], tokenizer, Limits(20, 100), reward)
    assert problem.gold_ids is not None


def test_own_gold_is_taken_as_it_is(tmp_path):
    """A record's own gold, a larger model's response, is taken as it is.

    (Bugs: such a gold edited, lost to the data set's solution, or only if named in capitals.)
    """
    own = "Think: <<2+2=4>> 4.\n\\boxed{4}"
    plain = {"question": "Q?", "answer": "4", "gold": own}
    gsm8k = {"question": "Q?", "answer": "Short.\n#### 4", "gold": own}
    capitals = {"Question": "Q?", "Answer": "4", "Gold": own}
    path = write(tmp_path / "a.jsonl", jsonl(plain, gsm8k, capitals))
    golds = [p.gold for p in read_problems(path)]
    assert golds == [own, own, own]


RECORDS = [{"question": f"Question {i}: où?", "answer": i} for i in (1, 2, 3)]
LINES = jsonl(*RECORDS)

# name: file, content, what a place in it is called
FILES = {
    "jsonl": ("a.jsonl", LINES, "line"),
    "no last newline": ("a.jsonl", LINES.rstrip(), "line"),
    "CRLF": ("a.jsonl", LINES.replace(b"\n", b"\r\n"), "line"),
    "BOM": ("a.jsonl", b"\xef\xbb\xbf" + LINES, "line"),
    "BOM and CRLF": ("a.jsonl", b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n"), "line"),
    "gz": ("a.jsonl.gz", gzip.compress(LINES), "line"),
    "gz by another name": ("a.jsonl", gzip.compress(LINES), "line"),
    "no gz in spite of its name": ("a.jsonl.gz", LINES, "line"),
    "gz in two parts": (
        "a.jsonl.gz",
        gzip.compress(LINES[:40]) + gzip.compress(LINES[40:]),
        "line",
    ),
    "gz BOM": ("a.jsonl.gz", gzip.compress(b"\xef\xbb\xbf" + LINES), "line"),
    "list": ("a.json", json.dumps(RECORDS, indent=1), "item"),
    "list BOM and CRLF": (
        "a.json",
        b"\xef\xbb\xbf" + json.dumps(RECORDS, indent=1).replace("\n", "\r\n").encode(),
        "item",
    ),
    "list gz": ("a.json.gz", gzip.compress(json.dumps(RECORDS).encode()), "item"),
    "lines in .json": ("a.json", LINES, "line"),
    "lines in .json.gz": ("a.json.gz", gzip.compress(LINES), "line"),
}


@pytest.mark.parametrize("name, content, unit", by_name(FILES))
def test_files(tmp_path, name, content, unit):
    """Each way to write the same three records gives the same problems and places.

    (Bugs: a first record lost to a byte-order mark; a carriage return inside an
    answer; a wrong place in messages.)
    """
    path = write(tmp_path / name, content)
    problems = read_problems(path)
    found = [(p.question, p.answer) for p in problems]
    assert found == [(r["question"], str(r["answer"])) for r in RECORDS]
    places = [p.source for p in problems]
    assert places == [f"{path}, {unit} {i}" for i in (1, 2, 3)]


def test_one_object_in_a_json_file(tmp_path):
    """A .json file with a single record, or a blank line before it, is read. (Bug: told by its
    first two lines, it was refused as no list.)"""
    path = write(tmp_path / "a.json", b"\n" + jsonl(RECORDS[0]))
    assert [p.source for p in read_problems(path)] == [f"{path}, line 2"]


GOOD = jsonl({"question": "Q?", "answer": 1})

# name: file, content, what the message must say
BAD_FILES = {
    "empty": ("a.jsonl", b"", "no problems"),
    "blank lines": ("a.jsonl", b"\n \r\n\n", "no problems"),
    "empty list": ("a.json", b"[]", "no problems"),
    # line 3, because blank lines count
    "no JSON": ("a.jsonl", GOOD + b"\n{question: 1}\n", "line 3"),
    "cut line": ("a.jsonl", GOOD + b'{"question": "Q?", "ans', "line 2"),
    "two on a line": ("a.jsonl", GOOD + GOOD.strip() + GOOD, "line 2"),
    "field twice": ("a.jsonl", GOOD + b'{"question": "Q?", "answer": 1, "answer": 2}\n', "line 2"),
    "not UTF-8": ("a.jsonl", GOOD + b'{"question": "\xff", "answer": 1}\n', "line 2"),
    "UTF-16": ("a.jsonl", GOOD.decode().encode("utf-16"), "line 1"),
    "deep": ("a.jsonl", GOOD + b"[" * 100_000 + b"\n", "line 2"),
    "5,000 digits": (
        "a.jsonl",
        GOOD + b'{"question": "Q?", "answer": ' + b"1" * 5000 + b"}\n",
        "line 2",
    ),
    "list: no JSON": ("a.json", b'[{"question": "Q?",\n "answer": 1},\n {"question": }]', "line 3"),
    "list: an object": ("a.json", b'{\n"data": []\n}', "list"),
    "list: field twice": ("a.json", b'[{"question": "Q?", "answer": 1, "answer": 2}]', "twice"),
    "list: not UTF-8": ("a.json", b'["\xff"]', "cannot be read"),
    "list: deep": ("a.json", b"[" * 100_000, "cannot be read"),
    "gz: cut": ("a.jsonl.gz", gzip.compress(LINES)[:-12], "cannot be read"),
    "gz: cut in the head": ("a.jsonl.gz", gzip.compress(LINES)[:6], "cannot be read"),
    "gz: spoiled": ("a.jsonl.gz", gzip.compress(LINES)[:15] + b"\xff" * 20, "cannot be read"),
    "gz: bad line": ("a.jsonl.gz", gzip.compress(GOOD + b"{\n"), "line 2"),
}


@pytest.mark.parametrize("name, content, says", by_name(BAD_FILES))
def test_bad_files(tmp_path, name, content, says):
    """A bad file is refused in one line: the file, and the place or what is wrong.

    (Bug: a bad record skipped in silence, or met with a traceback.)
    """
    path = write(tmp_path / name, content)
    refusal(lambda: read_problems(path), path, says)


# name: record, what the note must say of it
LEFT_OUT = {
    "null": (None, "the record is null"),
    "text": ("Q?", "the record is text"),
    "a list": ([1, 2], "the record is a list of 2"),
    "unknown fields": ({"frage": "Q?", "antwort": 1}, "fields frage, antwort"),
    "no fields": ({}, "fields none"),
    "no question": ({"answer": 1}, "no question (looked for: prompt, problem, question"),
    "no answer": ({"question": "Q?"}, "no answer (looked for: answer, final_answer"),
    "null answer": ({"problem": "Q?", "answer": None}, "its answer is null"),
    "empty answer": ({"question": "Q?", "answer": " "}, "its answer is empty"),
    "answer of dress alone": ({"question": "Q?", "answer": "$."}, "its answer is empty"),
    "empty box": ({"question": "Q?", "answer": "\\boxed{}"}, "its answer is empty"),
    "empty question": ({"question": "", "answer": 1}, "its question is empty"),
    "empty GSM8K answer": ({"question": "Q?", "answer": "Long.\n####"}, "after #### in answer"),
    "no answer in the solution": ({"problem": "Q?", "solution": "Clear."}, "no answer in its sol"),
    "solutions": ({"problem": "Q?", "solution": ["\\boxed{5}", "\\boxed{6}"]}, "no answer"),
    "field in two cases": ({"question": "Q?", "answer": 5, "Answer": 6}, "they differ"),
    "number not told": ({"Question": "N_00 and N_01?", "Numbers": "8", "Answer": 6}, "N_00"),
    "blank chat": ({"prompt": [{"role": "user", "content": " "}], "answer": "5"}, "no message"),
    "answers": ({"question": "Q?", "answer": ["3", "4"]}, "its answer is a list of 2"),
    "choices as fields": (
        {"question": "Q?", "A": "4", "B": "7", "answer": "B"}, "no known form of choices"),
    "options as fields": (
        {"question": "Q?", "option_a": "4", "option_b": "7", "answer": "B"}, "it has option_a"),
    "distractors": ({"question": "Q?", "answer": "4", "distractor1": "5"}, "it has distractor1"),
    "choices out of order": (
        {"question": "Q?", "options": ["B) 7", "A) 4"], "answer": "B"}, "no known form"),
    "choices that are letters": (
        {"question": "Q?", "choices": ["B", "A", "AB"], "answer": "A"}, "more than one"),
    "a picture": ({"question": "Q?", "image": {"bytes": "x"}, "answer": 1}, "it has image"),
    "context in a list": ({"question": "Q?", "context": ["a"], "answer": 1}, "its context is a"),
    "answers as text": ({"question": "Q?", "answer": '["3", "4"]'}, "its answer is a list of 2"),
    "answers, verl": (
        {"prompt": "Q?", "reward_model": {"ground_truth": ["3", "4"]}},
        "its reward_model.ground_truth is a list of 2",
    ),
    "bool answer": ({"question": "Q?", "answer": True}, "its answer is true or false"),
    "bool answer, ASDiv": (
        {"body": "B.", "question": "Q?", "answer": True},
        "its answer is true or false",
    ),
    "NaN answer": ({"input": "Q?", "target": float("nan")}, "its target is not a finite number"),
    "infinite": ({"input": "Q?", "target": float("inf")}, "its target is not a finite number"),
    "answer in a dict": ({"question": "Q?", "answer": {"value": 1}}, "its answer is an object"),
    "gold in a list": ({"question": "Q?", "answer": 1, "gold": ["#### 1"]}, "its gold"),
    "verl without truth": ({"prompt": "Q?", "reward_model": {"style": "rule"}}, "no answer"),
    "verl truth in the wrong place": ({"prompt": "Q?", "reward_model": "rule"}, "no answer"),
    "completions": ({"question": "Q?", "reference": "1", "response": "#### 1"}, "no answer"),
    "chat of text": ({"prompt": ["Q?"], "answer": 1}, "not of messages"),
    "empty chat": ({"prompt": [], "answer": 1}, "no message of the user's"),
    "system alone": (
        {"prompt": [{"role": "system", "content": "Be brief."}], "answer": 1},
        "no message of the user's",
    ),
    "chat of pictures": (
        {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": 1},
        "not of messages",
    ),
    "chat without role": ({"prompt": [{"content": "Q?"}], "answer": 1}, "not of messages"),
    "choices without a right one": ({"question": "Q?", "choices": ["4", "6"]}, "no right one"),
    "choices, answer among none": (
        {"question": "Q?", "choices": ["4", "6"], "answer": "7"},
        "names none of its choices",
    ),
    "choices, two answers": (
        {"question": "Q?", "choices": ["1", "0"], "answer": 1},
        "names more than one of its choices",
    ),
    "choices in an object": (
        {"question": "Q?", "choices": {"first": "4"}, "answer": "4"},
        "of no known form",
    ),
    "choices as text": ({"question": "Q?", "options": "A) 4 B) 6", "answer": "A"}, "no known form"),
}


@pytest.mark.parametrize("record, says", by_name(LEFT_OUT))
def test_a_bad_record_is_left_out(tmp_path, record, says):
    """A record that cannot be used is left out, and noted with its line and with what is wrong.

    With --strict it refuses the file, and so it does if it is all there is. (Bugs: one
    bad record that refuses a file of 100,000; one that is left out in silence.)
    """
    good = {"question": "Good?", "answer": 1}
    path = write(tmp_path / "a.jsonl", jsonl(good, record, good))
    notes = Notes()
    problems = read_problems(path, notes=notes)
    assert [p.source for p in problems] == [f"{path}, line 1", f"{path}, line 3"]
    assert notes.counts["left_out"] == 1
    [line] = notes.lines["left_out"]
    assert line.startswith(f"{path}, line 2: ")
    assert says in line
    assert len(line.splitlines()) == 1
    strict = Notes(strict=True)
    refusal(lambda: read_problems(path, notes=strict), f"{path}, line 2", says, "--strict")
    alone = write(tmp_path / "b.jsonl", jsonl(record))
    refusal(lambda: read_problems(alone), f"{alone}, line 1", says)


def test_parquet(tmp_path, monkeypatch):
    """A Parquet file is read like others, row by row; without pyarrow one line says what to do.

    (Bug: the hub's data sets, which are Parquet, cannot be read.)
    """
    # The newest pyarrow wants a newer NumPy than we do.
    pyarrow = pytest.importorskip("pyarrow", exc_type=ImportError)
    from pyarrow import parquet

    rows = [
        {"prompt": CHAT, "reward_model": {"ground_truth": str(i)}, "extra_info": {"index": i}}
        for i in range(3)
    ]
    rows[1]["reward_model"]["ground_truth"] = None
    for name in ("a.parquet", "train-00000-of-00001"):
        path = str(tmp_path / name)
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        notes = Notes()
        problems = read_problems(path, notes=notes)
        assert [(p.question, p.answer) for p in problems] == [(CHAT, "0"), (CHAT, "2")]
        assert [p.source for p in problems] == [f"{path}, row 1", f"{path}, row 3"]
        assert notes.lines["left_out"][0].startswith(f"{path}, row 2: ")

    numbers = pyarrow.table({
        "question": ["A?", "B?"], "answer": pyarrow.array([0.1, 2.7], pyarrow.float32())})
    parquet.write_table(numbers, path)
    assert [p.answer for p in read_problems(path)] == ["0.1", "2.7"]
    decimals = pyarrow.array([Decimal("0.10"), Decimal("20")], pyarrow.decimal128(6, 2))
    parquet.write_table(pyarrow.table({"question": ["A?", "B?"], "answer": decimals}), path)
    assert [p.answer for p in read_problems(path)] == ["0.1", "20"]

    broken = write(tmp_path / "broken.parquet", b"PAR1 and no more")
    refusal(lambda: read_problems(broken), broken, "cannot be read")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refusal(lambda: read_problems(path), path, "pip install pyarrow")


def test_a_solution_that_names_another_answer_is_no_gold(tmp_path):
    """A solution whose own answer is not the record's is noted, and its gold not used.

    (Bug: a gold that says 4, with 3 written after it.)
    """
    tokenizer = load_tokenizer(make_folder(tmp_path), instruction="")
    for i, solution in enumerate(("so \\boxed{4}.", "so\nthe answer is: 4")):
        record = {"question": "Q?", "solution": solution, "answer": "3"}
        problems = read_problems(write(tmp_path / f"{i}.jsonl", jsonl(record)))
        notes = Notes()
        [problem] = prepare(problems, tokenizer, Limits(40, 100), notes=notes)
        assert problem.gold_ids is None
        assert notes.counts["gold_not_used"] == 1


def test_notes_count_what_run_json_does_not_list(tmp_path):
    """Of 3,000 bad records, and of 3,000 repeated ones, all are counted and 1,000 listed."""
    bad = [{"question": "Q?"}] * 3000
    good = [{"question": "Q?", "answer": 1}] * 3001
    path = write(tmp_path / "a.jsonl", jsonl(*bad, *good))
    notes = Notes()
    assert len(read_problems(path, notes=notes)) == 3001
    assert notes.counts == {"left_out": 3000, "repeated": 3000}
    assert len(notes.lines["left_out"]) == len(notes.lines["repeated"]) == 1000
    assert any("3000" in line and "line 1:" in line for line in notes.summary())


def test_no_such_file(tmp_path):
    """A wrong path and a directory are refused in one line. (Bug: a traceback.)"""
    for path in (tmp_path / "none.jsonl", tmp_path):
        refusal(lambda: read_problems(str(path)), str(path))


def test_endless_line(tmp_path, monkeypatch):
    """A line that is too long is refused; the longest allowed line is still read.

    (Bug: a line without end, as in weights or a disk image, read into memory.)
    """
    monkeypatch.setattr(common, "LONGEST_LINE", 200)
    longest = GOOD.rstrip().ljust(199) + b"\n"
    too_long = b"{" + b" " * 10_000 + b"}\n"
    path = write(tmp_path / "a.jsonl", longest + too_long)
    refusal(lambda: read_problems(path), f"{path}, line 2")
    path = write(tmp_path / "b.jsonl", longest + GOOD)
    assert len(read_problems(path)) == 2


# ---- The tokenizer -------------------------------------------------------------------------------

BOS = 1
EOS = 2
END = 3
EOS_CONFIG = {"eos_token": "</s>", "bos_token": "<s>"}


def make_folder(
    folder,
    config=EOS_CONFIG,
    generation=None,
    template_file=None,
    missing="",
    end_is_special=True,
):
    """A model folder without the model: one token per byte.

    The tokenizer itself puts <s> before every text. The vocabulary leaves out the
    `missing` characters. `config` and `generation` are the contents of
    tokenizer_config.json and generation_config.json.
    """
    folder.mkdir(exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    characters = [c for c in alphabet if c not in missing]
    tokens = ["<unk>", "<s>", "</s>", "<|end|>", *characters]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    bpe = models.BPE(vocabulary, [], unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False,
        use_regex=False,
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    if end_is_special:
        tokenizer.add_special_tokens(["</s>", "<|end|>"])
    else:
        tokenizer.add_tokens(["</s>", "<|end|>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A",
        special_tokens=[("<s>", BOS)],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    write(folder / "tokenizer_config.json", json.dumps(config))
    if generation is not None:
        write(folder / "generation_config.json", json.dumps(generation))
    if template_file is not None:
        write(folder / "chat_template.jinja", template_file)
    return str(folder)


# name: tokenizer_config.json, generation_config.json, end token, stop tokens
STOPS = {
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
    """Every end token that a folder names is a stop token.

    A gold ends with the tokenizer's own, if it has one. (Bugs: only one of several end
    tokens honoured; a gold that ends with another than the tokenizer's own.)
    """
    folder = make_folder(tmp_path, config, generation)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.end_id == end
    assert tokenizer.stop_ids == stops
    assert tokenizer.encode_response("#### 4")[-1] == end


def test_encode_response(tmp_path):
    """A response is its own tokens and then one end token, and decodes to itself.

    (Bugs: a response that begins with the tokenizer's own <s>, that lacks its end
    token, or that does not decode to itself.)
    """
    tokenizer = load_tokenizer(make_folder(tmp_path))
    for text in ("#### 4", " 4\n", "", "où 雪 😀"):
        ids = tokenizer.encode_response(text)
        assert ids.dtype == torch.int64
        own = tokenizer.backend.encode(text, add_special_tokens=False)
        assert ids.tolist() == [*own.ids, EOS]
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids.tolist()) == text


def test_end_token_is_cut_even_if_it_is_not_special(tmp_path):
    """A gold grades as correct even where the end token is an ordinary token.

    (Bug: the end token's text inside the answer: "18</s>" is not 18. In some folders
    the end token is not marked as special.)
    """
    folder = make_folder(tmp_path, end_is_special=False)
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode_response("#### 18")
    assert grade(tokenizer.decode(ids), "18") == 1.0


def test_saved_truncation_and_padding_are_off(tmp_path):
    """Settings that tokenizer.json carries neither cut nor pad a gold or a prompt.

    (Bug: a gold or prompt cut or padded as somebody's batch once was.)
    """
    folder = make_folder(tmp_path)
    path = f"{folder}/tokenizer.json"
    saved = tokenizers.Tokenizer.from_file(path)
    saved.enable_truncation(5)
    saved.enable_padding(length=500)
    saved.save(path)
    tokenizer = load_tokenizer(folder, instruction="")
    assert len(tokenizer.encode_response("#### 1234567")) == 13
    encoded = tokenizer.encode_texts(["short", "a longer one"])
    assert [len(ids) for ids in encoded] == [6, 13]


# ---- Prompts and chat templates ------------------------------------------------------------------

def test_prompt_without_template(tmp_path):
    """Without a template a prompt is question, instruction, newline.

    Messages are lines. (Bug: a prompt that differs from this.)
    """
    folder = make_folder(tmp_path)
    problem = Problem("2 + 2?", "4")
    for answer_format, instruction in INSTRUCTIONS.items():
        tokenizer = load_tokenizer(folder, answer_format)
        prompt = tokenizer.encode_prompt(problem)
        # plain text gets what the tokenizer adds, once
        assert prompt[0] == BOS
        assert (prompt == BOS).sum() == 1
        assert tokenizer.decode(prompt) == f"2 + 2?\n{instruction}\n"
    short = load_tokenizer(folder, instruction="Go.")
    messages = Problem(CHAT, "4")
    assert short.prompt_texts([messages]) == ["Be brief.\nWhy?\nGo.\n"]
    none = load_tokenizer(folder, instruction="")
    assert none.prompt_texts([problem]) == ["2 + 2?\n"]


def test_instruction_is_added_once(tmp_path):
    """A second call gives the same prompt, and the problem's messages stay as they were.

    (Bug: a data set's messages changed in place: the instruction would grow with every
    call.)
    """
    folder = make_folder(tmp_path)
    tokenizer = load_tokenizer(folder, instruction="Go.")
    messages = [dict(m) for m in CHAT]
    problem = Problem(messages, "4")
    first = tokenizer.prompt_texts([problem])
    second = tokenizer.prompt_texts([problem])
    assert first == second
    assert problem.question == CHAT


def test_template_writes_its_own_special_tokens(tmp_path):
    """A special token that the template writes stands in the prompt once.

    (Bug: <s> twice before a prompt, once by the template, once more by the tokenizer.)
    """
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}>"
    config = {**EOS_CONFIG, "chat_template": template}
    tokenizer = load_tokenizer(make_folder(tmp_path, config))
    prompt = tokenizer.encode_prompt(Problem("Hm?", "4"))
    assert (prompt == BOS).nonzero().tolist() == [[0]]
    assert (prompt == EOS).sum() == 1


def test_where_the_template_stands(tmp_path):
    """chat_template.jinja replaces the configuration's template.

    Of a list of templates, the one called default counts. (Bugs: the old template used
    where the file replaces it; a list of templates read as none.)
    """
    several = [
        {"name": "tool_use", "template": "tools"},
        {"name": "default", "template": "default {{ messages[0].content }}"},
    ]
    config = {**EOS_CONFIG, "chat_template": several}
    question = Problem("Q?", "4")
    another = Problem("R?", "4")

    folder = make_folder(tmp_path / "one", config)
    tokenizer = load_tokenizer(folder, instruction="")
    assert tokenizer.prompt_texts([question]) == ["default Q?"]

    folder = make_folder(
        tmp_path / "two",
        config,
        template_file="file {{ messages[0].content }}",
    )
    tokenizer = load_tokenizer(folder, instruction="")
    # all prompts are rendered at once, and must keep their order
    texts = tokenizer.prompt_texts([question, another])
    assert texts == ["file Q?", "file R?"]


CHATML = r"""{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
{%- else %}
    {{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user'
            or (message.role == 'system' and not loop.first)
            or message.role == 'assistant' %}
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
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'
        + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
LAYOUT = """
{# blocks without dashes: trim_blocks and lstrip_blocks decide
   about every line's end and indentation #}
{% for message in messages %}
    {% if message.role == 'system' %}
        {% continue %}
    {% endif %}
  <{{ message.role }}>
    {{ message.content }}
{% endfor %}
<assistant>
"""
TOOLS_IS_NONE = (
    "{% if tools is not none %}TOOLS{% endif %}"
    "{% if documents is not none %}DOCS{% endif %}"
    "{{ messages[-1].content }}"
)
GENERATION = (
    "{% for m in messages %}"
    "{% generation %}{{ m.content }}{% endgeneration %}"
    "{% endfor %}"
)
NAMESPACE = (
    "{% set ns = namespace(n=0) %}"
    "{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.n }}"
)
SPECIAL_TOKENS = (
    "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token }}"
    "{{ messages[0].content }}"
)
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "layout": LAYOUT,
    "tojson": "{{ messages | tojson }} {{ messages | tojson(indent=2, sort_keys=true) }}",
    "tojson in ASCII": "{{ messages | tojson(ensure_ascii=true) }}",
    "tools is none": TOOLS_IS_NONE,
    "generation": GENERATION,
    "namespace": NAMESPACE,
    "special tokens": SPECIAL_TOKENS,
}
TEMPLATE_ROWS = [pytest.param(t, id=name) for name, t in TEMPLATES.items()]
CONVERSATIONS = [
    [{"role": "user", "content": " 2 < 3 & 'où' \n"}],
    CHAT,
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "雪?"},
    ],
]


def with_instruction(conversation):
    """The same messages, and "Go." after the last one."""
    *before, last = conversation
    return [*before, {**last, "content": last["content"] + "\nGo."}]


@pytest.mark.parametrize("template", TEMPLATE_ROWS)
def test_templates_as_transformers_renders_them(tmp_path, template):
    """A prompt is what transformers makes of the template, as text and as tokens.

    (Bug: a prompt that differs by a blank or a newline from what the model was trained
    on.)
    """
    special = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<|end|>",
    }
    config = {
        **special,
        "pad_token": {"content": "<|end|>"},
        "chat_template": template,
    }
    folder = make_folder(tmp_path, config)
    oracle = PreTrainedTokenizerFast(
        tokenizer_file=f"{folder}/tokenizer.json",
        chat_template=template,
        **special,
    )
    tokenizer = load_tokenizer(folder, instruction="Go.")
    problems = [Problem(c, "4") for c in CONVERSATIONS]
    texts = tokenizer.prompt_texts(problems)
    encoded = tokenizer.encode_texts(texts)
    assert len(texts) == len(encoded) == len(CONVERSATIONS)
    for conversation, text, ids in zip(CONVERSATIONS, texts, encoded):
        asked = with_instruction(conversation)
        assert text == oracle.apply_chat_template(
            asked,
            tokenize=False,
            add_generation_prompt=True,
        )
        assert ids.tolist() == oracle.apply_chat_template(
            asked,
            add_generation_prompt=True,
            return_dict=False,
        )


OPEN_TURNS = [
    [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "Hm.\n<think>"}],
    [*CHAT, {"role": "assistant", "content": "Hm. "}],
    # the same words once more, in a place that must not be mistaken for the end
    [
        {"role": "user", "content": "Say Hm."},
        {"role": "assistant", "content": "Hm."},
        {"role": "user", "content": "Once more: Hm."},
        {"role": "assistant", "content": "Hm."},
    ],
]


@pytest.mark.parametrize("template", [CHATML, LAYOUT], ids=["chatml", "layout"])
def test_an_open_turn_goes_on(tmp_path, template):
    """A prompt whose last message is the assistant's ends with its words, as in transformers.

    The instruction goes to the user's last message. (Bugs: the instruction written into
    the assistant's words; its turn closed, and a second one opened.)
    """
    folder = make_folder(tmp_path, {**EOS_CONFIG, "chat_template": template})
    oracle = PreTrainedTokenizerFast(
        tokenizer_file=f"{folder}/tokenizer.json",
        chat_template=template,
    )
    tokenizer = load_tokenizer(folder, instruction="Go.")
    texts = tokenizer.prompt_texts([Problem(turns, "4") for turns in OPEN_TURNS])
    for turns, text in zip(OPEN_TURNS, texts):
        *before, user, assistant = turns
        asked = [*before, {**user, "content": user["content"] + "\nGo."}, assistant]
        expected = oracle.apply_chat_template(asked, tokenize=False, continue_final_message=True)
        assert text == expected


def test_an_open_turn_without_a_template(tmp_path):
    """Without a template an open turn ends the prompt, without a newline."""
    tokenizer = load_tokenizer(make_folder(tmp_path), instruction="Go.")
    [text] = tokenizer.prompt_texts([Problem(OPEN_TURNS[0], "4")])
    assert text == "2 + 2?\nGo.\nHm.\n<think>"


def test_a_template_that_drops_the_open_turn_is_refused(tmp_path):
    """(Bug: a prompt without the words that the response goes on from.)"""
    folder = make_folder(tmp_path, template_file="{{ messages[0].content }}")
    tokenizer = load_tokenizer(folder)
    problem = Problem(OPEN_TURNS[0], "4")
    refusal(lambda: tokenizer.encode_prompt(problem), "chat_template.jinja", "assistant's words")


@pytest.mark.parametrize("planted", ["json.py", "jinja2.py", "resource.py", "datetime.py"])
def test_no_code_of_the_current_folder_runs(tmp_path, monkeypatch, planted):
    """A model folder that is the current folder cannot bring modules along.

    (Bug: `python -c` takes ./json.py for the library's.)
    """
    folder = make_folder(tmp_path, template_file="{{ messages[0].content }}")
    write(tmp_path / planted, "open('PWNED', 'w')")
    monkeypatch.chdir(tmp_path)
    assert load_tokenizer(folder, instruction="").prompt_texts([Problem("Q?", "4")]) == ["Q?"]
    assert not (tmp_path / "PWNED").exists()


def test_template_args(tmp_path):
    """--chat-template-args reaches the template. (Bug: Qwen3's thinking, which nothing ends.)"""
    template = "{{ messages[0].content }}{% if not enable_thinking %}<think></think>{% endif %}"
    folder = make_folder(tmp_path, template_file=template)
    for text, end in (('{"enable_thinking": true}', ""), (None, "<think></think>")):
        tokenizer = load_tokenizer(folder, instruction="", template_args=text)
        assert tokenizer.prompt_texts([Problem("Q?", "4")]) == ["Q?" + end]
    for text in ("enable_thinking=false", "[1]", '{"messages": []}', "{", '"a"'):
        refusal(
            lambda: load_tokenizer(folder, template_args=text),
            "--chat-template-args",
        )


# ---- What ends a response, in templates ----------------------------------------------------------

# name: what the template writes around a message, its end token
TURN_ENDS = {
    "chatml": ("<|{role}|>{content}<|end|>\n", END),
    "blank before": ("[{role}] {content} <|end|>", END),
    "eos": ("[{role}]{content}</s>", EOS),
    "nothing": ("[{role}]{content}\n", EOS),
    "words": ("[{role}]{content}\n---\n<|end|>", EOS),
}


@pytest.mark.parametrize("turn, end", by_name(TURN_ENDS))
def test_the_token_that_ends_a_turn(tmp_path, turn, end):
    """The token that a template writes after the assistant's words ends a response and a gold.

    (Bug: Qwen2.5's base models, whose end token is another than their template's: the
    response runs on into turns of its own, and its last answer is graded.)
    """
    body = turn.replace("{role}", "{{ m.role }}").replace("{content}", "{{ m.content }}")
    template = "{% for m in messages %}" + body + "{% endfor %}"
    folder = make_folder(tmp_path, {**EOS_CONFIG, "chat_template": template})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.end_id == end
    assert tokenizer.stop_ids == sorted({EOS, end})
    assert tokenizer.encode_response("#### 4")[-1] == end


# name: template, end token
LATER_TURN_ENDS = {
    "between turns": (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{% if not loop.last %}<|end|>{% endif %}{% endfor %}",
        END,
    ),
    "the next header": (
        "{% for m in messages %}{% if m.role == 'user' %}<|end|>{% endif %}{{ m.content }}"
        "{% endfor %}",
        END,
    ),
    "thoughts closed": (
        "{% for m in messages %}{{ m.content }}</think><|end|>{% endfor %}", END),
}


@pytest.mark.parametrize("template, end", by_name(LATER_TURN_ENDS))
def test_the_token_that_ends_a_turn_before_another(tmp_path, template, end):
    """A template that ends a turn only where another follows is asked with another.

    (Bug: Qwen1.5 and GLM-4, whose responses run on into turns of their own.)
    """
    tokenizer = load_tokenizer(make_folder(tmp_path, {**EOS_CONFIG, "chat_template": template}))
    assert tokenizer.end_id == end
    assert EOS in tokenizer.stop_ids


def test_more_stop_tokens(tmp_path):
    """--stop-token adds tokens; one that is no token is refused."""
    folder = make_folder(tmp_path)
    tokenizer = load_tokenizer(folder, stop_token="<|end|> <unk>")
    assert tokenizer.stop_ids == [0, EOS, END]
    assert tokenizer.end_id == EOS
    refusal(lambda: load_tokenizer(folder, stop_token="<|end|> <stop>"), "--stop-token <stop>")


def test_end_tokens_named_elsewhere(tmp_path):
    """An end token may stand in special_tokens_map.json or in config.json alone."""
    folder = make_folder(tmp_path, config={})
    write(tmp_path / "config.json", json.dumps({"eos_token_id": END}))
    assert load_tokenizer(folder).stop_ids == [END]
    write(tmp_path / "special_tokens_map.json", json.dumps({"eos_token": {"content": "</s>"}}))
    assert load_tokenizer(folder).stop_ids == [EOS]
    write(tmp_path / "tokenizer_config.json", json.dumps({"eos_token": "<|end|>"}))
    assert load_tokenizer(folder).stop_ids == [END]


def test_a_prompt_does_not_end_with_the_end_token(tmp_path):
    """(Bug: a tokenizer that closes every text, prompts too: the model has nothing to add.)"""
    folder = make_folder(tmp_path)
    path = f"{folder}/tokenizer.json"
    saved = tokenizers.Tokenizer.from_file(path)
    saved.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[("<s>", BOS), ("</s>", EOS)],
    )
    saved.save(path)
    tokenizer = load_tokenizer(folder, instruction="")
    prompt = tokenizer.encode_prompt(Problem("Q?", "4")).tolist()
    assert prompt[0] == BOS
    assert EOS not in prompt
    assert tokenizer.decode(prompt) == "Q?\n"


# name: template, what the message must say
HOSTILE = {
    "endless loop": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "does not end",
    ),
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
    """A hostile template is refused in one line, in less than five seconds.

    (Bug: a downloaded template that hangs the program, eats its memory or reaches into
    it.)
    """
    if says == "does not end":
        # the test need not wait the usual time
        monkeypatch.setattr(chat, "RENDER_SECONDS", 1)
    folder = make_folder(tmp_path, template_file=template)
    tokenizer = load_tokenizer(folder)
    problem = Problem("Q?", "4")
    start = time.perf_counter()
    refusal(
        lambda: tokenizer.encode_prompt(problem),
        "chat_template.jinja",
        says,
    )
    assert time.perf_counter() - start < 5


def test_templates_see_neither_classes_nor_the_clock(tmp_path):
    """A template finds neither Python's classes nor the clock.

    (Bug: a prompt that shows Python's insides, or that changes from day to day.)
    """
    template = (
        "["
        "{{ ''.__class__ }}"
        "{{ messages | attr('__class__') }}"
        "{{ strftime_now('%d %b %Y') if strftime_now is defined }}"
        "]"
    )
    folder = make_folder(tmp_path, template_file=template)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.prompt_texts([Problem("Q?", "4")]) == ["[01 Jan 2025]"]


# ---- Bad tokenizers ------------------------------------------------------------------------------

# name: file, content (None: no file), what the message must say
BAD_FOLDERS = {
    "no tokenizer": ("tokenizer.json", None, "tokenizer.json"),
    "garbage": ("tokenizer.json", b"\x80\x02garbage\n\nmore", "tokenizer.json"),
    "a Git LFS pointer": (
        "tokenizer.json",
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "tokenizer.json",
    ),
    "other JSON": ("tokenizer.json", "{}", "tokenizer.json"),
    "no end token": ("tokenizer_config.json", "{}", "no end token"),
    "no config at all": ("tokenizer_config.json", None, "no end token"),
    "end token null": ("tokenizer_config.json", '{"eos_token": null}', "no end token"),
    "end token a list": ("tokenizer_config.json", '{"eos_token": ["</s>"]}', "no end token"),
    "end token unknown": ("tokenizer_config.json", '{"eos_token": "<|im_end|>"}', "<|im_end|>"),
    "config no JSON": (
        "tokenizer_config.json",
        '{\n"eos_token": }',
        "tokenizer_config.json, line 2",
    ),
    "config a list": ("tokenizer_config.json", "[]", "tokenizer_config.json"),
    "config not UTF-8": (
        "tokenizer_config.json",
        b'{"eos_token": "\xff"}',
        "tokenizer_config.json",
    ),
    "template a number": (
        "tokenizer_config.json",
        '{"eos_token": "</s>", "chat_template": 7}',
        "chat_template",
    ),
    "templates of numbers": (
        "tokenizer_config.json",
        json.dumps({**EOS_CONFIG, "chat_template": [{"name": "default", "template": 7}]}),
        "chat_template",
    ),
    "templates without a default": (
        "tokenizer_config.json",
        json.dumps({**EOS_CONFIG, "chat_template": [{"name": "rag", "template": "a"}]}),
        "without a default",
    ),
    "special tokens no JSON": ("special_tokens_map.json", "{", "special_tokens_map.json"),
    "template not UTF-8": ("chat_template.jinja", b"\xff", "chat_template.jinja"),
    "generation no JSON": ("generation_config.json", "{", "generation_config.json"),
    "stop token outside": ("generation_config.json", '{"eos_token_id": [2, 100000]}', "100000"),
    "stop token negative": ("generation_config.json", '{"eos_token_id": -1}', "-1"),
    "stop token a word": (
        "generation_config.json",
        '{"eos_token_id": "</s>"}',
        "generation_config.json",
    ),
    "stop token a truth": (
        "generation_config.json",
        '{"eos_token_id": true}',
        "generation_config.json",
    ),
}


@pytest.mark.parametrize("name, content, says", by_name(BAD_FOLDERS))
def test_bad_tokenizer_folders(tmp_path, name, content, says):
    """A bad tokenizer folder is refused when it is loaded, in one line that names it.

    (Bug: a folder without a usable end token or tokenizer, found out hours later by
    responses that never end.)
    """
    folder = make_folder(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        write(tmp_path / name, content)
    refusal(lambda: load_tokenizer(folder), folder, says)


def test_text_the_tokenizer_refuses(tmp_path):
    """A text that the tokenizer cannot encode is refused in one line.

    (Bug: a traceback, for half a surrogate pair, which JSON can spell, or for a
    vocabulary without its own <unk>.)
    """
    tokenizer = load_tokenizer(make_folder(tmp_path))
    record = b'{"question": "smile \\ud83d", "answer": "1"}\n'
    path = write(tmp_path / "a.jsonl", record)
    refusal(lambda: prepare(read_problems(path), tokenizer, Limits(10, 1000)))

    vocabulary = {"</s>": 0, "a": 1}
    level = models.WordLevel(vocabulary, unk_token="<unk>")
    words = tokenizers.Tokenizer(level)
    words.save(str(tmp_path / "tokenizer.json"))
    refusal(lambda: load_tokenizer(str(tmp_path)).encode_response("b"))


# ---- Ready to train on ---------------------------------------------------------------------------

def test_prepare_checks_every_gold(tmp_path):
    """A gold is used only if it grades as correct and fits the limit.

    Its problem gets a prompt in any case, and so still trains. (Bugs: a wrong gold
    rewarded as if it were right; gold longer than the limit cut off and rewarded.)
    """
    folder = make_folder(tmp_path / "model")
    tokenizer = load_tokenizer(folder, instruction="")
    golds = [
        "4.\n#### 4",
        "Five.\n#### 5",
        "It is four, after long thought.\n#### 4",
        None,
        "four",
        "9 bytes\n#### 4",
    ]
    records = [{"question": "2 + 2?", "answer": 4, "gold": gold} for gold in golds]
    path = write(tmp_path / "a.jsonl", jsonl(*records))
    problems = read_problems(path)
    notes = Notes()
    assert prepare(problems, tokenizer, Limits(15, 100), notes=notes) == problems
    used = [p.gold_ids is not None for p in problems]
    assert used == [True, False, False, False, False, True]
    for problem in problems:
        prompt = tokenizer.encode_prompt(problem)
        assert torch.equal(problem.prompt, prompt)
    first = tokenizer.encode_response(golds[0])
    assert problems[0].gold_ids.tolist() == first.tolist()
    # the last one just fits, and its end token counts
    assert len(problems[5].gold_ids) == 15
    assert problems[5].gold_ids[-1] == tokenizer.end_id

    expected = [
        (2, "not grade as correct"),
        (3, "39 tokens"),
        (5, "not grade as correct"),
    ]
    complaints = notes.lines["gold_not_used"]
    assert len(complaints) == 3
    assert all("\n" not in c for c in complaints)
    for complaint, (line, says) in zip(complaints, expected):
        assert complaint.startswith(f"{path}, line {line}:")
        assert says in complaint

    notes = Notes()
    prepare(problems, tokenizer, Limits(14, 100), notes=notes)
    assert notes.counts["gold_not_used"] == 4


def test_prepare_grades_through_the_tokenizer(tmp_path):
    """A gold is graded as its tokens spell it, because the model learns the tokens.

    (Bug: a gold that is right as text and wrong as tokens.)
    """
    folder = make_folder(tmp_path, missing="7")
    tokenizer = load_tokenizer(folder, instruction="")
    seven = Problem("Q?", "17", "#### 17", source="a.jsonl, line 1")
    eight = Problem("Q?", "18", "#### 18")
    notes = Notes()
    assert len(prepare([seven, eight], tokenizer, Limits(20, 100), notes=notes)) == 2
    [complaint] = notes.lines["gold_not_used"]
    assert complaint.startswith("a.jsonl, line 1:")
    assert seven.gold_ids is None
    assert seven.prompt is not None
    assert eight.gold_ids is not None


def test_prepare_closes_an_open_think(tmp_path):
    """A scratch pad that the prompt opens is closed before the gold's answer.

    (Bug: a gold whose answer stands inside the scratch pad that the prompt has opened.)
    """
    golds = [
        "Two and two.\nFour.\n#### 4",
        "Hm.\n</think>\nFour.\n#### 4",
        "#### 4",
    ]
    problems = [Problem("Q?", "4", gold) for gold in golds]

    template = "{{ messages[0].content }}<think>\n"
    folder = make_folder(tmp_path, template_file=template)
    opened = load_tokenizer(folder, instruction="")
    assert len(prepare(problems, opened, Limits(50, 100))) == 3
    texts = [opened.decode(p.gold_ids) for p in problems]
    assert texts == [
        "Two and two.\nFour.\n</think>\n#### 4",
        golds[1],
        "\n</think>\n#### 4",
    ]

    template = "{{ messages[0].content }}<think>\n\n</think>\n"
    folder = make_folder(tmp_path, template_file=template)
    closed = load_tokenizer(folder, instruction="")
    prepare(problems, closed, Limits(50, 100))
    assert closed.decode(problems[0].gold_ids) == golds[0]


OPENED = [
    "{{ messages[0].content }}<think>\n",
    "{{ messages[0].content }}[assistant]{{ messages[-1].content }}",
]


@pytest.mark.parametrize("template", OPENED, ids=["by the template", "by the assistant"])
def test_a_response_that_never_closes_its_scratch_pad_has_no_answer(tmp_path, template):
    """What a response says inside a scratch pad that the prompt opened is no answer.

    (Bug: a marker in the thoughts of a model that ran out of tokens, paid as its
    answer.)
    """
    tokenizer = load_tokenizer(make_folder(tmp_path, template_file=template), instruction="")
    question = "Q?"
    if "assistant" in template:
        question = [
            {"role": "user", "content": "Q?"},
            {"role": "assistant", "content": "<think>Well,"},
        ]
    problem = Problem(question, "4", "Two and two.\n#### 4")
    prepare([problem], tokenizer, Limits(50, 100))
    assert problem.gold_ids is not None
    rows = ["#### 4", "#### 4</think>", "#### 5</think>#### 4", "#### 4</think>#### 5"]
    group = make_group(tokenizer, rows)
    graded = grade_group(group, problem, tokenizer)
    assert graded.rewards.tolist() == [0.0, 0.0, 1.0, 0.0]


def test_prompts_too_long_are_left_out(tmp_path):
    """A prompt too long is left out and noted, and the others stay in order.

    (Bug: one long prompt of 100,000 that refuses the run.)
    """
    tokenizer = load_tokenizer(make_folder(tmp_path), instruction="")
    problems = [Problem("12345678", "4", source=f"a.jsonl, line {i}") for i in range(1, 4)]
    problems[1].question = "123456789"
    notes = Notes()
    kept = prepare(problems, tokenizer, Limits(20, 30), notes=notes)
    assert kept == [problems[0], problems[2]]
    [line] = notes.lines["too_long"]
    assert line.startswith("a.jsonl, line 2: the prompt has 11 tokens")
    strict = Notes(strict=True)
    refusal(
        lambda: prepare(problems, tokenizer, Limits(20, 30), notes=strict),
        "a.jsonl, line 2",
        "--strict",
    )


def test_prompts_are_rendered_in_parts(tmp_path, monkeypatch):
    """Parts of three prompts give what one part gives. (Bug: 1.8 million prompts in one child.)"""
    folder = make_folder(tmp_path, template_file="<{{ messages[0].content }}>")
    tokenizer = load_tokenizer(folder, instruction="")
    problems = [Problem(f"Question {i}", "4") for i in range(8)]
    monkeypatch.setattr(data, "PART", 3)
    assert prepare(problems, tokenizer, Limits(20, 100)) == problems
    texts = [tokenizer.decode(p.prompt) for p in problems]
    assert texts == [f"<Question {i}>" for i in range(8)]


def test_null_keys_of_messages_do_not_reach_the_template(tmp_path):
    """Keys that Parquet adds to a message are no keys of it. (Bug: "(None)" in a prompt.)"""
    template = "{{ messages[0].content }}{% if messages[0].name is defined %}!{% endif %}"
    tokenizer = load_tokenizer(make_folder(tmp_path, template_file=template), instruction="")
    message = {"role": "user", "content": "Q?", "name": None}
    assert tokenizer.prompt_texts([Problem([message], "4")]) == ["Q?"]


def test_half_a_letter_is_left_out(tmp_path):
    """A record with a lone surrogate is left out, by its line. (Bug: it refuses the file.)"""
    lines = ['{"question": "Q?", "answer": 1}', '{"question": "Q \\ud83d?", "answer": 1}']
    notes = Notes()
    path = write(tmp_path / "a.jsonl", "\n".join(lines) + "\n")
    assert len(read_problems(path, notes=notes)) == 1
    assert "line 2: it holds half of a letter" in notes.lines["left_out"][0]


def test_a_problem_that_the_template_refuses_is_left_out(tmp_path, monkeypatch):
    """A template that raises on one record refuses that one, by its line, and not the file.

    (Bugs: Gemma's, which knows no system message, and one such record among 100,000; the same, a
    hundred times over, refused once more in a later part of the file.)
    """
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<{{ messages[0].content }}>"
    )
    folder = make_folder(tmp_path, template_file=template)
    tokenizer = load_tokenizer(folder, instruction="")
    lines = [{"prompt": question, "answer": 1} for question in ("Q?", CHAT, "R?")]
    path = write(tmp_path / "a.jsonl", jsonl(*lines))
    notes = Notes()
    kept = prepare(read_problems(path), tokenizer, Limits(20, 100), notes=notes)
    assert [p.question for p in kept] == ["Q?", "R?"]
    [line] = notes.lines["left_out"]
    assert line.startswith(f"{path}, line 2: ")
    assert "no system" in line
    strict = Notes(strict=True)
    refusal(
        lambda: prepare(read_problems(path), tokenizer, Limits(20, 100), notes=strict),
        f"{path}, line 2",
        "--strict",
    )
    monkeypatch.setattr(data, "PART", 2)    # its repeats are all that later parts have to render
    path = write(tmp_path / "repeated.jsonl", jsonl(*lines, lines[1], lines[1], lines[1]))
    kept = prepare(read_problems(path), tokenizer, Limits(20, 100))
    assert [p.question for p in kept] == ["Q?", "R?"]
    alone = read_problems(write(tmp_path / "b.jsonl", jsonl(lines[1], lines[1], lines[1])))
    refusal(lambda: prepare(alone, tokenizer, Limits(20, 100)), "chat_template.jinja", "no system")


def test_a_repeated_question_is_rendered_once(tmp_path, monkeypatch):
    """DAPO's file has each problem a hundred times. All are kept, with one prompt between them.

    (Bug: 1.8 million prompts, which no laptop's memory holds.)
    """
    folder = make_folder(tmp_path, template_file="<{{ messages[0].content }}>")
    tokenizer = load_tokenizer(folder, instruction="")
    lines = [{"question": f"Question {i % 3}", "answer": i} for i in range(12)]
    problems = read_problems(write(tmp_path / "a.jsonl", jsonl(*lines)))
    rendered = []
    texts_of = tokenizer.rendered
    tokenizer.rendered = lambda some: rendered.extend(some) or texts_of(some)
    monkeypatch.setattr(data, "PART", 5)
    kept = prepare(problems, tokenizer, Limits(20, 100))
    assert [p.answer for p in kept] == [str(i) for i in range(12)]
    assert [tokenizer.decode(p.prompt) for p in kept] == [f"<Question {i % 3}>" for i in range(12)]
    assert len(rendered) == 3
    assert kept[0].prompt is kept[11 - 2].prompt


DOUBTFUL = {
    "lines": ("x=1\ny=2", "several lines"),
    "none": ("None", "None"),
    "unknown": ("unknown.", "unknown"),
    "prose": ("Each crate holds 6 jars, so there are 42.", "7 words"),
}


@pytest.mark.parametrize("answer, says", by_name(DOUBTFUL))
def test_answers_that_nothing_matches_are_noted(tmp_path, answer, says):
    """A reference that hardly any response can match trains, and is noted and counted.

    (Bug: prose as a reference, against which every response is wrong for ever.)
    """
    tokenizer = load_tokenizer(make_folder(tmp_path), instruction="")
    problem = Problem("Q?", answer, source="a.jsonl, line 1")
    notes = Notes()
    assert prepare([problem], tokenizer, Limits(20, 100), notes=notes) == [problem]
    [line] = notes.lines["doubtful"]
    assert says in line
    # another reward may have its own use for prose
    notes = Notes()
    prepare([problem], tokenizer, Limits(20, 100), Reward(lambda r, a: 1.0), notes)
    assert not notes.counts


@pytest.mark.parametrize("answer", ["proof", "Proof.", "notfound", "not found", "NaN", "n/a"])
def test_an_answer_that_is_none_is_left_out(tmp_path, answer):
    """A reference that says there is none is left out: a response that repeats it would be paid.
    Another reward may have its own use for it. (Bug: NuminaMath's proofs as gold, "#### proof".)"""
    tokenizer = load_tokenizer(make_folder(tmp_path), instruction="")
    bad = Problem("Q?", answer, gold=f"So.\n#### {answer}", source="a.jsonl, line 1")
    good = Problem("R?", "5", source="a.jsonl, line 2")
    notes = Notes()
    assert prepare([bad, good], tokenizer, Limits(20, 100), notes=notes) == [good]
    [line] = notes.lines["left_out"]
    assert line == f"a.jsonl, line 1: its answer is {answer!r}, and that is none"
    refusal(lambda: prepare([bad], tokenizer, Limits(20, 100)), "a.jsonl, line 1", "none")
    assert prepare([bad], tokenizer, Limits(20, 100), Reward(lambda r, a: 1.0)) == [bad]


def test_prepare_refuses_a_prompt_without_room(tmp_path):
    """A prompt is refused if it is empty, or leaves too few positions for a response.

    (Bugs: positions beyond the model's last; an empty prompt, which gives the first
    token nothing to follow.)
    """
    tokenizer = load_tokenizer(make_folder(tmp_path), instruction="")
    problem = Problem("12345678", "4", source="a.jsonl, line 7")
    assert prepare([problem], tokenizer, Limits(20, 30)) == [problem]
    # <s>, eight bytes and a newline
    assert len(problem.prompt) == 10
    refusal(
        lambda: prepare([problem], tokenizer, Limits(21, 30)),
        "a.jsonl, line 7",
        "10 tokens",
        "--max-new-tokens",
    )
    folder = make_folder(tmp_path, template_file="{{ '' }}")
    empty = load_tokenizer(folder)
    refusal(
        lambda: prepare([problem], empty, Limits(20, 30)),
        "a.jsonl, line 7",
    )


def test_prepare_with_another_reward(tmp_path):
    """The user's own function decides on a gold, and its value is the gold's reward.

    (Bug: golds checked by the built-in grader where the user's own function rewards.)
    """
    def half(response, answer):
        return 0.5

    tokenizer = load_tokenizer(make_folder(tmp_path), instruction="")
    problem = Problem("Q?", "4", "four")
    prepare([problem], tokenizer, Limits(20, 100), Reward(half, 0.5))
    assert problem.gold_ids is not None
    assert problem.gold_reward == 0.5

    problem = Problem("Q?", "4", "#### 4")
    notes = Notes()
    prepare([problem], tokenizer, Limits(20, 100), Reward(half), notes)
    assert notes.counts == {"gold_not_used": 1}
    assert problem.gold_ids is None


# ---- Graded groups -------------------------------------------------------------------------------

def make_group(tokenizer, rows, lengths=None):
    """A Group of texts, whose padding spells a right answer.

    Each row ends with its end token unless `lengths` cuts it.
    """
    ids = [tokenizer.encode_response(row).tolist() for row in rows]
    if lengths is None:
        lengths = [len(row) for row in ids]
    padding = tokenizer.encode_response("\n#### 4").tolist() * 9
    width = max(lengths) + len(padding)
    responses = []
    finished = []
    for row, length in zip(ids, lengths):
        padded = row[:length] + padding * 2
        responses.append(padded[:width])
        finished.append(length == len(row))
    none = torch.zeros(len(rows), dtype=torch.bool)
    return Group(
        prompt=torch.tensor([BOS]),
        responses=torch.tensor(responses),
        lengths=torch.tensor(lengths),
        finished=torch.tensor(finished),
        logprobs=torch.zeros(len(rows), width),
        correct=none,
        rewards=torch.zeros(len(rows)),
        is_gold=none,
    )


def test_each_group_is_graded_against_its_own_problem(tmp_path):
    """A group is graded against its own problem, and the grades go into a new Group.

    (Bugs: group rows graded against another prompt's answer; in-place writes on a
    shared batch.)
    """
    tokenizer = load_tokenizer(make_folder(tmp_path))
    group = make_group(tokenizer, ["#### 4", "#### 5", "four"])
    four = grade_group(group, Problem("Q?", "4"), tokenizer)
    five = grade_group(group, Problem("R?", "5"), tokenizer)
    assert four.rewards.tolist() == [1.0, 0.0, 0.0]
    assert four.correct.tolist() == [True, False, False]
    assert five.rewards.tolist() == [0.0, 1.0, 0.0]
    assert five.correct.tolist() == [False, True, False]
    assert four.rewards.dtype == torch.float32
    assert four.correct.dtype == torch.bool
    assert four.responses is group.responses
    assert four.lengths is group.lengths
    assert four.finished is group.finished
    assert group.rewards.tolist() == [0.0, 0.0, 0.0]


def test_only_a_row_s_own_tokens_are_graded(tmp_path):
    """A row is graded by its own tokens alone; an unfinished one as it stands.

    (Bugs: padding read as part of the response; an unfinished response thrown away.)
    """
    tokenizer = load_tokenizer(make_folder(tmp_path))
    rows = ["#### 5", "Hm", "#### 4 apples", "#### 42 apples", "#### 42"]
    group = make_group(tokenizer, rows, lengths=[7, 1, 6, 6, 7])
    graded = grade_group(group, Problem("Q?", "4"), tokenizer)
    assert graded.finished.tolist() == [True, False, False, False, False]
    assert graded.rewards.tolist() == [0.0, 0.0, 1.0, 1.0, 0.0]


def test_correct_at(tmp_path):
    """`rewards` are the raw rewards; `correct` says which of them reach the mark.

    (Bug: the two mixed up.)
    """
    def reward(response, answer):
        return len(response) / 10 - 0.2

    tokenizer = load_tokenizer(make_folder(tmp_path))
    group = make_group(tokenizer, ["a", "bb", "ccc"])
    problem = Problem("Q?", "4")
    marks = [
        (1.0, [False, False, False]),
        (0.1, [False, False, True]),
        (0.0, [False, True, True]),
    ]
    for correct_at, expected in marks:
        graded = grade_group(group, problem, tokenizer, Reward(reward, correct_at))
        assert graded.correct.tolist() == expected
        assert graded.rewards.tolist() == pytest.approx([-0.1, 0.0, 0.1])


# ---- A reward of one's own -----------------------------------------------------------------------

TWO_REWARDS = """\
def f(response, answer): return len(response) - 2 * len(answer)
def g(response, answer): return True
"""


def test_own_reward(tmp_path):
    """The user's function rewards, as a float; where none is given, the grader does.

    (Bugs: the user's function ignored; its arguments swapped; the built-in grader
    replaced where no function was given.)
    """
    path = write(tmp_path / "r.py", TWO_REWARDS)
    assert load_reward(f"{path}:f")("abc", "d") == 1.0
    assert isinstance(load_reward(f"{path}:g")("abc", "d"), float)
    assert load_reward(None).function is grade


REWARD_WITH_A_DATACLASS = """\
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Rule:
    bonus: float

def f(response, answer):
    return Rule(0.5).bonus
"""


def test_own_reward_with_a_dataclass(tmp_path):
    """The user's file may define a dataclass.

    (Bug: a module unknown to sys.modules. Dataclasses look themselves up there, and a
    good file fails to import.)
    """
    path = write(tmp_path / "r.py", REWARD_WITH_A_DATACLASS)
    assert load_reward(f"{path}:f")("abc", "d") == 0.5


# name: the file's text, what the message must say
BAD_REWARDS = {
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
    """A fault in the user's file is refused in one line that names the file.

    (Bugs: a fault in the user's file shown as ours; NaN rewards, which make every
    weight NaN.)
    """
    path = write(tmp_path / "r.py", text)
    response = "a response\nof two lines"
    refusal(
        lambda: load_reward(f"{path}:f")(response, "4"),
        path,
        says,
    )


def test_no_such_reward(tmp_path):
    """A reward that is not FILE.py:function is refused in one line. (Bug: a traceback.)"""
    path = write(tmp_path / "r.py", "def f(response, answer): return 1.0")
    specs = [
        path,
        "f",
        "",
        ":",
        f"{tmp_path}/none.py:f",
        f"{tmp_path}:f",
        f"{path}:",
        f"{path}:g",
    ]
    for spec in specs:
        refusal(lambda: load_reward(spec), "--reward")
