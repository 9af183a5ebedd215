"""`harness check-method`: a table, a status, and words."""

import pytest

from harness import UserError
from harness.cli.main import main
from harness.conformance.suite import check_method
from tests.harness.toy_method import FAULTS, TOY, write_toy


def test_the_command_reports_a_table_and_its_status(tmp_path, capsys):
    plugin = write_toy(tmp_path, *FAULTS["nan"][:2])
    assert main(["check-method", plugin, "--backbone", "unet"]) == 2
    out, err = capsys.readouterr()
    assert "finite losses" in out
    assert "FAIL    finite losses (unet): term 'denoise' is nan" in out
    assert "toy: not every check passes" in err


@pytest.mark.parametrize(
    "where", ["__init__(self)", "check(self, crop, batch_size)", "prepare(self, volumes, preparation)"]
)
def test_a_plugin_that_raises_while_it_is_built_fails_in_words(where, tmp_path, capsys):
    raising = f'name = "toy"\n    def {where}:\n        raise RuntimeError("boom")\n'
    text = TOY.replace('name = "toy"', raising).replace(
        "def __init__(self, config", "def _unused(self, config", "(self)" in where
    )
    plugin = tmp_path / "toy.py"
    plugin.write_text(text)
    assert main(["check-method", str(plugin), "--backbone", "unet"]) == 2
    out, err = capsys.readouterr()
    assert "FAIL    builds (unet)" in out
    assert "Traceback" not in err


def test_a_name_that_is_no_string_is_refused(tmp_path, capsys):
    assert main(["check-method", write_toy(tmp_path, 'name = "toy"', "name = 3")]) == 2
    assert "Toy.name = 3 is no name" in capsys.readouterr().err


def test_unknown_names_are_answered_in_words(tmp_path):
    with pytest.raises(UserError, match="did you mean 'simmim'"):
        check_method("simim")
    assert main(["check-method", "simim"]) == 2
    assert main(["check-method", "simmim", "--backbone", "unt"]) == 2
    assert main(["check-method", "simmim", "--set", "backbone.features=1"]) == 2
    empty = tmp_path / "empty.py"
    empty.write_text("x = 1")
    assert main(["check-method", str(empty)]) == 2
