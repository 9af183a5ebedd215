"""What is timed, and what does not fit."""

import pytest

from harness.costs import profile
from harness.costs.profile import measure, summarise
from harness.costs.trial import OUT_OF_MEMORY, TrialResult, resolve_trial
from leaderboards import profiles
from tests.harness.small_requests import small_request

pytestmark = pytest.mark.usefixtures("quick_steps")


def test_fine_tuning_can_be_profiled(tmp_path):
    spec = resolve_trial(small_request("scratch"), "finetune")
    found, rates = measure([spec], rounds=1)
    (row,) = summarise(found, rates)
    assert row["stage"] == "finetune"
    assert row["step_ms_p50"] > 0


def test_spread_of_rounds():
    assert profile._spread([[1.0, 1.0], [1.1, 1.1], [0.9, 5.0, 0.9]]) == pytest.approx(0.2)


def test_what_does_not_fit_the_memory_is_a_row(monkeypatch, capsys):
    def full(each: TrialResult) -> None:
        each.problem = OUT_OF_MEMORY if each.spec.settings.batch_size == 3 else ""

    monkeypatch.setattr(profile, "measure_in_new_process", full)
    cells = [resolve_trial(small_request("simmim", f"pretrain.batch_size={size}")) for size in (2, 3)]
    rows = summarise(*measure(cells, rounds=1))
    assert [row["problem"] for row in rows] == ["", "out of memory"]
    assert "out of memory" in profiles.render(rows)
