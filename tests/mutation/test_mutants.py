"""The mutants are what they should be, the engine tells caught ones from others, and (`-m mutation`) all are caught."""

import json
import os
import textwrap
from collections import Counter
from pathlib import Path

import pytest
from filelock import FileLock

from tests.mutation.engine import CONTROL_SECONDS, ROOT, Ended, Mutant, Sandbox, read_mutants

# Another folder of lists, for mutants that are not in the tree.
EXTRA = os.environ.get("HARNESS_MUTANTS")
CHOSEN = read_mutants(Path(EXTRA)) if EXTRA else read_mutants()
IN_ALL, A_METHOD = 120, 8
WITHOUT_PRETEXT_TASK = {
    "methods/scratch.py": "it trains nothing before fine-tuning",
    "methods/untrained.py": "it trains nothing before fine-tuning",
}


@pytest.mark.parametrize("mutant", CHOSEN, ids=str)
def test_a_mutant_changes_one_place_and_compiles(mutant):
    source = ROOT / mutant.source
    compile(mutant.apply(source.read_text()), str(source), "exec")
    assert (ROOT / mutant.tests).is_file()


def test_there_are_enough_mutants():
    mutants = read_mutants()
    number = Counter(mutant.source for mutant in mutants)
    methods = {path.relative_to(ROOT).as_posix() for path in (ROOT / "methods").glob("[!_]*.py")}
    few = {source: number[source] for source in methods - set(WITHOUT_PRETEXT_TASK) if number[source] < A_METHOD}
    assert not few, f"at least {A_METHOD} mutants are wanted for each method"
    assert len(mutants) >= IN_ALL
    assert max(Counter(map(str, mutants)).values()) == 1, "two mutants of a file say the same"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A sandbox of a tree with one source, `double`, and a test of it."""
    root = tmp_path_factory.mktemp("tiny")
    for name, text in {
        "pyproject.toml": "[tool.pytest.ini_options]\npythonpath = ['.']\n",
        "methods/double.py": "import time\n\n\ndef double(number):\n    return 2 * number\n",
        "tests/methods/test_double.py": """
            from methods.double import double

            def test_double():
                assert double(3) == 6
            """,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(textwrap.dedent(text))
    sandbox = Sandbox(tmp_path_factory.mktemp("sandbox"), root, heavy=())
    yield sandbox
    sandbox.close()


@pytest.mark.parametrize(
    ("new", "seconds", "status"),
    [
        ("3 * number", 60, 1),
        ("number + number", 60, 0),
        ("2 * number\n\nimport nothing_of_this_name", 60, 2),
        ("time.sleep(60)", 2, None),
    ],
)
def test_the_engine_tells_how_the_tests_of_a_mutant_end(tiny, new, seconds, status):
    ended = tiny.run_mutant(Mutant("methods/double.py", "doubling", "2 * number", new), seconds)
    assert ended.status == status, ended.output
    assert tiny.run("tests/methods/test_double.py").status == 0, "the source is not as it was"


def test_a_server_that_died_is_replaced(tiny):
    tiny.server.kill()
    tiny.server.wait()
    assert tiny.run("tests/methods/test_double.py").status == 0
    with pytest.raises(RuntimeError, match=r"the server of tests/methods/test_double\.py died with status -9"):
        tiny.run_mutant(Mutant("methods/double.py", "doubling", "import time", "import os\n\nos.kill(os.getppid(), 9)"))
    assert tiny.run("tests/methods/test_double.py").status == 0


@pytest.mark.parametrize(("old", "new"), [("number", "other"), ("nothing", "other"), ("2 *", "2 *")])
def test_a_mutant_that_is_no_single_change_is_refused(tiny, old, new):
    with pytest.raises(ValueError, match="doubling: `"):
        tiny.run_mutant(Mutant("methods/double.py", "doubling", old, new))


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory):
    """This worker's copy of the repository, and its server."""
    made = Sandbox(tmp_path_factory.mktemp("sandbox"))
    yield made
    made.close()


@pytest.fixture
def unchanged(request, sandbox, tmp_path_factory):
    """Test file -> how its tests end without a mutant; they run once in a session, for all workers."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if hasattr(request.config, "workerinput") else base

    def ended(tests: str) -> Ended:
        record = shared / f"{tests.replace('/', '-')}.json"
        with FileLock(f"{record}.lock"):
            if not record.exists():
                record.write_text(json.dumps(vars(sandbox.run(tests, CONTROL_SECONDS))))
            return Ended(**json.loads(record.read_text()))

    return ended


@pytest.mark.mutation
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mutant", CHOSEN, ids=str)
def test_the_tests_of_the_file_notice(mutant, sandbox, unchanged, record_property):
    record_property("mutant of", mutant.source)
    control = unchanged(mutant.tests)
    if control.status != 0:
        pytest.fail(f"Without any mutant, the tests of {mutant.tests} {control.says}:\n{control.output}", pytrace=False)
    ended = sandbox.run_mutant(mutant)
    if ended.status != 1:
        more = "" if ended.status == 0 else f":\n{ended.output}"
        change = f"`{mutant.old.strip()}` -> `{mutant.new.strip()}`"
        pytest.fail(f"{mutant}\n{change}\nThe tests of {mutant.tests} {ended.says}{more}", pytrace=False)
