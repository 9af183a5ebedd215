"""The verbs of `harness leaderboard`: all are offered, and a wrong one is answered in words."""

import pytest

from harness.cli.main import main
from tests.harness.commands import fails

VERBS = ("build", "compare", "ranks", "efficiency", "validate", "cite", "publish", "panels", "import")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_help(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["leaderboard", verb, "--help"])
    assert ended.value.code == 0
    assert f"usage: harness leaderboard {verb}" in capsys.readouterr().out


def test_a_wrong_verb_gets_the_near_one(capsys):
    assert "'publsh': did you mean 'publish'" in fails(capsys, "leaderboard", "publsh")
