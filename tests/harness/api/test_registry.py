"""Plugins: found by name, described without import, and reported with their file where they do not load."""

import subprocess
import sys

import pytest

from harness import UserError
from harness.api.registry import Registry


def test_built_in_plugins_state_their_entry_points_name(registry):
    for kind in ("method", "backbone", "task"):
        for name in registry.names(kind):
            assert registry.load(kind, name).name == name


def test_descriptions_need_no_import_and_agree_with_the_classes(registry):
    for row in registry.describe("method"):
        loaded = registry.load("method", row["name"])
        assert row["description"] == loaded.__doc__.partition("\n")[0]
        assert tuple(row["trains"]) == loaded.trains
        assert row["reference"] == loaded.reference


def test_a_foreign_package_that_shadows_ours_is_recognisable(tmp_path):
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "__init__.py").write_text("")
    (tmp_path / "methods" / "scratch.py").write_text("")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from harness.cli.main import main\n"
        "sys.exit(main(['run', '--method', 'scratch', '--task', 'brats', '--dry-run']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert str(tmp_path / "methods") in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_duplicate_names_raise(tmp_path):
    plugin = tmp_path / "twin.py"
    plugin.write_text("from harness import Method\nclass Twin(Method):\n    name = 'scratch'\n")
    with pytest.raises(UserError, match="two plugins are named method 'scratch'"):
        Registry([str(plugin)])


@pytest.mark.parametrize(
    ("text", "says"),
    [("x = 1", "defines no plugin"), ("import nowhere_at_all", "ModuleNotFoundError"), ("(", "SyntaxError")],
)
def test_a_plugin_that_does_not_load(text, says, tmp_path):
    plugin = tmp_path / "broken.py"
    plugin.write_text(text)
    with pytest.raises(UserError, match=says):
        Registry([str(plugin)])
