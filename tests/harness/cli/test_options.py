"""Options are made from a request's fields: under their names, with their defaults, and refused in words."""

import os
import subprocess
import sys

import pytest

from harness import UserError
from harness.cli.main import main
from harness.cli.options import Parser, add_options, add_request_options, argument, execution_of, request_of
from harness.config.request import Execution, positive


def parser_of(*names, **more) -> Parser:
    parser = Parser(prog="p", allow_abbrev=False)
    add_options(parser, *names, **more)
    return parser


def test_an_option_has_the_type_and_the_default_of_its_field(monkeypatch):
    monkeypatch.delenv("HARNESS_RUNS", raising=False)
    parser = parser_of("seed", "settings", "skip_bad", "runs", "checkpoint_minutes")
    assert vars(parser.parse_args([])) == {
        "seed": 0,
        "settings": [],
        "skip_bad": False,
        "checkpoint_minutes": 10.0,
        "runs": parser.parse_args(["--runs", "runs"]).runs,
    }
    words = ["--seed", "7", "--set", "a.b=1", "--set", "c.d=2", "--skip-bad", "--checkpoint-minutes", "1e1"]
    found = parser.parse_args(words)
    assert (found.seed, found.settings, found.skip_bad, found.checkpoint_minutes) == (7, ["a.b=1", "c.d=2"], True, 10.0)
    # Another command's options begin anew.
    assert parser_of("settings").parse_args([]).settings == []


def test_help_is_the_fields_own_or_what_stands_in_for_it(capsys):
    for more, says in (({}, "of all randomness (default: 0)"), ({"text": "which one"}, "which one")):
        with pytest.raises(SystemExit):
            parser_of("seed", **more).parse_args(["--help"])
        assert says in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--seed", "x"], r"argument --seed: 'x' is not a whole number of 0 or more; `p --help` shows what is allowed"),
        (["--see", "1"], "unrecognized arguments: --see 1"),
        (["--seed"], "expected one argument"),
    ],
)
def test_wrong_words_are_one_error_of_the_users(words, says):
    with pytest.raises(UserError, match=says):
        parser_of("seed").parse_args(words)


def test_a_command_that_does_not_carry_it_out_is_as_usual():
    parser = Parser(prog="p")
    add_request_options(parser, required=False)
    request = request_of(parser.parse_args(["--method", "mae", "--plugin", "a.py", "--plugin", "b"]))
    assert request.execution == execution_of(parser.parse_args([])) == Execution()
    assert (request.method, request.task, request.plugins) == ("mae", "", ("a.py", "b"))
    assert not request.save_predictions


def test_a_value_out_of_range_is_refused_with_the_option_that_gave_it():
    parser = Parser(prog="p")
    add_request_options(parser, required=False)
    with pytest.raises(UserError, match=r"--label-fraction 7 is not a share of the labels"):
        request_of(parser.parse_args(["--label-fraction", "7"]))
    assert argument(positive)("3") == 3


def test_a_misspelt_command_is_one_line(capsys):
    assert main(["rnu"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("harness: error: ")
    assert "'rnu'" in err
    assert err.count("\n") == 1


def completions(line):
    """What the shell is told for a command line that the cursor is at the end of."""
    code = "import sys; from harness.cli.main import main; sys.exit(main())"
    shell = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    asked = subprocess.run(
        f'{sys.executable} -c "{code}" 8>&1 9>/dev/null >/dev/null',
        shell=True,
        env=os.environ | shell,
        capture_output=True,
        text=True,
        check=False,
    )
    return {word.strip() for word in asked.stdout.splitlines()}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("harness leader", {"leaderboard"}),
        ("harness run --method hyb", {"hybridmim"}),
        ("harness run --backbone swin", {"swinunetr"}),
        ("harness run --preset few", {"fewshot"}),
        ("harness suite run ph", {"phantoms-v1"}),
        ("harness run --label-", {"--label-fraction", "--label-seed"}),
    ],
)
def test_a_shell_is_told_how_a_word_goes_on(line, words):
    assert completions(line) == words
