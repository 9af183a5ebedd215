"""What the user can mend: near matches first, one line, status 2."""

import pytest

from harness.cli.main import main
from harness.system.errors import UserError, unknown


def test_near_names_come_first_and_all_known_names_in_order():
    error = unknown("method", "MEA", ["voco", "mae", "simmim"])
    assert isinstance(error, UserError)
    assert str(error) == "unknown method 'MEA': did you mean 'mae'? known: mae, simmim, voco"


def test_the_nearest_of_several_comes_first():
    assert "did you mean 'brats21' or 'brats'?" in str(unknown("task", "brats2", ["brats", "spleen", "brats21"]))


@pytest.mark.parametrize(
    ("allowed", "says"),
    [(["mae", "voco"], "unknown x 'qqqq': known: mae, voco"), ([], "unknown x 'qqqq': known: none")],
)
def test_nothing_near_is_no_hint(allowed, says):
    assert str(unknown("x", "qqqq", allowed)) == says


def test_the_command_line_prints_it_as_one_line_and_leaves_with_status_2(tmp_path, capsys):
    words = ["run", "--method", "mea\n", "--task", "brats", "--runs", str(tmp_path / "runs")]
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("harness: error: unknown method ")
    assert err.count("\n") == 1
    assert "'mae'" in err
