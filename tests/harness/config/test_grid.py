"""The grid of `--tune`: its trials, and what it refuses."""

import pytest

from harness import UserError
from harness.config.grid import MOST_TRIALS, TUNABLE, canonical_grid, parse_grid
from harness.config.schema import Finetune


def test_every_combination_is_a_trial_and_the_first_setting_varies_most_slowly():
    trials = parse_grid("finetune.lr=1e-3,3e-3  finetune.layer_decay=1,0.5")
    assert [tuple(trial.values()) for trial in trials] == [
        ("1e-3", "1"),
        ("1e-3", "0.5"),
        ("3e-3", "1"),
        ("3e-3", "0.5"),
    ]
    assert list(trials[0]) == ["finetune.lr", "finetune.layer_decay"]


def test_no_grid_has_no_trial():
    assert parse_grid("") == parse_grid("  ") == []


def test_spaces_do_not_make_another_grid():
    assert canonical_grid("  finetune.lr=1,2   finetune.warmup_steps=3 ") == "finetune.lr=1,2 finetune.warmup_steps=3"


def test_what_can_be_tuned_is_a_setting_of_fine_tuning():
    assert {key.removeprefix("finetune.") for key in TUNABLE} < set(Finetune.model_fields)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("finetune.lr", "is not of the form"),
        ("finetune.lr=", "is not of the form"),
        ("finetune.lr=1e-3,,2", "is not of the form"),
        ("finetune.steps=10,20", "finetune.steps"),
        ("pretrain.lr=1e-3,3e-3", "pretrain.lr"),
        ("finetune.lr=1e-3,1e-3", "twice"),
        ("finetune.lr=1e-3,0.001", "twice"),
        ("finetune.lr=1e-3 finetune.lr=3e-3", "twice"),
        (f"finetune.lr={','.join(map(str, range(1, MOST_TRIALS + 2)))}", f"{MOST_TRIALS + 1} trials"),
    ],
)
def test_what_is_no_grid_is_refused_in_words(text, says):
    with pytest.raises(UserError, match="grid") as error:
        parse_grid(text)
    assert says in str(error.value)
