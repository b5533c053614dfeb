"""evaluate.py: metrics worked out by hand, and the command with what users will do to it."""
import itertools
import json
import math
import os
import runpy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tokenizers
import torch

import evaluate as evaluate_module
import sampler
from data import Limits, Problem, load_tokenizer, prepare, read_problems
from evaluate import evaluate, majority_is_right, pass_at_k
from gcpo import Group
from grader import Reward, grade
from helpers import LLAMA, STOPS, tiny_model, write_json
from model import load_model, save_model
from sampler import sample


# ---- Metrics -------------------------------------------------------------------------------------

def test_pass_at_k_equals_enumeration():
    """pass@k is the share of all sets of k samples that hold a right one. (Bug: a biased pass@k,
    such as 1 − (1 − c/n)^k.)"""
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            sets = list(itertools.combinations(range(n), k))
            # Samples 0 … c − 1 are right.
            solved = [any(i < c for i in chosen) for chosen in sets]
            share = sum(solved) / len(sets)
            assert math.isclose(pass_at_k(n, c, k), share, abs_tol=1e-12), (n, c, k)


# Five problems, four responses each. Beside them: how many are right, the majority's answer, how
# many name no answer, and how many are right if the last number counts there.
HAND_MADE = [
    ("5", ["#### 7", "#### 5", "#### 5", "it is 5"]),                   # 2   5, right     1   3
    ("1/2", ["#### 1/2", "#### 3", "#### 3", "the answer is 0.50"]),    # 2   1/2, right   0   2
    ("8", ["#### 9", "no idea", "#### 8", "so 12"]),                    # 1   9, wrong     2   1
    ("2", ["", "2 or 3", "3 or 2", "two"]),                             # 0   no vote      4   1
    ("6", ["#### 6", "#### 6", "#### 6", "#### 6"]),                    # 4   6, right     0   4
]
UNFINISHED = {(0, 0), (0, 3), (2, 1), (3, 2), (4, 3)}    # (problem, sample): 5 of 20


def hand_made_group(i):
    """As the sampler would give it. A token id names a text, and sample s is s + 1 tokens long."""
    no = torch.zeros(4, dtype=torch.bool)
    return Group(
        prompt=torch.tensor([1]),
        responses=torch.arange(4 * i, 4 * i + 4)[:, None].expand(-1, 4),
        lengths=torch.arange(1, 5),
        finished=torch.tensor([(i, s) not in UNFINISHED for s in range(4)]),
        logprobs=torch.zeros(4, 4),
        correct=no,
        rewards=torch.zeros(4),
        is_gold=no,
    )


def evaluate_by_hand(monkeypatch, reward=Reward()):
    """evaluate() on HAND_MADE."""
    texts = [text for _, responses in HAND_MADE for text in responses]
    tokenizer = SimpleNamespace(
        stop_ids=[0],
        answer_format="hash",
        decode=lambda ids: texts[ids[0]] if len(ids) else "",
    )
    groups = [hand_made_group(i) for i in range(len(HAND_MADE))]
    monkeypatch.setattr(evaluate_module, "sample", lambda *args, **kwargs: groups)
    problems = []
    for i, (answer, _) in enumerate(HAND_MADE):
        problems.append(Problem(f"question {i}", answer, prompt=torch.tensor([1])))
    return evaluate(None, problems, tokenizer, 4, 16, reward, temperature=1.0)


def test_metrics_worked_out_by_hand(monkeypatch):
    """Every metric, and every completion's record, is what one gets by hand. (Bugs: rows graded
    against another problem's answer; metrics averaged over the wrong thing.)"""
    metrics, completions = evaluate_by_hand(monkeypatch)
    assert metrics == pytest.approx({
        "mean": (2 / 4 + 2 / 4 + 1 / 4 + 0 + 1) / 5,    # 0.45
        # 0.55 = 0.05² + 0.05² + 0.2² + 0.45² + 0.55²:
        "mean_se": math.sqrt(0.55 / 4 / 5),
        "pass@1": 0.45,
        # Of 6 pairs, 1 (of 2 wrong) or 3 (of 3 wrong) hold no right one:
        "pass@2": (5 / 6 + 5 / 6 + 1 / 2 + 0 + 1) / 5,
        "pass@4": 4 / 5,
        "maj": 3 / 5,
        "truncated": 5 / 20,
        "no_answer": 7 / 20,
        "last_number": 11 / 20,
        "tokens": 2.5,
    }, abs=1e-12)
    found = [[r["response"] for r in records] for records in completions]
    assert found == [responses for _, responses in HAND_MADE]
    assert completions[1][3] == {
        "response": "the answer is 0.50",
        "answer": "0.50",
        "correct": True,
        "reward": 1.0,
        "finished": True,
        "tokens": 4,
        "correct_by_last_number": True,
    }
    assert completions[0][3] == {
        "response": "it is 5",
        "answer": None,
        "correct": False,
        "reward": 0.0,
        "finished": False,
        "tokens": 4,
        "correct_by_last_number": True,
    }


