"""Wrong words: one line, and status 2. Help and lists: at once."""

import errno
import getpass
import os
import subprocess
import sys

import pytest

from harness.cli import main as main_module
from tests.harness.commands import HYBRIDMIM, fails


@pytest.mark.parametrize("words", [["--help"], ["list"], ["list", "--json"]])
def test_help_and_list_import_no_torch(words):
    code = f"import sys; from harness.cli.main import main; main({words!r}); "
    if words == ["--help"]:
        code = "import sys, contextlib; from harness.cli.main import main\n"
        code += "with contextlib.suppress(SystemExit): main(['--help'])\n"
    code += "\nassert not {'torch', 'monai', 'pandas', 'scipy', 'nibabel'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "hybridmim" in done.stdout or words == ["--help"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("run", "--method", "hybridmin", "--task", "brats"), "did you mean 'hybridmim'"),
        (("run", "--method", "scratch", "--task", "brast"), "did you mean 'brats'"),
        (("run", "--method", "scratch", "--task", "brats", "--backbone", "unets"), "did you mean 'unet'"),
        ((*HYBRIDMIM, "--preset", "papr"), "did you mean 'paper'"),
        ((*HYBRIDMIM, "--task", "./nowhere"), "does not exist"),
        (("run", "--task", "brats"), "--method"),
        (("runn",), "unknown command 'runn': did you mean 'run'"),
        (("list", "metods"), "did you mean 'methods'"),
        ((*HYBRIDMIM, "--seed", "-1"), "not a whole number"),
        (("data", "phantom", "brats", "--out", "x", "--seed", "-1"), "not a whole number"),
        (("data", "phantom", "brats", "--out", "x", "--cases", "1"), "at least 2 cases"),
        (("data", "phantom", "brats", "--out", "/dev/null/x"), "/dev/null is no folder"),
        ((*HYBRIDMIM, "--label-fraction", "0"), "is not a share of the labels"),
        ((*HYBRIDMIM, "--plugin", "nowhere.py"), "no such file"),
        ((*HYBRIDMIM, "--data", "nowhere"), "not a folder"),
        (("data", "check", "brats", "--data", "nowhere"), "not a folder"),
        (("show", "nothing"), "unknown run"),
        (("run", "--method", "scratch", "--task", "a" * 5000), "unknown task"),
        (("run", "--method", "scratch", "--task", "/" + "a" * 5000), "does not exist"),
        ((*HYBRIDMIM, "--data", "a" * 5000), "is not a folder"),
        ((*HYBRIDMIM, "--dry-run", "--seed", str(2**63)), "less than or equal to 9223372036854775807"),
    ],
)
def test_wrong_words(words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HARNESS_DATA", raising=False)
    assert says in fails(capsys, *words)


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE"])
def test_a_launchers_variable_that_is_no_number(name, capsys, monkeypatch):
    monkeypatch.setenv(name, "abc")
    assert f"{name}='abc' is not a number" in fails(capsys, "list")


def test_an_error_moves_no_cursor(capsys):
    assert "\x1b" not in fails(capsys, "show", "\x1b[2Jrun")


def test_a_pipe_that_breaks_inside_the_work_is_no_success(monkeypatch):
    """It was taken for a reader of the output that went away, with status 0."""

    def fail(arguments):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    parser = main_module._parser
    monkeypatch.setattr(main_module, "_parser", lambda: _with_command(parser(), fail))
    with pytest.raises(BrokenPipeError):
        main_module.main(["list"])


def test_a_plugin_that_ends_the_process_is_no_success(tmp_path, capsys):
    plugin = tmp_path / "ending.py"
    plugin.write_text("import sys\n\nsys.exit(0)\n")
    assert "ending.py, line 3 called sys.exit(0)" in fails(capsys, *HYBRIDMIM, "--plugin", str(plugin))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EDQUOT])
def test_a_file_system_that_fails_is_the_users_to_mend(number, capsys, monkeypatch):
    def fail(arguments):
        raise OSError(number, os.strerror(number))

    parser = main_module._parser
    monkeypatch.setattr(main_module, "_parser", lambda: _with_command(parser(), fail))
    assert f"{os.strerror(number)}: writing; mend it and ask again" in fails(capsys, "list")


def _with_command(parser, command):
    parse = parser.parse_args

    def changed(words):
        arguments = parse(words)
        arguments.command = command
        return arguments

    parser.parse_args = changed
    return parser


def test_a_user_whom_the_system_does_not_know_has_a_name(monkeypatch):
    """`docker --user 12345`: MONAI asks for the name when it is imported."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    assert main_module.main(["list", "presets"]) == 0
    assert getpass.getuser() == "unknown"
    monkeypatch.setenv("LOGNAME", "me")
    main_module.main(["list", "presets"])
    assert getpass.getuser() == "me"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("predict", "--run", "x", "image", "out"), "loading PyTorch and MONAI ..."),
        (("list", "method", "scratch"), "loading PyTorch and MONAI ..."),
        (("leaderboard", "validate", "nothing"), "reading records ..."),
        (("show", "nothing"), "reading records ..."),
        (("data", "check", "nothing"), "looking at the data ..."),
    ],
)
@pytest.mark.parametrize("terminal", [True, False])
def test_on_a_terminal_a_command_says_at_once_what_it_does(words, line, terminal, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    main_module.main(words)
    first, *_ = [*capsys.readouterr().err.splitlines(), ""]
    assert (first == line) == terminal
