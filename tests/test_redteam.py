"""What an attack of 30,000 mutated files and 95 broken file systems found, one test a finding.

The letters (H1, M3, L10 …) are those of that report: high, middle and low.
"""
import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import read_json, read_tensors, write_json
from safetensors.torch import save_file
from test_train import ROOT, metrics_of, on_toy

import fuzz
import plot
from data import Limits, Problem, load_tokenizer, prepare
from gcpo import ALGORITHMS
from model import load_model
from support import parallel
from support.checkpoint import checkpoints, cut_log, digest_of, newest_checkpoint, refuse_changes
from support.common import (
    Forgiving, InputError, exit_cleanly, is_out_of_memory, pick_device, replaced_folder,
    written_whole)
from support.folders import copy_tokenizer
from support.options import (
    Config, check, fresh_folder, load_reward, place_run, set_up_process)


def refusal(call, *words):
    """call() must raise InputError with one line that says all of `words`."""
    with pytest.raises(InputError) as error:
        call()
    line = str(error.value)
    assert "\n" not in line
    assert all(word in line for word in words), line


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    """A run of three steps with a checkpoint after each. No test may change it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return on_toy(toy, out, "--steps", "3", "--save-every", "1", "--keep", "3")


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run", symlinks=True)


def resume(toy, out, *flags):
    return on_toy(toy, out, "--resume", "--steps", "4", "--save-every", "1", *flags)


# ---- Processes that do not agree -----------------------------------------------------------------

def test_m1_processes_with_other_settings_are_refused(monkeypatch):
    """A process that was started with another flag is named. (Bug: replicas that drift apart.)"""
    others = [{"lr": 1e-3, "seed": 0}, {"lr": 1e-3, "seed": 0}, {"lr": 5e-3, "seed": 0}]
    monkeypatch.setattr(parallel, "all_gather", lambda value: others)
    refusal(lambda: parallel.refuse_difference(others[0]), "process 2 has lr 0.005", "0.001")
    monkeypatch.setattr(parallel, "all_gather", lambda value: [value, value])
    parallel.refuse_difference(others[0])


@pytest.mark.parametrize("world", ["2", "abc", ""])
def test_l5_half_of_torchrun_s_environment(monkeypatch, world):
    """WORLD_SIZE without the rest of it is one line. (Bug: a traceback.)"""
    monkeypatch.setenv("WORLD_SIZE", world)
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    refusal(parallel.join, "WORLD_SIZE", "torchrun")


# ---- Streams -------------------------------------------------------------------------------------

PRINTS = (
    "import sys; sys.path.insert(0, {root!r})\n"
    "from support.common import exit_cleanly\n"
    "def main():\n"
    "    print('0.5 ± 0.1')\n"
    "    print('bar', file=sys.stderr, flush=True)\n"
    "    print(sys.stderr.isatty())\n"
    "    print('end')\n"
    "exit_cleanly(main)\n")


@pytest.mark.parametrize("redirect", ["2>&-", "2>/dev/full"])
def test_m2_m10_l16_output_that_cannot_be_written(redirect):
    """What a stream cannot take does not end a program. (Bugs: an accuracy lost at its ±; a run
    that ends because stderr is closed, or full.)"""
    command = f"{sys.executable} -c {json.dumps(PRINTS.format(root=ROOT))} {redirect}"
    done = subprocess.run(
        ["bash", "-c", f"exec {sys.executable} -c \"$CODE\" {redirect}"],
        env={**os.environ, "PYTHONIOENCODING": "ascii", "CODE": PRINTS.format(root=ROOT)},
        capture_output=True)
    assert done.returncode == 0, command
    assert done.stdout.split() == [rb"0.5", rb"\xb1", b"0.1", b"False", b"end"]


def test_m10_a_stream_that_fails_is_forgiven():
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

        def flush(self):
            raise OSError(28, "No space left on device")

    stream = Forgiving(Full())
    assert stream.write("abc") == 3
    stream.flush()
    assert stream.isatty() is False


# ---- The first seconds of a run ------------------------------------------------------------------

def test_m3_a_run_stopped_as_it_began_can_be_started_again(toy, tmp_path):
    """The same command works again. (Bug: "there is something already", and no run to resume.)"""
    out = tmp_path / "run"
    shutil.copytree(os.path.dirname(toy["data"]), out / "toy")
    os.remove(out / "toy" / "held_out.jsonl")
    os.mkdir(out / "tokenizer")
    on_toy(toy, out, "--steps", "1")
    assert os.path.isfile(out / "model" / "config.json")


@pytest.mark.parametrize("name", ["notes.txt", "toy/mine.txt", "run.json"])
def test_m3_what_is_not_ours_is_kept(tmp_path, name):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    refusal(lambda: check(Config(out=str(tmp_path / "run"))), "there is something already")
    assert path.read_text() == "precious"


def test_l13_a_refused_toy_in_the_current_folder(tmp_path, monkeypatch):
    """The reason is said, and nothing is left. (Bug: "Invalid argument", of removing `.`.)"""
    monkeypatch.chdir(tmp_path)
    from test_train import train_with
    refusal(lambda: train_with("--out", ".", "--max-new-tokens", "500"), "does not fit")
    assert os.listdir(tmp_path) == []


def test_l14_two_runs_that_begin_at_once(tmp_path, monkeypatch):
    """Each gets a folder of its own. (Bug: one dies, because both took the same name.)"""
    monkeypatch.chdir(tmp_path)
    assert [fresh_folder("runs/toy") for _ in range(3)] == ["runs/toy", "runs/toy-2", "runs/toy-3"]


@pytest.mark.parametrize("settings", [
    {"steps": 10**400}, {"warmup": 10**400}, {"rows_per_pass": 10**30}, {"group_size": 2**70}])
def test_l4_absurd_numbers(settings):
    refusal(lambda: check(Config(**settings)), "too large")


# ---- Nothing pretends ----------------------------------------------------------------------------

def test_m8_weights_that_are_not_finite_are_not_saved(toy, tmp_path):
    """A run whose weights overflow ends with one line, and leaves no folder that cannot be read.
    (Bug: status 0 and a model of infinities.)"""
    out = tmp_path / "run"
    refusal(lambda: on_toy(toy, out, "--lr", "1e300"), "not finite", "--lr")
    assert not os.path.exists(out / "model")
    assert newest_checkpoint(str(out)) is None


@pytest.fixture
def senseless(toy, tmp_path):
    """A model of finite weights, whose logits overflow to infinities, and probabilities to NaN."""
    folder = shutil.copytree(toy["model"], tmp_path / "senseless")
    weights = read_tensors(folder / "model.safetensors")
    weights["model.norm.weight"].fill_(3e38)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return {**toy, "model": str(folder)}


def test_m8_a_model_that_makes_no_sense(senseless, tmp_path):
    """Probabilities that are NaN end the run at its first evaluation. (Bug: an accuracy of 0, and
    nothing else said.)"""
    refusal(lambda: on_toy(senseless, tmp_path / "run"), "not finite")


def test_m8_a_run_without_one_finite_gradient(toy, tmp_path, monkeypatch):
    """A run that skipped its every update does not end well. (Bug: status 0.)"""
    clip = lambda parameters, norm: torch.tensor(torch.nan)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    out = tmp_path / "run"
    refusal(lambda: on_toy(toy, out), "gradients were not finite in 2 steps")
    assert load_model(str(out / "model"))


@pytest.mark.parametrize("lost", ["run.json", "tokenizer"])
def test_m7_a_folder_that_has_gone(toy, tmp_path, monkeypatch, lost):
    """A run whose folder was removed says so. (Bug: status 0, and a model without tokenizer.)"""
    from support import runlog

    out = tmp_path / "run"

    def show_on(bar, metrics):
        path = out / lost
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    monkeypatch.setattr(runlog, "show_on", show_on)
    refusal(lambda: on_toy(toy, out), "has gone")


TEMPLATES = {
    "constant": "<u>",
    "parts": "{% for m in messages %}{% for c in m.content if c.type == 'text' %}{{ c }}"
             "{% endfor %}{% endfor %}",
    "first letter": "{{ messages[-1].content[0] }}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_m11_a_template_without_the_question(toy, tmp_path, template):
    """A template that does not write the question is refused. (Bug: all prompts are one.)"""
    folder = shutil.copytree(toy["model"], tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(str(folder))
    problems = [Problem("tom has 3 3 3", "9", source="a.jsonl, line 1")]
    refusal(
        lambda: prepare(problems, tokenizer, Limits(20, 500)),
        "chat_template.jinja",
        "leaves out",
        "a.jsonl, line 1")


def test_l15_a_reward_that_exits(tmp_path):
    path = tmp_path / "reward.py"
    path.write_text("import sys\ndef f(response, answer):\n    sys.exit(0)\n")
    reward = load_reward(f"{path}:f")
    refusal(lambda: reward("a", "b"), "--reward", "failed")


# ---- Nothing is lost -----------------------------------------------------------------------------

def test_m5_what_lies_beside_checkpoints_is_left_alone(toy, copied):
    """Only a run's own step-N folders are removed. (Bug: a user's copy of one deleted.)"""
    root = copied / "checkpoints"
    shutil.copytree(root / "step-000002", root / "step-000002-mine")
    (root / "step-000001.tar").write_text("precious")
    os.symlink(root / "step-000002-mine", root / "step-000009")
    resume(toy, copied, "--keep", "1")
    left = set(os.listdir(root))
    assert left >= {"step-000002-mine", "step-000001.tar", "step-000009", "step-000004"}
    assert "step-000002" not in left


def test_m6_steps_sort_as_numbers(tmp_path):
    """step-1000010 comes after step-999999. (Bug: --resume goes back.)"""
    for step in (999990, 999999, 1000000, 1000010):
        os.makedirs(tmp_path / "checkpoints" / f"step-{step}")
    assert checkpoints(str(tmp_path))[-2:] == ["step-1000000", "step-1000010"]


def test_m9_settings_of_another_version(tmp_path):
    """A switch that is gone is named; one that is new has its default. (Bugs: StopIteration; runs
    that no update of the program lets go on.)"""
    def refuse(was, now, defaults):
        write_json(tmp_path / "run.json", {"settings": was})
        refuse_changes(str(tmp_path), now, defaults)

    same = {"lr": 1, "algorithm": {"level": "token"}}
    new = {"lr": 1, "algorithm": {"level": "token", "scale": "std"}, "strict": False}
    refuse(same, same, {})
    refuse(same, new, {"scale": "std", "strict": False})
    refusal(lambda: refuse(same, new, {"scale": "none", "strict": False}), "scale was 'none'")
    old = {"lr": 1, "algorithm": {"level": "token", "old_switch": 1}}
    refusal(lambda: refuse(old, same, {}), "old-switch was 1", "no such setting")
    refusal(lambda: refuse({"lr": 1}, same, {}), "run.json")
    refusal(lambda: refuse({**same, "lr": 2}, same, {}), "lr was 2")


def test_l12_a_link_as_model_is_kept(toy, tmp_path):
    """OUT/model may lie on another disk. (Bug: the last step lost to an error of rmtree.)"""
    out, other = tmp_path / "run", tmp_path / "other" / "model"
    os.makedirs(other)
    os.makedirs(out / "toy")
    with replaced_folder(str(other)) as beside:
        open(os.path.join(beside, "old"), "w").close()
    os.symlink(other, tmp_path / "link")
    with replaced_folder(str(tmp_path / "link")) as beside:
        open(os.path.join(beside, "new"), "w").close()
    assert os.path.islink(tmp_path / "link")
    assert os.listdir(other) == ["new"]
    assert os.listdir(other.parent) == ["model"]


# ---- A checkpoint vouches for itself -------------------------------------------------------------

@pytest.mark.parametrize("change", [
    {"taken": 7}, {"best": 5e-324}, {"best_step": 1}, {"bad_steps": 1}, {"epoch": 1},
    {"solved": [3]}, {"digest": "0"}, {"more": 1}, {"files": {}}])
def test_m4_a_state_that_was_altered(copied, change):
    """One digit of state.json altered, and --resume goes back. (Bug: it is believed.)"""
    path = copied / "checkpoints" / "step-000003" / "state.json"
    write_json(path, {**read_json(path), **change})
    assert newest_checkpoint(str(copied)).endswith("step-000002")


def vouched(folder):
    """Give a checkpoint checksums that fit, as a stranger would."""
    from support.checkpoint import sha256

    path = folder / "state.json"
    state = read_json(path)
    del state["digest"]
    file = folder / "optimizer.safetensors"
    state["files"]["optimizer.safetensors"] = [os.path.getsize(file), sha256(file)]
    write_json(path, {**state, "digest": digest_of(state)})


def without(key):
    return lambda moments, name: moments.pop(f"{name}.{key}")


def with_moment(key, change):
    def alter(moments, name):
        moments[f"{name}.{key}"] = change(moments[f"{name}.{key}"])
    return alter


MOMENTS = {
    "no step": (without("step"), "lacks"),
    "no exp_avg": (without("exp_avg"), "lacks"),
    "a stranger": (lambda m, name: m.update(nothing=torch.zeros(1)), "holds nothing"),
    "shape": (with_moment("exp_avg", lambda x: x[:1].clone()), "has shape"),
    "broadcast": (with_moment("exp_avg_sq", lambda x: torch.zeros(1)), "has shape"),
    "whole numbers": (with_moment("exp_avg", lambda x: x.long()), "is of int64"),
    "nan": (with_moment("exp_avg", lambda x: x * torch.nan), "is not finite"),
    "negative": (with_moment("exp_avg_sq", lambda x: x - 1), "is below 0"),
    "step shape": (with_moment("step", lambda x: torch.zeros(2)), "has shape"),
}


@pytest.mark.parametrize("alter, says", MOMENTS.values(), ids=MOMENTS.keys())
def test_l6_moments_that_adamw_cannot_have_written(toy, copied, alter, says):
    """An optimizer file with checksums that fit is checked all the same. (Bugs: tracebacks; a
    moment of shape (1,) broadcast over a matrix.)"""
    folder = copied / "checkpoints" / "step-000003"
    moments = read_tensors(folder / "optimizer.safetensors")
    alter(moments, "model.norm.weight" if "model.norm.weight.step" in moments else "norm.weight")
    save_file(moments, folder / "optimizer.safetensors")
    vouched(folder)
    refusal(lambda: resume(toy, copied), "optimizer.safetensors", says)


# ---- Files of strangers --------------------------------------------------------------------------

def test_l10_a_link_beside_a_file_is_not_followed(tmp_path):
    """X.writing may be a link that somebody laid there. (Bug: the file it leads to overwritten.)"""
    precious = tmp_path / "precious"
    precious.write_text("precious")
    os.symlink(precious, tmp_path / "a.json.writing")
    with written_whole(str(tmp_path / "a.json")) as f:
        f.write("new")
    assert precious.read_text() == "precious"
    assert (tmp_path / "a.json").read_text() == "new"


def test_l10_a_linked_folder_beside_is_not_emptied(tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("precious")
    os.symlink(precious, tmp_path / "model.writing")
    with replaced_folder(str(tmp_path / "model")) as beside:
        open(os.path.join(beside, "new"), "w").close()
    assert os.listdir(precious) == ["file"]
    assert os.listdir(tmp_path / "model") == ["new"]


def test_l11_no_foreign_file_is_copied(toy, tmp_path):
    """A link out of the model folder is not followed when its files are copied. (Bug: /etc/passwd
    as merges.txt, in a model that is then published.) The hub's cache is made of links."""
    blobs = tmp_path / "cache" / "blobs"
    snapshot = tmp_path / "cache" / "snapshots" / "1"
    os.makedirs(blobs)
    os.makedirs(snapshot)
    for i, name in enumerate(os.listdir(toy["model"])):
        shutil.copy(os.path.join(toy["model"], name), blobs / str(i))
        os.symlink(blobs / str(i), snapshot / name)
    copy_tokenizer(str(snapshot), str(tmp_path / "copied"))
    assert os.path.isfile(tmp_path / "copied" / "tokenizer.json")
    os.symlink("/etc/passwd", snapshot / "merges.txt")
    refusal(lambda: copy_tokenizer(str(snapshot), str(tmp_path / "other")), "merges.txt", "link")
    assert not os.path.exists(tmp_path / "other" / "merges.txt")