def test_the_majority_votes_by_the_grader(monkeypatch):
    """Answers that are the same to the grader vote together. (Bug: 18 and 18 apples outvoted by two
    times 17.)"""
    def records(*answers):
        return [{"answer": a, "correct": a is not None and "18" in a} for a in answers]

    assert majority_is_right(records("17", "18", "18 apples", "17", "18.0"))
    assert not majority_is_right(records("17", "18", "17", None, None))
    assert majority_is_right(records("18", "17"))    # of equals, the first
    assert not majority_is_right(records(None, None))


def test_correct_is_what_reaches_the_threshold(monkeypatch):
    """A response is correct if the user's reward reaches the user's threshold. (Bug: metrics that
    grade by themselves.)"""
    by_length = lambda response, answer: len(response) / 6    # 1 for "#### 5" and longer
    for threshold, right in (
        (0.5, [4, 4, 4, 3, 4]),
        (1.0, [4, 4, 3, 2, 4]),
        (1.1, [1, 2, 1, 0, 0]),
    ):
        metrics, completions = evaluate_by_hand(monkeypatch, Reward(by_length, threshold))
        assert [sum(r["correct"] for r in records) for records in completions] == right
        assert metrics["mean"] == pytest.approx(sum(right) / 20)


def test_evaluation_of_one_problem_and_of_one_sample(tmp_path):
    """One problem has a mean and no standard error; pass@k is there for powers of two up to the
    number of samples, and for that number. (Bug: a crash, or an error of 0 where a spread cannot be
    known.)"""
    model = tiny_model(tmp_path, LLAMA)
    tokenizer = SimpleNamespace(
        stop_ids=STOPS, answer_format="hash", decode=lambda ids: "#### 4")
    problem = Problem("?", "4", prompt=torch.tensor([1, 2]))
    metrics, [[record]] = evaluate(model, [problem], tokenizer, 1, 4, temperature=0.0)
    assert metrics["mean"] == metrics["pass@1"] == 1
    assert math.isnan(metrics["mean_se"])
    assert record["correct"]
    for samples, ks in ((1, {"1"}), (3, {"1", "2", "3"}), (8, {"1", "2", "4", "8"})):
        metrics, _ = evaluate(model, [problem], tokenizer, samples, 2, temperature=1.0)
        named = {name.removeprefix("pass@") for name in metrics if name.startswith("pass@")}
        assert named == ks


# ---- The command ---------------------------------------------------------------------------------

# So few words that random weights often name an answer.
WORDS = ["<end>", "<stop>", "<unk>", "####1", "####2", "####3", "1", "so", "is"]
QUESTIONS = ["1 is 1 is", "so", "is is is 1 so 1", "1", "so so 1", "is so is", "1 is", "is 1 so so"]
REWARDS = """
something = lambda response, answer: float(len(response) > 0)
fails = lambda response, answer: 1 / 0
nan = lambda response, answer: float('nan')
number = 3
"""


def write_problems(path, answers):
    lines = [{"question": q, "answer": a} for q, a in zip(QUESTIONS, answers)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    """A model folder with two stop tokens, one whose model knows fewer words, a file of problems,
    and some files of other kinds."""
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["<end>", "<stop>"])
    parts = tmp_path / "parts"
    parts.mkdir()
    words.save(str(parts / "tokenizer.json"))
    write_json(parts / "tokenizer_config.json", {"eos_token": "<end>"})
    write_json(parts / "generation_config.json", {"eos_token_id": [0, 1]})
    for name, size in (("model", len(WORDS)), ("fewer-words", 5)):
        model = tiny_model(parts, {**LLAMA, "vocab_size": size}, seed=1)
        save_model(model, str(tmp_path / name), tokenizer_from=str(parts))
    write_problems(tmp_path / "data.jsonl", ["7"] * len(QUESTIONS))
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"question": "so", "answer": \n')
    (tmp_path / "reward.py").write_text(REWARDS)
    (tmp_path / "directory").mkdir()
    return tmp_path


