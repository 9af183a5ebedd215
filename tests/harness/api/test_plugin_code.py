"""A plugin's code is its file and what it imports from beside it; comments and other packages do not count."""

import pytest

from harness.api.plugin_code import code_digest
from harness.api.registry import Registry

FILES = {
    "mine/__init__.py": "",
    "mine/method.py": "import torch\nfrom harness import Method\nfrom mine.losses import fit\nfrom . import masks\n\nX = 1\n",
    "mine/losses.py": "from mine.deep.more import scale\n\n\ndef fit(x):\n    return scale * x\n",
    "mine/masks.py": "SIZE = 4\n",
    "mine/deep/__init__.py": "",
    "mine/deep/more.py": "import mine.losses\n\nscale = 2\n",
    "mine/unused.py": "Y = 1\n",
    "other/__init__.py": "Z = 1\n",
    "loose.py": "import helper\nfrom other import Z\n\nX = helper.X\n",
    "helper.py": "X = 1\n",
    "harness/__init__.py": "Method = object\n",
}


@pytest.fixture
def written(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("plugin", "changed", "counts"),
    [
        ("mine/method.py", "mine/method.py", True),
        ("mine/method.py", "mine/losses.py", True),
        ("mine/method.py", "mine/masks.py", True),
        ("mine/method.py", "mine/deep/more.py", True),  # through another module, and in a circle
        ("mine/method.py", "mine/unused.py", False),
        ("mine/method.py", "other/__init__.py", False),
        ("mine/method.py", "harness/__init__.py", False),
        ("loose.py", "helper.py", True),
        ("loose.py", "other/__init__.py", True),  # a package beside the file
        ("loose.py", "harness/__init__.py", False),
    ],
)
def test_what_a_plugin_imports_from_beside_it_counts(plugin, changed, counts, written):
    before = code_digest(written / plugin)
    with (written / changed).open("a") as file:
        file.write("\nCHANGED = True\n")
    assert (code_digest(written / plugin) != before) is counts


def test_comments_docstrings_and_layout_do_not_count(written):
    before = code_digest(written / "mine/method.py")
    (written / "mine/masks.py").write_text('"""Masks."""\n\n# A size.\nSIZE   =   4\n')
    assert code_digest(written / "mine/method.py") == before
    (written / "mine/masks.py").write_text("SIZE = 5\n")
    assert code_digest(written / "mine/method.py") != before


def test_it_does_not_depend_on_where_it_lies(written, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for name in FILES:
        (elsewhere / name).parent.mkdir(parents=True, exist_ok=True)
        (elsewhere / name).write_bytes((written / name).read_bytes())
    assert code_digest(elsewhere / "mine/method.py") == code_digest(written / "mine/method.py")


@pytest.mark.parametrize("text", ["def (", "\0", "x = " + "(" * 500])
def test_code_that_cannot_be_parsed_counts_as_bytes(text, written):
    (written / "mine/masks.py").write_text(text)
    before = code_digest(written / "mine/method.py")
    (written / "mine/masks.py").write_text(text + "#")
    assert code_digest(written / "mine/method.py") != before


def test_a_built_in_method_has_the_code_of_those_that_it_builds_on():
    registry = Registry()
    names = ["simclr", "dino", "transvw", "models_genesis", "mae"]
    digests = {name: registry.digest("method", name) for name in names}
    assert len(set(digests.values())) == len(names)
