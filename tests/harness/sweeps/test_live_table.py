"""Where each cell is."""

import json

from harness.config.request import Request
from harness.sweeps.cells import PlannedCell, SweepCell
from harness.sweeps.job import Launcher
from harness.sweeps.live_table import progress_of, watch
from tests.harness.sweep_files import DYING, planned


def test_the_live_table_knows_where_a_cell_is(tmp_path, hippocampus_phantom):
    text = '[[matrix]]\nmethod = "simmim"\n'
    (each,), _ = planned(tmp_path, hippocampus_phantom, text, DYING)
    assert progress_of(each) == "waiting"
    each.pretrain.mkdir(parents=True)
    (each.pretrain / "history.jsonl").write_text('{"stage": "pretrain", "step": 1}\n{"stage": "pre')
    assert progress_of(each) == "pre-training, step 1 of 2"
    (each.pretrain / "stage.json").write_text("{}")
    each.folder.mkdir()
    (each.folder / "history.jsonl").write_text('{"stage": "pretrain", "step": 2}\n{"stage": "finetune", "step": 2}\n')
    assert progress_of(each) == "fine-tuning, step 2 of 2"
    (each.folder / "finetune.json").write_text("{}")
    assert progress_of(each) == "evaluating, 0 of 1 cases"


class Instant(Launcher):
    """Jobs that end at once: all finish but those of one method, which are refused."""

    refused = "voco"

    def room(self):
        return 1

    def submit(self, jobs):
        self.running = list(jobs)

    def poll(self):
        ended, self.running = self.running, []
        for job in ended:
            bad = job.planned.cell.request.method == self.refused
            said = {"status": 2, "message": "it does not fit"} if bad else {"status": 0, "message": ""}
            self.status_file(job).write_text(json.dumps(said))
            if not bad:
                job.planned.folder.mkdir()
                (job.planned.folder / "record.json").write_text("{}")
        return [(job, 0) for job in ended]

    def stop(self):
        return ""


def test_every_outcome_is_a_line_as_it_comes(tmp_path, capsys):
    todo = [
        PlannedCell(SweepCell(Request(method=method, task="brats", runs=tmp_path)), tmp_path / method, None, (0, 1, 1))
        for method in ("scratch", "voco", "mae")
    ]
    found = watch(todo, Instant(tmp_path / "notes", 1))
    assert [(each.cell, each.folder, each.problem) for each in found] == [
        (todo[0].cell, tmp_path / "scratch", ""),
        (todo[1].cell, None, "it does not fit"),
        (todo[2].cell, tmp_path / "mae", ""),
    ]
    assert capsys.readouterr().out.splitlines() == [
        "[1/3] done: scratch unet brats demo seed 0, 0 s",
        "[2/3] it does not fit: voco unet brats demo seed 0, 0 s",
        "[3/3] done: mae unet brats demo seed 0, 0 s",
    ]
