"""`harness show`, and what `harness run --dry-run` shows."""

import json
import re

from tests.harness.commands import harness, record_of
from tests.leaderboards.made import write_run


def test_show_and_dry_run(finished_runs, two_phantoms, capsys):
    run_id = record_of(finished_runs, "scratch")["run_id"]
    harness("show", run_id[:-4], "--runs", finished_runs)
    assert run_id in capsys.readouterr().out
    words = ["run", "--method", "hybridmim", "--task", "brats", "--data", two_phantoms / "brats"]
    harness(*words, "--runs", finished_runs, "--dry-run", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["config"]["method_settings"]["mask_ratio"] == 0.4
    assert not found["finished"]


def test_the_table_has_the_runs_beside_it(tmp_path, capsys, monkeypatch):
    better = write_run(tmp_path, "better", dice=0.85)
    write_run(tmp_path, "scratch")
    write_run(tmp_path, "better", task="other")
    monkeypatch.chdir(tmp_path.parent)  # as a user who stands beside the runs folder, and names it from there
    harness("show", better.name, "--runs", tmp_path.name)
    out = capsys.readouterr().out
    assert re.search(r"better +unet +1 .*\+0\.0\d+", out)  # a difference from the scratch run beside it
    assert "other" not in out