def test_l2_a_tokenizer_that_panics(toy, tmp_path):
    """A panic of the tokenizers library is one line. (Bug: PanicException is no Exception.)"""
    folder = shutil.copytree(toy["model"], tmp_path / "model")
    spec = read_json(folder / "tokenizer.json")
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "nope", "type_id": 0}},
                   {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {}}
    write_json(folder / "tokenizer.json", spec)
    refusal(lambda: load_tokenizer(str(folder)).encode_prompt(Problem("3", "3")), str(folder))


@pytest.mark.parametrize("part", ["normalizer", "decoder"])
def test_l3_a_tokenizer_that_never_ends(toy, tmp_path, part):
    """Replacements that double a text forty times are refused. (Bug: an hour, or all memory.)"""
    folder = shutil.copytree(toy["model"], tmp_path / "model")
    spec = read_json(folder / "tokenizer.json")
    double = {"type": "Replace", "pattern": {"String": "1"}, "content": "11"}
    steps = "normalizers" if part == "normalizer" else "decoders"
    spec[part] = {"type": "Sequence", steps: [double] * 40}
    write_json(folder / "tokenizer.json", spec)
    refusal(lambda: load_tokenizer(str(folder)), "tokenizer.json", "times longer")


def test_l2_an_end_token_of_half_a_letter(toy, tmp_path):
    folder = shutil.copytree(toy["model"], tmp_path / "model")
    write_json(folder / "tokenizer_config.json", {"eos_token": "\ud800"})
    refusal(lambda: load_tokenizer(str(folder)), "no end token")


