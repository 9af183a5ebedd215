"""What a runs folder no longer needs."""

from tests.harness.commands import status_of


def test_gc_shows_before_it_removes(checkpointed_runs, capsys):
    kept = list(checkpointed_runs.rglob("*.ckpt"))
    assert len(kept) == 4
    assert status_of("runs", "gc", "--runs", checkpointed_runs) == 0
    out = capsys.readouterr().out
    assert "checkpoints of a finished pre-training" in out
    assert "checkpoints of a finished fine-tuning" in out
    assert "nothing was removed" in out
    assert list(checkpointed_runs.rglob("*.ckpt")) == kept
    assert status_of("runs", "gc", "--runs", checkpointed_runs, "--yes") == 0
    assert not list(checkpointed_runs.rglob("*.ckpt"))
    assert list(checkpointed_runs.glob("*/weights.safetensors"))
    assert status_of("runs", "gc", "--runs", checkpointed_runs) == 0
    assert "nothing to remove" in capsys.readouterr().out
