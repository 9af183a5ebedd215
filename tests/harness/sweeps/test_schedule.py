"""What fails, what is started again, and that the rest goes on."""

import pytest

from harness.sweeps.job import Job
from harness.sweeps.local import Local
from harness.sweeps.schedule import ATTEMPTS, execute, outcome_of
from harness.system.status_file import Ending
from tests.harness.sweep_files import DYING, planned


def outcomes_of(todo, folder, jobs=2):
    return {o.cell.request.method: o for o in execute(todo, Local(folder, 1, jobs)) if o is not None}


@pytest.mark.slow
def test_a_process_that_dies_by_itself_takes_only_its_own_cell(tmp_path, hippocampus_phantom):
    text = '[[matrix]]\nmethod = ["dying", "scratch"]\n'
    todo, known = planned(tmp_path, hippocampus_phantom, text, DYING)
    assert not known
    outcomes = outcomes_of(todo, tmp_path / "notes")
    assert "its process died" in outcomes["dying"].problem
    assert (outcomes["scratch"].folder / "record.json").exists()
    # What failed is listed with its reason, and run again on request.
    todo, known = planned(tmp_path, hippocampus_phantom, text, DYING)
    assert not todo
    assert {outcome.before for outcome in known} == {True, False}
    todo, _ = planned(tmp_path, hippocampus_phantom, text, DYING, retry=True)
    assert [each.cell.request.method for each in todo] == ["dying"]


KILLED = """
import os, signal
from pathlib import Path
from harness import Method, UserError

class Killed(Method):
    \"\"\"Is killed from outside, once in pre-training.\"\"\"
    name = "killed"

    def forward(self, batch):
        mark = Path("MARK")
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        features = self.backbone.decode(self.backbone.encode(batch["image"]))
        return {"zero": features.square().mean()}

class Refuses(Killed):
    \"\"\"Says no in the middle of pre-training.\"\"\"
    name = "refuses"

    def forward(self, batch):
        raise UserError("no, thank you")
"""


@pytest.mark.slow
def test_what_is_killed_from_outside_goes_on_and_shares_its_pretraining(tmp_path, hippocampus_phantom, capsys):
    text = '[[matrix]]\nmethod = "killed"\nlabel_fraction = [0.5, 1.0]\n'
    todo, _ = planned(tmp_path, hippocampus_phantom, text, KILLED.replace("MARK", str(tmp_path / "mark")))
    found = [outcome for outcome in execute(todo, Local(tmp_path / "notes", 1, 2)) if outcome is not None]
    assert [bool(outcome.problem) for outcome in found] == [False, False]
    assert "its process died by signal 9 (out of memory?)" in capsys.readouterr().err
    assert len(list((tmp_path / "runs" / "cache" / "pretrain").iterdir())) == 1
    logs = "".join(path.read_text() for path in (tmp_path / "notes").glob("*.log"))
    assert logs.count("pre-training found in") == 2


def test_a_pretraining_that_fails_fails_its_cells_with_its_reason(tmp_path, hippocampus_phantom):
    text = '[[matrix]]\nmethod = "refuses"\nlabel_fraction = [0.5, 1.0]\n'
    todo, _ = planned(tmp_path, hippocampus_phantom, text, KILLED)
    found = [outcome for outcome in execute(todo, Local(tmp_path / "notes", 1, 1)) if outcome is not None]
    assert [outcome.problem for outcome in found] == ["its pre-training: no, thank you"] * 2


@pytest.mark.parametrize(
    ("status", "ending", "again", "says"),
    [
        (0, Ending(0, ""), False, ""),
        (2, Ending(2, "no such method"), False, "no such method"),
        (1, Ending(1, "KeyError: 'x'"), False, "KeyError: 'x'; see"),
        (1, Ending(75, "stopped by SIGTERM, pretrain step 2 of 40"), True, "stopped by SIGTERM, pretrain step 2 of 40"),
        (-9, None, True, "its process died by signal 9"),
        (None, None, True, "its process died"),
        (0, None, False, "it ended with status 0 before its end"),
        # What a log says decides nothing.
        (-9, Ending(0, ""), False, ""),
    ],
)
def test_how_a_job_ended_decides_whether_it_is_started_again(status, ending, again, says, tmp_path):
    log = tmp_path / "log"
    log.write_text("harness: error: a line that somebody printed\n")
    following, problem = outcome_of(Job(None), status, ending, log)
    assert (following is not None) == again
    assert problem.startswith(says)
    assert bool(problem) == bool(says)
    if again:
        assert following.attempt == 1
        assert outcome_of(Job(None, attempt=ATTEMPTS - 1), status, ending, log)[0] is None