def test_l8_a_deeply_nested_line_of_a_log(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + "[" * 100_000 + "\n" + '{"step": 2}\n')
    cut_log(str(path), 1)
    assert path.read_text() == '{"step": 1}\n'


def test_l1_memory_that_is_not_there(capsys):
    def main():
        raise MemoryError

    with pytest.raises(SystemExit) as end:
        exit_cleanly(main)
    assert end.value.code == 2
    assert "out of memory" in capsys.readouterr().err


def test_l18_a_pipe_as_data(toy, tmp_path):
    os.mkfifo(tmp_path / "data.jsonl")
    refusal(
        lambda: on_toy({**toy, "data": str(tmp_path / "data.jsonl")}, tmp_path / "run"),
        "not a regular file")


# ---- At random -----------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", [1, 2])
def test_mutated_files_end_in_one_line(seed):
    """Some of the mutations of tests/fuzz.py, which tries 10,000."""
    ends = fuzz.run(100, seed)
    assert sum(counts["failed"] for counts in ends.values()) == 0
    assert sum(counts["refused"] for counts in ends.values()) > 40


# ---- plot.py -------------------------------------------------------------------------------------

LINES = {
    "no object": "[1]",
    "no step": '{"reward/mean": 1}',
    "text for a number": '{"step": 1, "reward/mean": "a"}',
    "text for a step": '{"step": "a", "reward/mean": 1}',
    "a huge number": '{"step": 1, "reward/mean": 1' + "0" * 400 + "}",
    "nested": "[" * 100_000,
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES.keys())
def test_l7_a_log_that_is_none(tmp_path, capsys, line):
    """plot.py refuses a line that no run writes. (Bug: tracebacks.)"""
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n' + line + "\n")
    with pytest.raises(SystemExit) as end:
        plot.read_run(str(tmp_path))
    assert end.value.code == 2
    assert "line 2" in capsys.readouterr().err


