"""`harness list`: every plugin and preset, in words and as JSON."""

import json

import pytest

from harness.api.registry import PLURAL, Registry
from harness.cli.main import main
from harness.config.presets import preset_names


def listed(capsys, *words):
    assert main(["list", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_everything_that_can_be_named_is_listed(capsys):
    rows, registry = listed(capsys), Registry()
    assert {kind: [row["name"] for row in rows[kind]] for kind in PLURAL.values()} == {
        many: registry.names(one) for one, many in PLURAL.items()
    }
    assert [row["name"] for row in rows["presets"]] == preset_names()


@pytest.mark.parametrize("kind", ["methods", "tasks", "presets"])
def test_one_kind_is_what_all_kinds_say_of_it(kind, capsys):
    assert listed(capsys, kind) == {kind: listed(capsys)[kind]}


def test_what_a_method_trains_is_said_even_where_it_is_nothing(capsys):
    assert main(["list", "methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    after = lines[next(n for n, line in enumerate(lines) if line.startswith("  scratch:")) :]
    assert "      trains: nothing" in after[:6]


def test_a_plugin_in_a_file_is_listed(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(
        'from harness import Method\n\n\nclass Mine(Method):\n    """A method of mine."""\n\n    name = \'mine\'\n'
    )
    (row,) = [row for row in listed(capsys, "methods", "--plugin", str(path))["methods"] if row["name"] == "mine"]
    assert (row["description"], row["origin"]) == ("A method of mine.", f"--plugin {path}")
