"""`harness show`, and what `harness run --dry-run` shows."""

import json

from tests.harness.commands import harness, record_of


def test_show_and_dry_run(finished_runs, two_phantoms, capsys):
    run_id = record_of(finished_runs, "scratch")["run_id"]
    harness("show", run_id[:-4], "--runs", finished_runs)
    assert run_id in capsys.readouterr().out
    words = ["run", "--method", "hybridmim", "--task", "brats", "--data", two_phantoms / "brats"]
    harness(*words, "--runs", finished_runs, "--dry-run", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["config"]["method_settings"]["mask_ratio"] == 0.4
    assert not found["finished"]
