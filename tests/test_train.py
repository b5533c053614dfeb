"""train.py: whole runs on the toy, what they write, and what they refuse."""
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import train
from data import Problem, load_tokenizer, prepare, read_problems
from gcpo import ALGORITHMS, Group
from grader import grade
from logprobs import token_logprobs
from model import load_model, save_model
from support.common import InputError, exit_cleanly
from support.options import Config
from support.runlog import rollout_metrics, rollout_numbers, update_metrics
from support.toy import TOY, build_toy
from train import BEGINNING, Item, collect, make_policy, learning_rate, next_problems, refresh_policy


ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHORT = ["--steps", "2", "--prompts", "4", "--eval-limit", "8", "--max-new-tokens", "24"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The toy's files, as settings."""
    return build_toy(str(tmp_path_factory.mktemp("toy") / "toy"), seed=0)


def run(*flags):
    """train.py in this process. Returns the folder it wrote."""
    out = flags[flags.index("--out") + 1]
    threads, argv = torch.get_num_threads(), sys.argv
    try:
        sys.argv = ["train.py", *map(str, flags)]
        train.main()
    finally:
        sys.argv = argv
        torch.set_num_threads(threads)
    return out


def on_toy(toy, out, *flags):
    return run("--model", toy["model"], "--data", toy["data"], "--eval-data", toy["eval_data"], "--instruction", "", "--dtype", "float32",
               "--group-size", "4", "--out", str(out), *SHORT, *flags)


def metrics_of(out):
    with open(os.path.join(out, "metrics.jsonl")) as f:
        return [json.loads(line) for line in f]


# ---------------------------------------------------------------------------------------------------------------------
# The toy

def test_toy_problems_are_right_and_held_out_ones_are_new(toy):
    """Forbids a toy whose golds are wrong or cannot be written in its tokens, and held-out problems that were trained on."""
    problems, held_out = read_problems(toy["data"]), read_problems(toy["eval_data"])
    assert len(problems) == 4_000 and len(held_out) >= 200
    assert prepare(problems, load_tokenizer(toy["model"], instruction=""), 24, 128) == []
    assert all(grade(p.gold, p.answer) for p in problems + held_out)
    lock = lambda p: "".join(c for c in p.question if c.isdigit())
    assert not {lock(p) for p in problems} & {lock(p) for p in held_out}
    first, *addends = map(int, lock(held_out[0]))
    digits = [first]
    for a in addends:
        digits.append((digits[-1] + a) % 10)
    assert held_out[0].answer == "".join(map(str, digits))


def test_toy_follows_from_its_seed(toy, tmp_path):
    """Forbids arms of a comparison that start from different weights or data."""
    again, other = build_toy(str(tmp_path / "a"), seed=0), build_toy(str(tmp_path / "b"), seed=1)
    for name in ("data", "eval_data"):
        same = [open(where[name]).read() for where in (toy, again, other)]
        assert same[0] == same[1] != same[2]
    weights = [load_file(os.path.join(where["model"], "model.safetensors"))["model.norm.weight"] for where in (toy, again)]
    assert torch.equal(*weights)


def test_grpo_takes_no_step_where_gcpo_does(toy, tmp_path):
    """Forbids a toy that shows something else than it claims: from random weights every group is all wrong, so GRPO
    leaves the weights as they are, to the bit, and GCPO does not."""
    start = load_model(toy["model"])
    for algo, stays in (("grpo", True), ("gcpo", False), ("sft", False)):
        out = on_toy(toy, tmp_path / algo, "--algo", algo)
        trained = load_model(os.path.join(out, "model"))
        assert all(torch.equal(a, b) for a, b in zip(start.parameters(), trained.parameters())) == stays
        last = metrics_of(out)[-1]
        assert last["update/skipped"] == float(stays) and last["gold/share"] == float(not stays)


# ---------------------------------------------------------------------------------------------------------------------
# What a run writes

def test_a_run_leaves_a_whole_folder(toy, tmp_path):
    """Forbids lost steps, half lines, groups that cannot be read, and a trained folder that transformers cannot load or
    that gives other logits."""
    out = on_toy(toy, tmp_path / "run", "--save-every", "1", "--updates", "2", "--eval-every", "1", "--eval-samples", "2")
    rows = metrics_of(out)
    assert [r["step"] for r in rows] == [0, 1, 2] and all("eval/mean" in r and "eval/pass@2" in r for r in rows)
    samples = [json.loads(line) for line in open(os.path.join(out, "samples.jsonl"))]
    assert [s["step"] for s in samples] == [1, 2] and all(len(s["responses"]) == 4 for s in samples)
    gold = [r for s in samples for r in s["responses"] if r["is_gold"]]
    assert len(gold) == 2 and all(r["correct"] and r["advantage"] > 0 for r in gold)
    record = json.load(open(os.path.join(out, "run.json")))
    assert record["algorithm"]["name"] == "gcpo" and record["config"]["updates"] == 2 and record["with_gold"] == 4_000
    assert sorted(os.listdir(out)) == ["checkpoints", "metrics.jsonl", "model", "run.json", "samples.jsonl", "tokenizer"]
    assert sorted(os.listdir(os.path.join(out, "checkpoints"))) == ["step-000001", "step-000002"]
    assert record["git"] is None or len(record["git"]) == 40

    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoModelForCausalLM.from_pretrained(os.path.join(out, "model")).float(), load_model(os.path.join(out, "model"))
    tokens = torch.randint(0, ours.config.vocab_size, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(theirs(tokens).logits, ours.logits(ours(tokens)), atol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(os.path.join(out, "model")).eos_token == "<end>"


def test_the_same_command_gives_the_same_bits(toy, tmp_path):
    """Forbids random state outside the seeds."""
    def one(name, *flags):
        out = on_toy(toy, tmp_path / name, "--threads", "1", "--updates", "2", *flags)
        return [{k: v for k, v in r.items() if not k.startswith(("time/", "memory/"))} for r in metrics_of(out)], load_file(os.path.join(out, "model", "model.safetensors"))
    (rows_a, weights_a), (rows_b, weights_b), (rows_c, _) = one("a"), one("b"), one("c", "--seed", "1")
    assert rows_a == rows_b and all(torch.equal(weights_a[n], weights_b[n]) for n in weights_a)
    assert rows_a != rows_c


def test_resolved_settings_are_one_command(toy, tmp_path, capsys):
    """Forbids a printed command that is another run: parsed again, it gives the same settings and switches."""
    out = on_toy(toy, tmp_path / "run", "--gold-slot", "longest", "--gold-clip", "none")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("python train.py"))
    import shlex
    words = shlex.split(line)[2:]
    assert "--out" not in words  # so that a second run finds a folder of its own
    config, algorithm, _ = train.parse_flags(words)
    record = json.load(open(os.path.join(out, "run.json")))
    assert {**record["config"], "out": None} == {**config.__dict__, "out": None}
    assert record["algorithm"] == algorithm.__dict__


@pytest.mark.parametrize("flags", [["--kl-coef", "0.1"], ["--algo", "luffy", "--updates", "2"], ["--algo", "dapo", "--rows-per-pass", "3"],
                                   ["--gold-when", "always", "--dtype", "bfloat16"]])
def test_other_settings_run(toy, tmp_path, flags):
    """Forbids a switch that breaks the loop: finite losses and gradients for each."""
    last = metrics_of(on_toy(toy, tmp_path / "run", *flags))[-1]
    assert last["update/not_finite"] == 0 and (last["update/skipped"] == 1 or last["update/grad_norm"] > 0)


# ---------------------------------------------------------------------------------------------------------------------
# Pieces of the loop

def test_every_problem_is_trained_on_once_a_pass():
    """Forbids remainder problems dropped or repeated (22), and an order that is the same in every pass: five passes over
    7 problems in steps of 4 or of 20."""
    for prompts in (4, 20):
        state = dict(BEGINNING)
        stream = [i for _ in range(-(-35 // prompts)) for i in next_problems(prompts, 7, state, 0)][:35]
        passes = [stream[i:i + 7] for i in range(0, 35, 7)]
        assert all(sorted(p) == list(range(7)) for p in passes) and len({tuple(p) for p in passes}) > 1


def test_history_resampling_drops_what_was_solved():
    """Forbids problems dropped in the middle of a pass, or that come back; from a state that went through JSON. And where
    all are solved, the data begins again rather than end."""
    state = dict(BEGINNING)
    assert sorted(next_problems(7, 7, state, 0)) == list(range(7))
    state["solved"] = [1, 4]                                                # also what the pass's last step found out
    state = json.loads(json.dumps(state))
    for _ in range(3):
        assert sorted(next_problems(5, 7, state, 0)) == [0, 2, 3, 5, 6]
    begun = next_problems(3, 7, state, 0)
    state["solved"] = [0, 1, 4]                                             # in the middle of a pass: not before the next
    assert sorted(begun + next_problems(2, 7, state, 0)) == [0, 2, 3, 5, 6]
    assert sorted(next_problems(4, 7, state, 0)) == [2, 3, 5, 6]
    state["solved"] = list(range(7))
    assert sorted(next_problems(7, 7, state, 0)) == list(range(7))


def rigged(monkeypatch, toy, right_of, algo, prompts=4, problems=12, **changes):
    """`collect` over made-up problems 0, 1, 2 …, of whose four rollouts right_of(index) are correct."""
    def fake_sample(model, prompts, group_size, max_new_tokens, **_):
        no = torch.zeros(group_size, dtype=torch.bool)
        return [Group(p, torch.ones(group_size, 5, dtype=torch.long), torch.arange(2, 2 + group_size), ~no, torch.zeros(group_size, 5), no,
                      torch.zeros(group_size), no) for p in prompts]

    def fake_grade(group, problem, *_):
        correct = torch.arange(len(group.lengths)) < right_of(int(problem.prompt))
        return replace(group, correct=correct, rewards=correct.float())
    monkeypatch.setattr(train, "sample", fake_sample)
    monkeypatch.setattr(train, "grade_group", fake_grade)
    made = [Problem("Q?", "1", prompt=torch.tensor([i]), gold_ids=torch.tensor([7, 0])) for i in range(problems)]
    state, config = dict(BEGINNING), Config(prompts=prompts, group_size=4, max_new_tokens=10)
    run = lambda step=0: collect(step, None, load_tokenizer(os.path.join(toy["model"])), made, state, None, replace(ALGORITHMS[algo], **changes), config)
    return run, state


def test_dynamic_sampling(monkeypatch, toy):
    """Forbids groups without contrast that stay while others wait, more rounds than max_tries, and a batch of another size:
    problems 0, 3, 6, 9 of twelve have right and wrong rollouts; three rounds of four, then of what is missing, find some."""
    run, state = rigged(monkeypatch, toy, lambda i: (2, 0, 4)[i % 3], "dapo")
    rollouts, items = run()
    mixed = [0 < i.group.correct.sum() < 4 for i in items]
    order = next_problems(12, 12, dict(BEGINNING), 0)                       # what it went through
    assert len(items) == 4 and sorted(i.place for i in items) == [0, 1, 2, 3] and sum(mixed) == sum(i % 3 == 0 for i in order[:len(rollouts)])
    assert mixed == sorted(mixed, reverse=True) and 4 < len(rollouts) <= 12 and state["taken"] == len(rollouts) % 12
    run, _ = rigged(monkeypatch, toy, lambda i: 0, "dapo")
    rollouts, items = run()
    assert len(rollouts) == 12 and len(items) == 4 and not any(i.group.correct.any() or i.has_contrast for i in items)
    run, _ = rigged(monkeypatch, toy, lambda i: 0, "gcpo", resample="dynamic")     # gold makes contrast, so one round is enough
    rollouts, items = run()
    assert len(rollouts) == 4 and all(i.group.is_gold.any() and i.has_contrast for i in items)
    assert not any(g.is_gold.any() or g.correct.any() for g in rollouts)            # what is reported is what was sampled


def test_history_is_kept_while_sampling(monkeypatch, toy):
    """Forbids a list of solved problems that never shrinks, or that other algorithms keep too."""
    solved = {2, 3, 5}
    run, state = rigged(monkeypatch, toy, lambda i: 4 if i in solved else 1, "srpo", prompts=12)
    run()
    assert state["solved"] == [2, 3, 5] and state["dropped"] == []
    state |= {"solved": [1, 3], "dropped": [], "taken": 0}                  # 1 was solved once; now it is not
    run()
    assert state["solved"] == [2, 3, 5]
    run, state = rigged(monkeypatch, toy, lambda i: 4, "grpo", prompts=12)
    run()
    assert state["solved"] == []


def test_overlong_rollouts_lose_reward_and_stay_correct(monkeypatch, toy):
    """Forbids a penalty that decides what is correct, or that falls on gold: lengths 2, 3, 4, 5 of 10, over the last 0.7."""
    run, _ = rigged(monkeypatch, toy, lambda i: 0, "gcpo", overlong=0.7)
    rollouts, items = run()
    assert rollouts[0].rewards.tolist() == pytest.approx([0, 0, -1 / 7, -2 / 7])
    assert [r for r, gold in zip(items[0].group.rewards.tolist(), items[0].group.is_gold) if gold] == [1.0]


def test_sft_then_rl(toy, tmp_path):
    """Forbids a phase that does not end: the first half trains on gold alone and samples nothing, the second samples."""
    rows = metrics_of(on_toy(toy, tmp_path / "run", "--algo", "sft_gcpo", "--steps", "4"))
    assert ["reward/mean" in r for r in rows[1:]] == [False, False, True, True] and [r["gold/share"] for r in rows[1:]] == [1.0] * 4


@pytest.mark.parametrize("flags", [[], ["--algo", "sft"], ["--algo", "dpo"], ["--algo", "grpo"], ["--algo", "luffy", "--dtype", "bfloat16"]])
def test_show(tmp_path, monkeypatch, capsys, flags):
    """Forbids a picture of something else than the algorithm: gold in its row, its advantage, mask and probability before
    and after one step; and a run that is saved though only shown."""
    monkeypatch.chdir(tmp_path)
    argv = sys.argv
    try:
        sys.argv = ["train.py", "--show", *flags]
        train.main()
    finally:
        sys.argv = argv
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line[:4].strip().isdigit()]
    head = [r for r in rows if len(r) >= 8 and r[-1].replace(".", "").isdigit()]
    gold = [r for r in head if "gold" in r]
    assert len(head) == (1 if "sft" in flags else 4) and os.listdir(tmp_path) == []
    if "grpo" in flags:
        assert not gold and any("no contrast" in line for line in lines)
    else:
        (index, _, _, reward, advantage, before, ratio, after, _), = gold
        assert float(reward) == 1 and float(advantage) > 0 and float(after) > float(before)
        assert any("<end>" in line and "####" in line for line in lines)


def test_learning_rate_warms_up_and_falls():
    """Forbids a first step at rate 0 and a last one that misses lr_end."""
    config = Config(lr=1.0, lr_end=0.1, warmup=4, steps=14)
    rates = [learning_rate(step, config) for step in range(14)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and rates[-1] == pytest.approx(0.1) and rates[4:] == sorted(rates[4:], reverse=True)


def test_bf16_copy_leaves_its_gradients_on_the_fp32_weights(toy):
    """Forbids bf16 master weights (9): gradients of two passes add up in fp32 on the weights, the copy keeps none, and
    after a step the copy is the rounded weights again."""
    model = load_model(toy["model"])
    copy = make_policy(model, torch.bfloat16)
    prompt, responses = torch.tensor([3, 4, 5]), torch.tensor([[6, 7, 8], [9, 10, 11]])
    for _ in range(2):
        token_logprobs(copy, prompt, responses)[0].sum().backward()
    assert all(p.grad is None for p in copy.parameters()) and all(p.grad.dtype == p.dtype == torch.float32 for p in model.parameters())
    twice = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    token_logprobs(model, prompt, responses)[0].sum().backward()
    exact = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert torch.nn.functional.cosine_similarity(twice, exact, dim=0) > 0.999 and abs(twice.norm() / exact.norm() - 2) < 0.02
    with torch.no_grad():
        model.norm.weight += 1.0
    refresh_policy(copy, model)
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(copy.parameters(), model.parameters()))


def test_rollout_metrics_of_hand_made_groups():
    """Forbids metrics averaged over the wrong thing (17): gold does not count as a success of the policy."""
    def group(correct, gold=False):
        correct = torch.tensor(correct)
        return Group(torch.tensor([1]), torch.zeros(2, 4, dtype=torch.long), torch.tensor([2, 4]), torch.tensor([True, False]), torch.zeros(2, 4), correct,
                     correct.float(), torch.tensor([gold, False]))
    rollouts = [group([False, False]), group([True, False]), group([True, True]), group([False, False])]
    items = [Item(0, None, g, torch.zeros(2)) for g in (group([True, False], gold=True), *rollouts[1:])]
    assert rollout_metrics(rollout_numbers(rollouts, items)) == {
        "gold/share": 0.25, "groups/sampled": 4, "reward/mean": 0.375, "reward/correct": 0.375, "groups/all_wrong": 0.5, "groups/mixed": 0.25, "groups/all_right": 0.25,
        "length/mean": 3.0, "length/truncated": 0.5}
    sums = Counter(loss=0.5, policy_tokens=10, policy_ratio=11, policy_clipped=2, gold_tokens=4, gold_logprob=-8, gold_ratio=5, gold_clipped=1, mismatch=1)
    metrics = update_metrics(sums, [2.0, None])
    assert (metrics["policy/ratio"], metrics["policy/clip_fraction"], metrics["gold/logprob"], metrics["gold/clip_fraction"], metrics["sampler/mismatch"],
            metrics["update/grad_norm"], metrics["update/skipped"], metrics["update/loss"]) == (1.1, 0.2, -2.0, 0.25, 0.1, 2.0, 0.5, 0.25)


def test_several_updates_of_a_sequence_ratio_default_to_fp32():
    """Forbids a clip range below the rounding noise of bf16, which would clip nearly every sequence by rounding alone."""
    files = ["--model", "m", "--data", "d"]
    dtype = lambda *flags: train.parse_flags([*files, *flags])[0].dtype
    assert dtype() == "auto" and dtype("--updates", "2") == "float32"
    assert dtype("--updates", "2", "--algo", "grpo") == "auto" and dtype("--updates", "2", "--clip-low", "0.1", "--clip-high", "0.1") == "auto"


def test_save_replaces_a_folder_whole(toy, tmp_path):
    """Forbids a model folder that mixes two models, or leftovers beside it."""
    model, folder = load_model(toy["model"]), str(tmp_path / "model")
    save_model(model, folder, toy["model"])
    with torch.no_grad():
        model.norm.weight += 1.0
    save_model(model, folder, toy["model"])
    assert torch.equal(load_model(folder).norm.weight, model.norm.weight) and os.listdir(tmp_path) == ["model"]


# ---------------------------------------------------------------------------------------------------------------------
# What a run refuses

@pytest.mark.parametrize("flags, words", [
    (["--model", "{model}"], "--data is missing"), (["--data", "{data}"], "--model is missing"), (["--eval-data", "{data}"], "--eval-data needs"),
    (["--model", "/nowhere", "--data", "{data}"], "no such folder"), (["--model", "{model}", "--data", "/nowhere.jsonl"], "no such file"),
    (["--steps", "0"], "--steps 0"), (["--lr", "nan"], "--lr nan"), (["--temperature", "0"], "--temperature 0"), (["--group-size", "1"], "--group-size 1"),
    (["--updates", "33"], "--updates 33"), (["--clip-low", "-1"], "--clip-low"), (["--gold-shape", "ratio"], "--gold-old one"), (["--step", "3"], "--step"), (["--seed", "9" * 25], "too large"), (["--device", "meta"], "--device meta"),
    (["--device", "cuda:99"], "--device cuda:99"), (["--reward", "nothing.py:f"], "--reward"), (["--max-new-tokens", "120"], "does not fit"),
    (["--algo", "sft", "--max-new-tokens", "5", "--model", "{model}", "--data", "{data}"], "none that can be used"),
    (["--out", "{occupied}"], "there is something already")])
def test_bad_input_is_one_line_and_writes_nothing(toy, tmp_path, monkeypatch, flags, words):
    """Forbids a traceback, a guess, or a half-made folder where a flag or path is wrong."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("occupied")
    open("occupied/precious", "w").close()
    flags = [f.format(model=toy["model"], data=toy["data"], occupied="occupied") for f in flags]
    if "--out" not in flags:
        flags += ["--out", "out"]
    with pytest.raises(InputError) as error:
        run(*flags)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert os.listdir("occupied") == ["precious"] and os.listdir(".") == ["occupied"]


def test_exit_status_is_2_without_traceback(tmp_path):
    """Forbids a traceback as the answer to a wrong path; the only test of the real command line."""
    for flags in (["--model", "/nowhere", "--data", "/nowhere"], ["--level", "word"]):
        done = subprocess.run([sys.executable, os.path.join(ROOT, "train.py"), *flags], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == ""
    assert os.listdir(tmp_path) == []


def test_a_stopped_run_keeps_its_model(tmp_path):
    """Forbids hours lost to Ctrl-C: the model as it was is saved, the log is whole, and one line says where."""
    out = tmp_path / "run"
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, "train.py"), "--out", str(out), "--eval-every", "0"], stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_text().splitlines()) < 3:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    steps = metrics_of(out)[-1]["step"]
    model = out / "checkpoints" / f"step-{steps:06d}" / "model"
    assert process.returncode == 130 and "Traceback" not in errors and f"--resume --out {out}" in errors and str(model) in errors
    assert load_model(str(model)) and steps >= 2


@pytest.mark.parametrize("error, status, words", [
    (InputError("two\nlines"), 2, "error: two lines"), (KeyboardInterrupt(), 130, "interrupted"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 2, "--rows-per-pass"), (torch.OutOfMemoryError("CUDA"), 2, "--rows-per-pass")])
def test_what_a_user_can_cause_ends_in_one_line(capsys, error, status, words):
    """Forbids a traceback for bad input, Ctrl-C or a full memory; any other error is ours and keeps its traceback."""
    def fails(e):
        raise e
    with pytest.raises(SystemExit) as exit_:
        exit_cleanly(lambda: fails(error))
    printed = capsys.readouterr().err.strip()
    assert exit_.value.code == status and words in printed and "\n" not in printed
    with pytest.raises(RuntimeError):
        exit_cleanly(lambda: fails(RuntimeError("a bug")))


# ---------------------------------------------------------------------------------------------------------------------
# A real model, if GCPO_TEST_MODEL names its folder

@pytest.mark.skipif("GCPO_TEST_MODEL" not in os.environ, reason="GCPO_TEST_MODEL names no model folder")
def test_default_learning_rate_moves_a_real_model():
    """Forbids a default that trains nothing: one step on one gold raises its fp32 logprob, and ten raise it in the
    compute dtype, where a change below half a bf16 step cannot be seen."""
    folder = os.environ["GCPO_TEST_MODEL"]
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    compute, config, gcpo = make_policy(model, torch.bfloat16), Config(), ALGORITHMS["gcpo"]
    item_of = lambda text, gold: (tokenizer.encode_response(text), tokenizer.encode_response(gold))
    wrong, gold = item_of("I do not know.", "He has 3 + 4 = 7 apples.\n#### 7")
    width = max(len(wrong), len(gold))
    pad = lambda x: torch.nn.functional.pad(x, (0, width - len(x)))
    prompt = torch.tensor(tokenizer.tokenizer.encode("Tom has 3 apples and gets 4 more. How many has he?\n").ids)
    group = Group(prompt, torch.stack([pad(gold), pad(wrong)]), torch.tensor([len(gold), len(wrong)]), torch.ones(2, dtype=torch.bool), torch.zeros(2, width),
                  torch.tensor([True, False]), torch.tensor([1.0, 0.0]), torch.tensor([True, False]))
    item = Item(0, None, group, torch.tensor([0.7, -0.7]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0)
    with torch.no_grad():
        logprob = lambda m: token_logprobs(m, prompt, gold[None])[0].mean().item()
        exact, rounded = [logprob(model)], [logprob(compute)]
        for _ in range(10):
            with torch.enable_grad():
                train.update(model, compute, optimizer, [item], gcpo, config)
            exact.append(logprob(model))
        rounded.append(logprob(compute))
    assert exact[1] > exact[0] and rounded[-1] > rounded[0] + 0.02


def test_toy_defaults_are_flags():
    """Forbids a toy setting that no flag can change."""
    assert set(TOY) <= {f for f in Config.__dataclass_fields__}


# ---------------------------------------------------------------------------------------------------------------------
# The README

def test_readme_names_every_metric_and_every_preset(toy, tmp_path):
    """Forbids a metric without its sentence, and a preset without its paper."""
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f:
        readme = f.read()
    written = {key for row in metrics_of(on_toy(toy, tmp_path / "run", "--eval-samples", "2")) for key in row if key != "step"}
    explained = {"groups/mixed": "`mixed`", "groups/all_right": "`all_right`"}
    explained |= {key: "`eval/pass@k`" for key in written if key.startswith("eval/pass@")}
    assert not {key for key in written if explained.get(key, f"`{key}`") not in readme}
    assert all(f"| `{name}` |" in readme for name in ALGORITHMS)
