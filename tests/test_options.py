"""Flags and settings: what they become, what is refused, and how a program ends."""
import json
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from test_train import ROOT, on_toy, train_with

import bench
from gcpo import ALGORITHMS
from support import math_verify
from support.common import InputError, exit_cleanly
from support.options import (
    Config, as_command, learning_rate, load_reward, parse_flags, sft_stage)
from support.toy import TOY


# ---- From flags to settings ----------------------------------------------------------------------

def test_resolved_settings_are_one_command(toy, tmp_path, capsys):
    """The command that a run prints, parsed again, gives the same settings and switches. (Bug: a
    printed command that is another run.)"""
    out = on_toy(toy, tmp_path / "run", "--gold-slot", "longest", "--gold-clip", "none")
    printed = capsys.readouterr().out.splitlines()
    line = next(line for line in printed if line.startswith("python train.py"))
    words = shlex.split(line)[2:]
    assert "--out" not in words    # so that a second run finds a folder of its own

    config, algorithm, _ = parse_flags(words)
    with open(os.path.join(out, "run.json")) as f:
        record = json.load(f)
    assert {**record["config"], "out": None} == {**vars(config), "out": None}
    assert record["algorithm"] == vars(algorithm)


def test_toy_defaults_are_flags():
    """Every setting of the toy is a field of Config, and so a flag. (Bug: a toy setting that no
    flag can change.)"""
    assert set(TOY) <= set(Config.__dataclass_fields__)


def test_several_updates_of_a_sequence_ratio_default_to_fp32():
    """Several updates with a narrow clip range of a sequence ratio are computed in fp32, unless
    asked otherwise. (Bug: a clip range below the rounding noise of bf16, which would clip nearly
    every sequence by rounding alone.)"""
    def dtype(*flags):
        return parse_flags(["--model", "m", "--data", "d", *flags])[0].dtype

    assert dtype() == "auto"
    assert dtype("--updates", "2") == "float32"
    assert dtype("--updates", "2", "--algo", "grpo") == "auto"
    assert dtype("--updates", "2", "--clip-low", "0.1", "--clip-high", "0.1") == "auto"


def test_sft_looks_at_aggregation_alone():
    """SFT's loss is the same under every other switch, alone and as --sft-share's first steps;
    --aggregation acts in both. (Bugs: a phase that ignores what was asked for; gold weighed by its
    probability under --algo sft --gold-old one.)"""
    def sft_of(*flags):
        _, algorithm, given = parse_flags(["--model", "m", "--data", "d", *flags])
        return algorithm if algorithm.train_on == "gold" else sft_stage(algorithm, given)

    plain = ALGORITHMS["sft"]
    assert sft_of("--algo", "sft") == plain
    assert sft_of("--algo", "sft", "--gold-old", "one", "--clip-high", "0.1") == plain
    for algo in ("sft", "sft_gcpo", "grpo"):
        named = dict(name=algo, paper=ALGORITHMS[algo].paper)
        share = [] if algo == "sft" else ["--sft-share", "0.5"]
        assert sft_of("--algo", algo, *share) == replace(plain, **named)
        mean_of_rows = sft_of("--algo", algo, *share, "--aggregation", "row_mean")
        assert mean_of_rows == replace(plain, **named, aggregation="row_mean")


@pytest.mark.parametrize("flags, idle", [
    (["--algo", "sft", "--gold-old", "one", "--aggregation", "row_mean"], ["--gold-old"]),
    (["--algo", "dpo", "--level", "sequence", "--beta", "0.2"], ["--level"]),
    (["--algo", "luffy", "--gold-clip", "0.2", "--scale", "std"], ["--gold-clip"]),
    (["--algo", "grpo", "--gold-slot", "first", "--clip-low", "0.1"], ["--gold-slot"]),
    (["--algo", "gcpo", "--gold-slot", "first", "--gold-rivals", "zero"], []),
    (["--algo", "gspo", "--gold-weight", "3", "--gold-rivals", "zero", "--scale", "mean"],
     ["--gold-weight", "--gold-rivals"]),
    (["--algo", "rft", "--clip-high", "0.1", "--virtual-right", "always", "--kl-coef", "0.1"],
     ["--clip-high", "--virtual-right"]),
    (["--algo", "ngrpo", "--virtual-right", "all_wrong"], []),
    (["--beta", "0.5", "--max-tries", "9", "--lora-alpha", "64", "--eval-every", "1"],
     ["--lora-alpha", "--eval-every", "--beta", "--max-tries"]),
    (["--algo", "dapo", "--max-tries", "9", "--lora-rank", "4", "--lora-alpha", "64"], []),
    (["--eval-data", "e", "--eval-every", "1", "--eval-samples", "4", "--eval-limit", "2"], []),
    (["--algo", "sft", "--group-size", "7", "--rows", "9", "--temperature", "0.6"],
     ["--group-size", "--rows", "--temperature"]),
    (["--algo", "sft", "--rows", "9", "--eval-data", "e"], []),
    (["--sft-share", "1", "--level", "token", "--aggregation", "row_mean", "--group-size", "7"],
     ["--level", "--group-size"]),
    (["--sft-share", "0.2", "--steps", "1"], ["--sft-share"])])
