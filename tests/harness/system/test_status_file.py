"""How a command ended, in a file."""

import pytest

from harness.cli.main import main
from harness.system.status_file import Ending, read_ending


def test_a_command_writes_how_it_ended_where_it_is_asked_to(tmp_path, monkeypatch, capsys):
    path = tmp_path / "status.json"
    monkeypatch.setenv("HARNESS_STATUS_FILE", str(path))
    assert main(["list", "presets"]) == 0
    assert read_ending(path) == Ending(0, "")
    assert main(["list", "presetz"]) == 2
    assert read_ending(path).message.startswith("unknown kind to list 'presetz'")
    monkeypatch.setattr("harness.config.presets.preset_names", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["list", "presets"])
    assert read_ending(path) == Ending(1, "ZeroDivisionError: division by zero")
    path.write_text("{}")
    assert read_ending(path) is None
