"""--track: metrics go to another program, too, and its faults cost nothing."""
import importlib.machinery
import sys
import types

import pytest
from test_train import metrics_of, train_with

from support.common import InputError


FLAGS = ["--steps", "2", "--prompts", "4", "--eval-limit", "2", "--track", "trackio"]


@pytest.fixture
def program(monkeypatch):
    """What passes for trackio; it notes what it is told."""
    module = types.ModuleType("trackio")
    module.__spec__ = importlib.machinery.ModuleSpec("trackio", None)
    module.told = []
    module.begun = []
    module.init = lambda **settings: module.begun.append(settings)
    module.log = lambda numbers, step: module.told.append((step, numbers))
    module.finish = lambda: None
    monkeypatch.setitem(sys.modules, "trackio", module)
    return module


def test_it_is_told_the_same_numbers_under_the_same_names(program, tmp_path):
    """Every step's numbers are those of metrics.jsonl, and the run has its folder's name. (Bug:
    another name for what docs/metrics.md explains.)"""
    out = train_with(*FLAGS, "--out", str(tmp_path / "mine"))
    assert [settings["name"] for settings in program.begun] == ["mine"]
    assert program.begun[0]["config"]["group_size"] == 4
    rows = metrics_of(out)
    assert [step for step, _ in program.told] == [row["step"] for row in rows]
    for (_, numbers), row in zip(program.told, rows):
        assert numbers
        assert numbers == {name: row[name] for name in numbers}
        missing = set(row) - set(numbers) - {"step"}
        assert all(not isinstance(row[name], (int, float)) for name in missing)


def test_its_faults_cost_nothing(program, tmp_path, capsys):
    """If it fails while the run goes on, that is said once, and the run ends as it would. (Bug: a
    night's run lost to a network.)"""
    def fail(numbers, step):
        raise ConnectionError("no network")

    program.log = fail
    out = train_with(*FLAGS, "--out", str(tmp_path / "run"))
    assert len(metrics_of(out)) == 3
    assert capsys.readouterr().err.count("--track trackio: ConnectionError: no network") == 1


def test_what_cannot_start_is_one_line(program, tmp_path):
    """It leaves nothing behind. (Bug: once logged in, the same command is refused.)"""
    def fail(**settings):
        raise RuntimeError("not logged in")

    program.init = fail
    with pytest.raises(InputError, match="--track trackio: .*not logged in"):
        train_with(*FLAGS, "--out", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_what_is_not_there_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr("support.options.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install wandb"):
        train_with(*FLAGS[:-1], "wandb", "--out", str(tmp_path / "run"))