def test_switches_without_effect_are_named(capsys, flags, idle):
    """A switch given by hand that changes nothing is named in a note, and no other is. (Bug: an
    ablation of a switch that cannot act.)"""
    parse_flags(["--model", "m", "--data", "d", *flags])
    notes = [line for line in capsys.readouterr().err.splitlines() if "does not look at" in line]
    named = [word.strip(",") for line in notes for word in line.split() if word[:2] == "--"]
    assert sorted(named) == sorted(idle)


def test_learning_rate_warms_up_and_falls():
    """The rate rises to lr in `warmup` steps, then falls, and the last step's is lr · lr_end. (Bug:
    a first step at rate 0, or a last one that misses lr_end.)"""
    config = Config(lr=1.0, lr_end=0.1, warmup=4, steps=14)
    rates = [learning_rate(step, config) for step in range(14)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[-1] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_the_printed_command_is_the_run():
    """What was given by hand stays in it, though it equals a default. (Bug: --lora-rank 8 --lr 1e-5
    printed without its rate, and so ten times as fast when run again; a value that begins with -
    and is taken for a flag.)"""
    flags = ["--model", "m", "--data", "d", "--lora-rank", "8", "--lr", "1e-5",
             "--instruction=--go", "--correct-at=-1e-5"]
    config, algorithm, given = parse_flags(flags)
    printed = as_command(config, given).split()[2:]
    assert parse_flags(printed)[:2] == (config, algorithm)


OWN = ["--model", "m", "--data", "d"]


@pytest.mark.parametrize("flags", [
    ["--out", ""], [*OWN, "--out", ""], [*OWN, "--model", ""], [*OWN, "--data", ""],
    [*OWN, "--eval-data", ""], [*OWN, "--reward", ""], ["--stop-token", " "],
    ["--chat-template-args", ""], ["--device", ""]], ids=str)
def test_an_empty_path_is_refused(tmp_path, monkeypatch, flags):
    """--out "$OUT" with OUT unset. (Bug: it removed the folder `toy` of the current one.)"""
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "thesis.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f'{flags[-2]} "{flags[-1]}": is empty'):
        parse_flags(flags)
    assert (tmp_path / "toy" / "thesis.txt").exists()


# ---- The package math-verify as the reward -------------------------------------------------------

def test_math_verify_as_reward():
    """--reward math_verify grades with that package; what it cannot judge in time earns nothing,
    and the next response is judged again. (Bugs: a run that hangs on 10^{10^{10^{10}}}; a right
    response that earns 0 because the run was asked to stop.)"""
    pytest.importorskip("math_verify")
    reward = load_reward("math_verify")
    child = reward.function.child
    assert reward(r"So \boxed{\frac{2}{4}}", r"\frac{1}{2}") == 1.0
    assert reward(r"So \boxed{0.3}", r"\frac{1}{2}") == 0.0
    assert reward("no answer at all", "18") == 0.0
    os.kill(child.pid, signal.SIGINT)    # Ctrl-C reaches it too
    assert reward(r"\boxed{18}", "18") == 1.0
    child.kill()
    child.wait()
    assert reward(r"\boxed{18}", "18") == 0.0    # the child had died
    assert reward(r"\boxed{18}", "18") == 1.0    # a new one answers


def test_math_verify_has_a_limit(monkeypatch):
    """A child that does not answer is stopped. (Bug: a reward that waits for ever.)"""
    echo = (
        "import json, sys, time\n"
        "print(json.dumps('ready'), flush=True)\n"
        "for line in sys.stdin:\n"
        "    time.sleep(60 if 'slow' in line else 0)\n"
        "    print(1.0, flush=True)\n")
    monkeypatch.setattr(math_verify, "CHILD", echo)
    monkeypatch.setattr(math_verify, "SECONDS", 1)
    reward = load_reward("math_verify")
    assert reward("quick", "18") == 1.0
    assert reward("slow", "18") == 0.0
    assert reward("quick", "18") == 1.0


def test_math_verify_is_not_one_of_the_current_folder(tmp_path, monkeypatch):
    """A math_verify.py of the current folder does not run. (Bug: `python -c` takes it.)"""
    pytest.importorskip("math_verify")
    (tmp_path / "math_verify.py").write_text("open('PWNED', 'w')")
    monkeypatch.chdir(tmp_path)
    assert load_reward("math_verify")(r"\boxed{18}", "18") == 1.0
    assert os.listdir(tmp_path) == ["math_verify.py"]


def test_math_verify_where_it_is_missing(monkeypatch):
    """Without the package one line says how to get it."""
    missing = math_verify.CHILD.replace("from math_verify", "from no_such_math_verify")
    monkeypatch.setattr(math_verify, "CHILD", missing)
    with pytest.raises(InputError, match="pip install math-verify") as error:
        load_reward("math_verify")
    assert "\n" not in str(error.value)


# ---- What is refused -----------------------------------------------------------------------------

@pytest.mark.parametrize("flags, words", [
    (["--model", "{model}"], "--data is missing"),
    (["--data", "{data}"], "--model is missing"),
    (["--eval-data", "{data}"], "--eval-data needs"),
    (["--model", "/nowhere", "--data", "{data}"], "no such folder"),
    (["--model", "{model}", "--data", "/nowhere.jsonl"], "no such file"),
    (["--steps", "0"], "--steps 0"),
    (["--lr", "nan"], "--lr nan"),
    (["--temperature", "0"], "--temperature 0"),
    (["--group-size", "1"], "--group-size 1"),
    (["--updates", "33"], "--updates 33"),
    (["--clip-low", "-1"], "--clip-low"),
    (["--gold-shape", "ratio"], "--gold-old one"),
    (["--step", "3"], "--step"),
    (["--seed", "9" * 25], "too large"),
    (["--group-size", str(2**63 - 1)], "too large"),
    (["--gold-clip", "1e39"], "--gold-clip 1e+39"),
    (["--rows", "2", "--group-size", "4"], "--rows 2"),
    (["--device", "meta"], "--device meta"),
    (["--device", "cuda:99"], "--device cuda:99"),
    (["--reward", "nothing.py:f"], "--reward"),
    (["--max-new-tokens", "120"], "does not fit"),
    (["--algo", "sft", "--max-new-tokens", "5", "--model", "{model}", "--data", "{data}"],
     "none that can be used"),
    (["--out", "{occupied}"], "there is something already")])
def test_bad_input_is_one_line_and_writes_nothing(toy, tmp_path, monkeypatch, flags, words):
    """A wrong flag or path ends in one line that names it, and leaves nothing. (Bug: a traceback, a
    guess, or a half-made folder.)"""
    monkeypatch.chdir(tmp_path)
    os.mkdir("occupied")
    open("occupied/precious", "w").close()
    names = dict(model=toy["model"], data=toy["data"], occupied="occupied")
    flags = [flag.format(**names) for flag in flags]
    if "--out" not in flags:
        flags += ["--out", "out"]
    with pytest.raises(InputError) as error:
        train_with(*flags)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert os.listdir("occupied") == ["precious"]
    assert os.listdir(".") == ["occupied"]


@pytest.mark.parametrize("flags, words", [
    (["cost", "--model", "/nowhere"], "takes no flags"),
    (["sample", "--lora-rank", "4"], "--lora-rank"),
    (["step", "--lora-rank", "-1"], "0 or more")])
def test_bench_refuses_what_it_would_ignore(monkeypatch, flags, words):
    """(Bug: a table of one model printed for another.)"""
    monkeypatch.setattr("sys.argv", ["bench.py", *flags])
    with pytest.raises(InputError, match=words):
        bench.main()


# ---- How a program ends --------------------------------------------------------------------------

def test_exit_status_is_2_without_traceback(tmp_path):
    """A wrong path or flag, given to the real command line, ends with status 2 and writes nothing.
    (Bug: a traceback as the answer. This is the only test of the real command line.)"""
    for flags in (["--model", "/nowhere", "--data", "/nowhere"], ["--level", "word"]):
        done = subprocess.run(
            [sys.executable, os.path.join(ROOT, "train.py"), *flags],
            cwd=tmp_path,
            capture_output=True,
            text=True)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert done.stdout == ""
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error, status, words", [
    (InputError("two\nlines"), 2, "error: two lines"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 2,
     "--rows-per-pass"),
    (torch.OutOfMemoryError("CUDA"), 2, "--rows-per-pass")])
def test_what_a_user_can_cause_ends_in_one_line(capsys, error, status, words):
    """Bad input, Ctrl-C and a full memory end in one line. (Bug: a traceback for them.)"""
    with pytest.raises(SystemExit) as end:
        exit_cleanly(raising(error))
    printed = capsys.readouterr().err.strip()
    assert end.value.code == status
    assert words in printed
    assert "\n" not in printed


def test_our_own_bugs_keep_their_traceback():
    """Any other error is ours, and is raised as it is. (Bug: a bug that hides behind a line.)"""
    with pytest.raises(RuntimeError, match="a bug"):
        exit_cleanly(raising(RuntimeError("a bug")))


def raising(error):
    def main():
        raise error

    return main