def command(folder, **changes):
    """The arguments of a command line; `changes` are flags, and None takes one away."""
    flags = {
        "model": folder / "model",
        "data": folder / "data.jsonl",
        "samples": 4,
        "max_new_tokens": 12,
        "seed": 5,
        "device": "cpu",
        "dtype": "float32",
        "out": folder / "out.jsonl",
        "keep_correct": folder / "gold.jsonl",
        **changes,
    }
    arguments = []
    for name, value in flags.items():
        if value is not None:
            arguments += [f"--{name.replace('_', '-')}", str(value)]
    return arguments


@pytest.fixture
def run_here(monkeypatch, capsys):
    """`python evaluate.py …` in this process, which saves the seconds that importing torch takes.
    An exception that the command does not catch comes out of it."""
    def run(arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
        code = 0
        try:
            runpy.run_path(evaluate_module.__file__, run_name="__main__")
        except SystemExit as e:
            code = e.code
        return code, capsys.readouterr()

    return run


def run_apart(arguments):
    return subprocess.run(
        [sys.executable, evaluate_module.__file__, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def evaluate_here(folder):
    """What the command must find: metrics and completions."""
    problems = read_problems(str(folder / "data.jsonl"))
    tokenizer = load_tokenizer(str(folder / "model"))
    model = load_model(str(folder / "model"))
    problems = prepare(problems, tokenizer, Limits(12, 256))
    return evaluate(model, problems, tokenizer, 4, 12, temperature=1.0, seed=5)


def answers_it_gives(folder):
    """For each question an answer that the model happens to give, or 7, which it cannot say."""
    _, completions = evaluate_here(folder)
    answers = []
    for records in completions:
        given = [r["answer"] for r in records if r["finished"] and (r["answer"] or "").isdigit()]
        answers.append(given[0] if given else "7")
    return answers


def test_the_program_samples_grades_and_keeps_gold(folder):
    """The command prints and writes what evaluate() finds, in order, and the gold it keeps is gold
    that training can use. (Bug: completions that are lost, cut or out of order.)"""
    answers = answers_it_gives(folder)
    solvable = len(answers) - answers.count("7")
    assert 2 <= solvable < len(answers), "solves too little or everything, so it shows nothing"
    write_problems(folder / "data.jsonl", answers)
    metrics, completions = evaluate_here(folder)
    done = run_apart(command(folder))
    assert done.returncode == 0, done.stderr
    assert "8 problems x 4 samples, temperature 1" in done.stdout
    assert f"mean@4      {metrics['mean']:.4f}" in done.stdout
    assert "Traceback" not in done.stderr
    assert not list(folder.rglob("*.writing"))

    expected = []
    solved = []
    for q, a, records in zip(QUESTIONS, answers, completions):
        expected += [{"question": q, "reference": a, **r} for r in records]
        if any(r["correct"] and r["finished"] for r in records):
            solved.append((q, a))
    assert read_lines(folder / "out.jsonl") == expected
    kept = read_problems(str(folder / "gold.jsonl"))
    assert [(p.question, p.answer) for p in kept] == solved
    assert len(solved) >= 2
    assert all(grade(p.gold, p.answer) == 1 for p in kept)
    tokenizer = load_tokenizer(str(folder / "model"))
    assert prepare(kept, tokenizer, Limits(12, 256)) == kept
    assert all(p.gold_ids is not None for p in kept)


def test_explain_tells_the_answer_and_keeps_the_question(folder, run_here, monkeypatch):
    """With --explain each prompt says the answer of its own problem, below the question, and what
    is kept as gold goes with the question alone. (Bug: gold that is trained on with the answer in
    its prompt.)"""
    answers = [str(100 + i) for i in range(len(QUESTIONS))]
    write_problems(folder / "data.jsonl", answers)
    tokenizer = load_tokenizer(str(folder / "model"))
    sampled = []

    def sample_instead(model, prompts, G, T, **settings):
        sampled.extend(tokenizer.backend.decode(p.tolist()) for p in prompts)
        return sample(model, prompts, G, T, **settings)

    monkeypatch.setattr(sampler, "sample", sample_instead)
    reward = f"{folder / 'reward.py'}:something"
    arguments = command(folder, reward=reward, samples=1, max_new_tokens=8)
    code, printed = run_here([*arguments, "--explain"])
    assert code == 0, printed.err
    assert len(sampled) == len(QUESTIONS)
    for text, question, answer in zip(sampled, QUESTIONS, answers):
        assert tokenizer.decode(tokenizer.backend.encode(answer).ids) in text
    kept = read_problems(str(folder / "gold.jsonl"))
    assert kept and {p.question for p in kept} <= set(QUESTIONS)
    assert run_here([*command(folder, out=None, keep_correct=None), "--explain"])[0] == 2


def test_the_program_uses_the_users_reward(folder, run_here):
    """--reward and --correct-at decide what is correct, what is kept as gold, and the mean. (Bug:
    flags that are read and then ignored.)"""
    reward = f"{folder / 'reward.py'}:something"
    code, printed = run_here(command(folder, reward=reward, samples=2, limit=3, skip=1))
    assert code == 0, printed.err
    rows = read_lines(folder / "out.jsonl")
    assert [r["question"] for r in rows] == [q for q in QUESTIONS[1:4] for _ in range(2)]
    assert all(r["correct"] == (len(r["response"]) > 0) for r in rows)
    assert any(r["correct"] for r in rows)
    assert all(p.gold for p in read_problems(str(folder / "gold.jsonl")))

    none = folder / "none.jsonl"
    code, printed = run_here(command(
        folder, reward=reward, correct_at=1.5, samples=None, out=None, keep_correct=none))
    assert code == 0
    assert "8 problems x 1 samples, temperature 0" in printed.out
    assert "mean@1      0.0000" in printed.out
    assert read_lines(none) == []


# name: what is changed of the command, and what the message must say; {} is the folder
BAD_NUMBERS = {
    "no samples": (dict(samples=0), "--samples 0"),
    "no tokens": (dict(max_new_tokens=0), "--max-new-tokens 0"),
    "limit below 0": (dict(limit=-1), "--limit -1"),
    "skip below 0": (dict(skip=-1), "--skip -1"),
    "skips all": (dict(skip=8), "--skip 8"),
    "top-k below 0": (dict(top_k=-1), "--top-k -1"),
    "top-p 0": (dict(top_p=0), "--top-p 0"),
    "top-p above 1": (dict(top_p=1.01), "--top-p 1.01"),
    "top-p not a number": (dict(top_p="nan"), "--top-p nan"),
    "temperature below 0": (dict(temperature=-0.5), "--temperature -0.5"),
    "temperature no number": (dict(temperature="nan"), "--temperature nan"),
    "threshold no number": (dict(correct_at="nan"), "--correct-at nan"),
    "no rows": (dict(rows=0), "--rows 0"),
    "fewer rows than samples": (dict(rows=3), "--rows 3"),
    "huge": (dict(samples=2**63 - 1), "too large"),
    "top-p, greedy": (dict(samples=1, top_p=0.5), "--top-p and --top-k"),
    "top-k, greedy": (dict(temperature=0, top_k=3), "--top-p and --top-k"),
    "blank stop token": (dict(stop_token=" "), "--stop-token"),
    "seed below 0": (dict(seed=-1), "--seed -1"),
    "no such device": (dict(device="abacus"), "--device abacus"),
}
BAD_INPUTS = {
    "no such model": (dict(model="{}/nowhere"), "{}/nowhere"),
    "model without files": (dict(model="{}/directory"), "{}/directory"),
    "model is a file": (dict(model="{}/data.jsonl"), "{}/data.jsonl"),
    "model knows fewer words": (dict(model="{}/fewer-words"), "{}/fewer-words"),
    "no such data": (dict(data="{}/nothing.jsonl"), "{}/nothing.jsonl"),
    "data is a directory": (dict(data="{}/directory"), "{}/directory"),
    "no problems": (dict(data="{}/empty.jsonl"), "{}/empty.jsonl"),
    "broken line": (dict(data="{}/broken.jsonl"), "{}/broken.jsonl, line 1"),
    "too long": (dict(max_new_tokens=256), "{}/data.jsonl, line 1"),
}
THERE = ": there is something already"
BAD_OUTPUTS = {
    "out in no directory": (dict(out="{}/nowhere/out.jsonl"), "{}/nowhere/out.jsonl"),
    "gold in no directory": (dict(keep_correct="{}/nowhere/gold.jsonl"), "{}/nowhere/gold.jsonl"),
    "out is a directory": (dict(out="{}/directory"), "{}/directory"),
    "gold is a directory": (dict(keep_correct="{}/directory"), "{}/directory"),
    "out over gold": (dict(keep_correct="{}/out.jsonl"), "{}/out.jsonl"),
    "out over the data": (dict(out="{}/data.jsonl"), "{}/data.jsonl"),
    "out over another file": (dict(out="{}/reward.py"), "{}/reward.py" + THERE),
    "gold over another file": (dict(keep_correct="{}/broken.jsonl"), "{}/broken.jsonl" + THERE),
}
NO_FUNCTION = "{}/reward.py has no function "
BAD_REWARDS = {
    "no such reward file": (dict(reward="{}/nothing.py:f"), "{}/nothing.py:f"),
    "no function named": (dict(reward="{}/reward.py"), "{}/reward.py"),
    "no such function": (dict(reward="{}/reward.py:nothing"), NO_FUNCTION + "nothing"),
    "not a function": (dict(reward="{}/reward.py:number"), NO_FUNCTION + "number"),
    "reward fails": (dict(reward="{}/reward.py:fails"), "ZeroDivisionError"),
    "reward is no number": (dict(reward="{}/reward.py:nan"), "returned nan"),
}
BAD = {**BAD_NUMBERS, **BAD_INPUTS, **BAD_OUTPUTS, **BAD_REWARDS}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_done_is_one_line(folder, run_here, name):
    """Input that cannot be used ends in one line that says what and where, status 2, and no file
    written. (Bug: a traceback, a silent nonsense result, or a file half written.)"""
    changes, message = BAD[name]
    here = lambda text: str(text).replace("{}", str(folder))
    before = files(folder)
    changes = {flag: here(value) for flag, value in changes.items()}
    code, printed = run_here(command(folder, **changes))
    assert files(folder) == before, "something was written"
    assert code == 2
    shown = printed.err.split("\r")[-1]    # what stands before \r is the progress bar, wiped out
    lines = shown.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert here(message) in lines[0]


def test_it_is_one_process(folder, run_here, monkeypatch):
    """(Bug: under torchrun every process did all of it, and wrote the same file.)"""
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, printed = run_here(command(folder))
    assert code == 2 and "not torchrun" in printed.err


def test_a_file_that_came_meanwhile_is_kept(folder, run_here, monkeypatch):
    """Two evaluations with one --out: the second writes beside it and says so. If nothing can be
    written, the metrics are printed all the same. (Bugs: hours of sampling written over; metrics
    lost to a full disk.)"""
    out = folder / "out.jsonl"

    def meanwhile(*args, **more):
        out.write_text("of others\n")
        return evaluate_module.complete(*args, **more)

    module = runpy.run_path(evaluate_module.__file__)
    monkeypatch.setitem(module["evaluate"].__globals__, "complete", meanwhile)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *command(folder, keep_correct=None)])
    module["main"]()
    assert out.read_text() == "of others\n"
    [beside] = folder.glob("out.jsonl.*")
    assert len(read_lines(beside)) == 8 * 4

    def full(*args):
        raise OSError(28, "No space left on device")

    out.unlink()
    monkeypatch.setattr("support.common.written_whole", full)
    code, printed = run_here(command(folder))
    assert code == 2
    assert "mean@4" in printed.out and "No space left" in printed.err


@pytest.mark.parametrize("changes", [
    dict(model=None),
    dict(data=None),
    dict(samples="x"),
    dict(dtype="int8"),
    dict(answer_format="oral"),
    dict(colour="red"),
], ids=str)
def test_what_is_no_command_line_is_refused(folder, run_here, changes):
    """A flag that is missing, misspelt or of another type is refused, with argparse's own message,
    and no file is written. (Bug: a misspelt flag that is ignored.)"""
    before = files(folder)
    code, printed = run_here(command(folder, **changes))
    assert code == 2
    assert files(folder) == before
    assert printed.err.splitlines()[-1].startswith("evaluate.py: error: ")


def test_an_error_in_a_process_of_its_own(folder):
    """In a process of its own too, an error is one line and status 2. (Bug: an exit status or a
    traceback that only `python evaluate.py` would show.)"""
    done = run_apart(command(folder, top_p=2))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: --top-p 2.0: must be above 0 and at most 1\n"