def test_l7_a_picture_that_cannot_be_written(finished, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    os.symlink("/dev/full", tmp_path / "a.svg")
    monkeypatch.setattr(sys, "argv", ["plot.py", finished, "--out", str(tmp_path / "a.svg")])
    with pytest.raises(SystemExit) as end:
        plot.main()
    assert end.value.code == 2
    assert "cannot be written" in capsys.readouterr().err


def test_l7_a_run_named_like_a_formula(finished, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    folder = shutil.copytree(finished, tmp_path / r"a$\foo$b")
    assert metrics_of(folder)
    monkeypatch.setattr(sys, "argv", ["plot.py", str(folder), "--out", str(tmp_path / "a.png")])
    plot.main()
    assert os.path.getsize(tmp_path / "a.png") > 0


# ---- GPUs, as far as a CPU can pretend -----------------------------------------------------------

@pytest.fixture
def third_process_of_two_gpus(monkeypatch):
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "2"), ("LOCAL_RANK", "2"),
                        ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_more_processes_than_gpus(third_process_of_two_gpus):
    """A process without a GPU of its own is refused in one line. (Bug: a traceback of CUDA's.)"""
    refusal(parallel.join, "--nproc-per-node", "process number 2", "2 GPUs")


def test_processes_that_want_no_gpu(monkeypatch, third_process_of_two_gpus):
    """--device cpu may have more processes than there are GPUs. (Bug: refused for want of GPUs.)"""
    backends = []
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda backend, **_: backends.append(backend))
    assert parallel.join("cpu") == "cpu"
    assert backends == ["gloo"]


