"""`harness runs list`."""

import json

from tests.harness.commands import status_of


def test_runs_are_listed_with_where_they_are(checkpointed_runs, capsys):
    (run,) = (path.parent for path in checkpointed_runs.glob("*/record.json"))
    assert status_of("runs", "list", "--runs", checkpointed_runs, "--json") == 0
    assert json.loads(capsys.readouterr().out) == [{"run": run.name, "state": "finished", "at_work": ""}]
    for name in ("record.json", "finetune.json"):
        (run / name).unlink()
    assert status_of("runs", "list", "--runs", checkpointed_runs) == 0
    assert "finetune, 4 steps" in capsys.readouterr().out
    assert status_of("runs", "list", "--runs", checkpointed_runs / "no") == 2
