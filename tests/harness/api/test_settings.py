"""Settings are validated, frozen and read from words as a user writes them."""

import pytest
from pydantic import Field, ValidationError

from harness import Settings, Size3, UserError
from harness.api.registry import Registry
from harness.api.settings import build


class Sample(Settings):
    size: Size3 = Field((8, 8, 8), description="edge of the sample")
    share: float = Field(0.5, ge=0, le=1)
    place: tuple[int, int] | None = (1, 2)
    name: str = "none"


@pytest.mark.parametrize("written", [96, "96", "96,96,96", (96,), [96], (96, 96, 96), "96, 96, 96"])
def test_one_edge_stands_for_a_cube(written):
    assert build(Sample, {"size": written}, "s").size == (96, 96, 96)


def test_words_become_values():
    found = build(Sample, {"size": "4,5,6", "share": "1e-2", "place": "3,4", "name": "None"}, "s")
    assert (found.size, found.share, found.place, found.name) == ((4, 5, 6), 0.01, (3, 4), "None")
    assert build(Sample, {"place": "NONE"}, "s").place is None


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"size": "0"}, r"s.size=0 cannot be used: .*greater than 0.*\(edge of the sample\)"),
        ({"size": "4,5"}, r"s.size="),
        ({"share": "1.5"}, r"s.share=1.5 cannot be used"),
        ({"share": "nan"}, r"s.share=nan cannot be used: .*finite"),
        ({"share": float("inf")}, r"s.share=inf cannot be used"),
        ({"share": "none"}, r"s.share=none cannot be used"),
        ({"place": "1,2,3"}, r"s.place="),
        (
            {"shar": 1},
            r"unknown setting in section 's', 'shar': did you mean 'share'\? known: name, place, share, size",
        ),
    ],
)
def test_a_value_that_cannot_be_used_is_named_as_the_user_wrote_it(values, says):
    with pytest.raises(UserError, match=says):
        build(Sample, values, "s")


def test_settings_are_frozen_and_hold_nothing_else():
    found = Sample()
    with pytest.raises(ValidationError, match="frozen"):
        found.share = 1.0
    with pytest.raises(ValidationError, match=r"[Ee]xtra"):
        Sample(other=1)


def test_a_path_that_no_file_can_have_is_refused(tmp_path):
    config = Registry().load("method", "official").Config
    with pytest.raises(UserError, match="File name too long: give another path"):
        build(config, {"weights": "a" * 5000}, "method")