def test_a_run_on_a_disk_that_others_do_not_see(monkeypatch, tmp_path):
    """A second node without the run's folder says so. (Bug: "holds no run", on one of two.)"""
    monkeypatch.setattr(parallel, "from_first", lambda value: True if value is False else value)
    config = Config(out=str(tmp_path), resume=True, model="m", data="d")
    refusal(lambda: place_run(config, ALGORITHMS["gcpo"]), "run.json", "all nodes share")


def test_a_run_outlives_its_reader(toy, tmp_path):
    """`train.py | tee log`, and tee has gone: the run goes on to its end. (Bug: it ended at the
    next evaluation, before that step was saved.)"""
    out = tmp_path / "run"
    command = [
        sys.executable, "-u", os.path.join(ROOT, "train.py"), "--model", toy["model"],
        "--data", toy["data"], "--eval-data", toy["data"], "--eval-limit", "2", "--eval-every",
        "1", "--steps", "2", "--prompts", "2", "--max-new-tokens", "8", "--out", str(out)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    while not run.stdout.readline().startswith(b"step 0:"):
        pass
    run.stdout.close()
    assert run.wait(120) == 0
    assert (out / "model").is_dir()


def test_one_gpu_named_for_all_processes(monkeypatch):
    """--device cuda:0 under torchrun is refused. (Bug: all processes on one GPU.)"""
    monkeypatch.setattr(parallel, "join", lambda _: "cuda:1")
    refusal(lambda: set_up_process(Config(device="cuda:0")), "--device cuda:0", "torchrun")


def test_a_device_without_float64(monkeypatch):
    """A device that cannot do what the sampler needs is refused before a model is loaded. (Bug:
    --device mps, and a TypeError at the first sampling.)"""
    def empty(*size, dtype=None, device=None):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    monkeypatch.setattr(torch, "empty", empty)
    refusal(lambda: pick_device("mps"), "--device mps", "float64")


def test_memory_that_runs_out_while_a_step_is_recorded():
    """The error that ends a recording covers the one that matters. (Bug: a traceback.)"""
    try:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("cudaErrorStreamCaptureInvalidated")
    except RuntimeError as e:
        assert is_out_of_memory(e)
    assert not is_out_of_memory(RuntimeError("something else"))


def test_cudnn_attention_is_off():
    """(Bug: NaN gradients for some masked shapes, pytorch#196678.)"""
    assert not torch.backends.cuda.cudnn_sdp_enabled()
