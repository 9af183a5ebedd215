"""What a record must hold before anything is computed from it."""

import json

import pytest
from pydantic import ValidationError

from leaderboards import records
from leaderboards.schema import Record
from tests.leaderboards.made import write_run


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("run_id", "../x"),
        ("run_id", ""),
        ("seed", -1),
        ("seed", True),
        ("seed", 2**63),
        ("label_fraction", 0),
        ("label_fraction", float("nan")),
        ("label_fraction", "all"),
        ("data", []),
        ("data", {"source": "moon", "fingerprint": ""}),
        ("metrics", {}),
        ("overrides", None),
        ("method", 3),
        ("backbone", ""),
        ("task", "t" * 2000),
        ("timing", "fast"),
        ("timing", {"seconds": {}, "pretrain_step": "text"}),
        ("timing", {"seconds": {}, "pretrain_step": {"step": {"p50_ms": None}}}),
        ("timing", {"seconds": {"pretrain": "slow"}}),
        ("timing", {"seconds": {"finetune": -1}}),
        ("timing", {"pretrain_step": None}),
        ("metric_definitions", ["hd95"]),
        ("metric_definitions", {"surface_dice_tolerance_mm": "=1+1"}),
        ("data", {"source": "real", "fingerprint": "f", "n_test_seen": "3"}),
        ("data", {"source": "real", "fingerprint": "f", "n_test_seen": -1}),
        ("data", {"source": "real", "fingerprint": "f"}),
        ("data", {"source": "real", "fingerprint": "f", "n_test_seen": 0, "corpora": [3]}),
        ("metrics", {"a": [], "b": {}}),
        ("metrics", {"a": {"dice": 10**400}}),
        ("metrics", {"a\x00": {}}),
        ("overrides", {"method.x": 1}),
        ("environment", "a machine"),
        ("environment", {"git": "dirty"}),
        ("files", [1]),
        ("finished", "9999"),
        ("backbone", "half \ud800"),
    ],
)
def test_hand_edited_records_are_named_and_left_out(tmp_path, field, value):
    place = write_run(tmp_path)
    record = json.loads((place / "record.json").read_text()) | {field: value}
    (place / "record.json").write_text(json.dumps(record))
    runs, problems = records.load_runs([tmp_path])
    assert not runs
    assert len(problems) == 1
    assert str(place) in problems[0]


# The least that a record of schema 1 holds.
LEAST = {
    "schema": 1,
    "run_id": "a",
    "method": "m",
    "backbone": "b",
    "task": "t",
    "task_version": "1",
    "mode": "generic",
    "protocol": "finetune",
    "preset": "demo",
    "metric_policy": "empty-is-worst-v1",
    "overrides": {},
    "label_fraction": 1.0,
    "seed": 0,
    "data": {"source": "real", "fingerprint": "f", "n_test_seen": 0},
    "metrics": {"a": {}},
    "timing": {"seconds": {}},
}


def problem(**changes):
    """Where and how the smallest record breaks under these changes; None removes a field."""
    record = {key: value for key, value in (LEAST | changes).items() if value is not None}
    with pytest.raises(ValidationError) as raised:
        Record.model_validate(record)
    (error,) = raised.value.errors()
    return ".".join(map(str, error["loc"])), error["type"]


@pytest.mark.parametrize("field", LEAST)
def test_every_field_of_the_smallest_record_is_needed(field):
    Record.model_validate(LEAST)
    assert problem(**{field: None}) == (field, "missing")


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("seed", "0", "int_type"),
        ("seed", 0.0, "int_type"),
        ("seed", True, "int_type"),
        ("label_fraction", "1", "float_type"),
        ("task_version", 1, "string_type"),
        ("overrides", {"method.x": 0.5}, "string_type"),
    ],
)
def test_types_are_exact(field, value, kind):
    """A value that would have to be converted was not written by the harness."""
    place, found = problem(**{field: value})
    assert (place.partition(".")[0], found) == (field, kind)


@pytest.mark.parametrize(
    ("field", "last", "beyond"),
    [
        ("seed", 2**63 - 1, 2**63),
        ("seed", 0, -1),
        ("label_fraction", 1.0, 1.0000001),
        ("label_fraction", 1e-9, 0.0),
        ("run_id", "a" * 200, "a" * 201),
        ("run_id", "_a.b+c=d-1", ".hidden"),
        ("run_id", "a-1", "a/1"),
        ("method", "m" * 1000, "m" * 1001),
        ("finished", "2026-01-01T00:00:00Z", "2026-01-01T00:00:00+00:00"),
        ("metrics", {"a": {"dice": 1.0}}, {"a": {"dice": 1.01}}),
        ("metrics", {"a": {"hd95": 1e12}}, {"a": {"hd95": float("inf")}}),
        ("timing", {"seconds": {"pretrain": 1.0, "own": 2.0}}, {"seconds": {"pretrain": 1.0, "own": -2.0}}),
    ],
)
def test_the_last_value_that_is_taken_and_the_first_that_is_not(field, last, beyond):
    Record.model_validate(LEAST | {field: last})
    assert problem(**{field: beyond})[0].startswith(field)


def test_further_fields_are_kept_in_the_record_and_in_its_tables():
    """Newer versions add some; a reader of the site is to see them."""
    data = LEAST["data"] | {"scanner": "S"}
    kept = Record.model_validate(LEAST | {"memory": {"peak": 3}, "data": data}).model_dump()
    assert kept["memory"]["peak"] == 3
    assert kept["data"]["scanner"] == "S"
