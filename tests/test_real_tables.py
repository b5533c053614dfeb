"""docs/real_tables.py: differences between arms, against numbers worked out by hand."""
import json
import os
import sys

import pytest


sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(__file__)), "docs"))
import real_tables  # noqa: E402


def evaluation(folder, arm, right):
    """Two problems, two responses each; the questions of the first are chat messages."""
    questions = [[{"role": "user", "content": "Q?"}], "R?"]
    with open(folder / f"{arm}--held_out.jsonl", "w") as f:
        for question, of_question in zip(questions, right):
            for correct in of_question:
                f.write(json.dumps({"question": question, "correct": correct}) + "\n")


def test_seeds_of_an_arm_count_together(tmp_path, capsys):
    """A problem's share is the mean over an arm's seeds, and differences are paired by problem.
    (Bugs: one arm's second seed compared with another's first; a crash on chat messages; a table
    of blanks for a name that is not there.)"""
    (tmp_path / "kept").mkdir()
    evaluation(tmp_path, "start", [(False, False), (True, False)])              # 0, 1/2
    evaluation(tmp_path, "gcpo-seed0", [(True, True), (True, True)])            # 1, 1
    evaluation(tmp_path, "gcpo-seed1", [(True, False), (False, False)])         # 1/2, 0
    real_tables.table_of_pairs(str(tmp_path), str(tmp_path / "kept"), "start")
    said = capsys.readouterr().out
    # 3/4 − 0 and 1/2 − 1/2: mean 37.5 points, standard deviation 53.0, interval 12.71 · 53.0 / √2
    assert "+37.5 ± 476.6" in said and "seed" not in said
    real_tables.table_of_pairs(str(tmp_path), str(tmp_path / "kept"), "gcpo-seed0")
    assert "-37.5 ± 476.6" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--against grpo: none of gcpo, start"):
        real_tables.table_of_pairs(str(tmp_path), str(tmp_path / "kept"), "grpo")
