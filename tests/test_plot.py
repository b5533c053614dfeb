"""plot.py: what it draws, read back from matplotlib's axes, against numbers written by hand."""
import json
import os
import subprocess
import sys

import pytest


matplotlib = pytest.importorskip("matplotlib")
import plot  # noqa: E402


def run(folder, accuracies, seconds=1.0):
    """A run of one step per accuracy, evaluated at each."""
    os.makedirs(folder)
    with open(folder / "metrics.jsonl", "w") as f:
        for step, accuracy in enumerate(accuracies):
            f.write(json.dumps({"step": step, "eval/mean": accuracy, "eval/mean_se": 0.1, "time/sample": seconds, "time/update": seconds, "reward/correct": accuracy}) + "\n")
    return str(folder)


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """draw(*arguments) -> {label: (x, y)} of the first panel."""
    import matplotlib.pyplot as plt

    def of(*arguments):
        plt.close("all")
        monkeypatch.setattr(sys, "argv", ["plot.py", *arguments, "--out", str(tmp_path / "out.png")])
        plot.main()
        assert os.path.getsize(tmp_path / "out.png") > 10_000
        return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in plt.gcf().axes[0].lines}
    yield of
    plt.close("all")


def test_runs_and_seeds(tmp_path, draw):
    """Forbids runs of one name drawn as one, seeds that are not averaged, and a curve beyond the shortest of its seeds."""
    a, b = run(tmp_path / "a" / "toy-seed0", [0, 0.2]), run(tmp_path / "b" / "toy-seed0", [0, 0.6])
    c = run(tmp_path / "toy-seed1", [0, 0.4, 0.8])
    assert sorted(y for _, y in draw(a, b).values()) == [[0, 0.2], [0, 0.6]]
    assert list(draw(a, c)) == ["toy-seed0", "toy-seed1"]
    (label, (x, y)), = draw(a, c, "--seeds").items()
    assert (label, x, y) == ("toy", [0, 1], pytest.approx([0, 0.3]))


def test_seconds(tmp_path, draw):
    """Forbids seconds of other runs than those a curve is made of: a shorter one that was never evaluated must not count."""
    a, c = run(tmp_path / "toy-seed0", [0, 0.2]), run(tmp_path / "toy-seed1", [0, 0.4], seconds=2)
    with open(run(tmp_path / "toy-seed2", []) + "/metrics.jsonl", "w") as f:
        f.write(json.dumps({"step": 0, "time/sample": 1.0}) + "\n")
    (x, y), = draw(a, c, str(tmp_path / "toy-seed2"), "--seeds", "--x", "seconds").values()
    assert (x, y) == (pytest.approx([3, 6]), pytest.approx([0, 0.3]))


def test_a_log_in_the_writing(tmp_path, draw):
    """Forbids a crash on a run that goes on: its last line may be cut."""
    a = run(tmp_path / "toy", [0, 0.2])
    with open(f"{a}/metrics.jsonl", "a") as f:
        f.write('{"step": 2, "eval/m')
    assert draw(a) == {"toy": ([0, 1], [0, 0.2])}


@pytest.mark.parametrize("arguments, says", [(["nowhere"], "not the folder of a run"), ([".", "--out", "x.gif"], "--out x.gif"), ([".", "--smooth", "0"], "--smooth")])
def test_what_cannot_be_drawn_is_one_line(monkeypatch, capsys, arguments, says):
    monkeypatch.setattr(sys, "argv", ["plot.py", *arguments])
    with pytest.raises(SystemExit) as e:
        plot.main()
    assert e.value.code == 2 and says in capsys.readouterr().err


def test_without_matplotlib(tmp_path):
    """Forbids a traceback where the optional package is missing."""
    code = "import sys; sys.modules['matplotlib'] = None; sys.argv = ['plot.py', sys.argv[1]]; import plot; plot.main()"
    done = subprocess.run([sys.executable, "-c", code, run(tmp_path / "toy", [0, 1])], capture_output=True, text=True, cwd=os.path.dirname(plot.__file__))
    assert (done.returncode, done.stderr) == (2, "error: plot.py needs matplotlib: pip install matplotlib\n")
