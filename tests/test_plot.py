"""plot.py: what it draws, read back from matplotlib, against numbers written by hand."""
import json
import os
import subprocess
import sys

import pytest


matplotlib = pytest.importorskip("matplotlib")
import plot  # noqa: E402


def run(folder, accuracies, seconds=1.0):
    """A run with one step per accuracy, each step evaluated."""
    os.makedirs(folder)
    with open(folder / "metrics.jsonl", "w") as f:
        for step, accuracy in enumerate(accuracies):
            row = {
                "step": step,
                "eval/mean": accuracy,
                "eval/mean_se": 0.1,
                "time/sample": seconds,
                "time/update": seconds,
                "reward/correct": accuracy,
            }
            f.write(json.dumps(row) + "\n")
    return str(folder)


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """draw(*arguments) -> {label: (x, y)} of the first panel."""
    import matplotlib.pyplot as plt

    def of(*arguments):
        plt.close("all")
        out = str(tmp_path / "out.png")
        argv = ["plot.py", *arguments, "--out", out]
        monkeypatch.setattr(sys, "argv", argv)
        plot.main()
        assert os.path.getsize(out) > 10_000
        curves = {}
        for line in plt.gcf().axes[0].lines:
            x = list(line.get_xdata())
            y = list(line.get_ydata())
            curves[line.get_label()] = (x, y)
        return curves

    yield of
    plt.close("all")


def test_runs_and_seeds(tmp_path, draw):
    """Each run is one curve; with --seeds, its seeds are one averaged curve.

    (Bugs: runs of one name drawn as one, with --seeds or without; seeds that are not averaged; a
    curve beyond the shortest of its seeds.)
    """
    a = run(tmp_path / "a" / "toy-seed0", [0, 0.2])
    b = run(tmp_path / "b" / "toy-seed0", [0, 0.6])
    c = run(tmp_path / "toy-seed1", [0, 0.4, 0.8])

    same_name = draw(a, b)
    heights = sorted(y for _, y in same_name.values())
    assert heights == [[0, 0.2], [0, 0.6]]

    assert list(draw(a, c)) == ["toy-seed0", "toy-seed1"]

    [(label, (x, y))] = draw(a, c, "--seeds").items()
    assert label == "toy"
    assert x == [0, 1]
    assert y == pytest.approx([0, 0.3])
    heights = sorted(y for _, y in draw(a, b, "--seeds").values())
    assert heights == [[0, 0.2], [0, 0.6]]


def test_seconds(tmp_path, draw):
    """A curve's seconds are those of the runs it is made of.

    (Bug: seconds of other runs. A shorter run that was never evaluated must not count.)
    """
    a = run(tmp_path / "toy-seed0", [0, 0.2])
    b = run(tmp_path / "toy-seed1", [0, 0.4], seconds=2)
    never_evaluated = run(tmp_path / "toy-seed2", [])
    with open(f"{never_evaluated}/metrics.jsonl", "w") as f:
        f.write(json.dumps({"step": 0, "time/sample": 1.0}) + "\n")
    curves = draw(a, b, never_evaluated, "--seeds", "--x", "seconds")
    [(x, y)] = curves.values()
    assert x == pytest.approx([3, 6])
    assert y == pytest.approx([0, 0.3])


def test_a_log_in_the_writing(tmp_path, draw):
    """A run that goes on is drawn without its last line, which may be cut.

    (Bug: a crash on that line.)
    """
    folder = run(tmp_path / "toy", [0, 0.2])
    with open(f"{folder}/metrics.jsonl", "a") as f:
        f.write('{"step": 2, "eval/m')
    assert draw(folder) == {"toy": ([0, 1], [0, 0.2])}


REFUSED = [
    (["nowhere"], "not the folder of a run"),
    ([".", "--out", "x.gif"], "--out x.gif"),
    ([".", "--smooth", "0"], "--smooth"),
]


@pytest.mark.parametrize("arguments, says", REFUSED)
def test_what_cannot_be_drawn_is_one_line(monkeypatch, capsys, arguments, says):
    """What cannot be drawn ends in status 2 and a message that says why."""
    monkeypatch.setattr(sys, "argv", ["plot.py", *arguments])
    with pytest.raises(SystemExit) as e:
        plot.main()
    assert e.value.code == 2
    assert says in capsys.readouterr().err


WITHOUT_MATPLOTLIB = """
import sys
sys.modules['matplotlib'] = None
sys.argv = ['plot.py', sys.argv[1]]
import plot
plot.main()
"""


def test_without_matplotlib(tmp_path):
    """Without the optional matplotlib there is one line of advice and status 2.

    (Bug: a traceback.)
    """
    folder = run(tmp_path / "toy", [0, 1])
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_MATPLOTLIB, folder],
        capture_output=True,
        text=True,
        cwd=os.path.dirname(plot.__file__),
    )
    assert done.returncode == 2
    advice = "error: plot.py needs matplotlib: pip install matplotlib\n"
    assert done.stderr == advice
