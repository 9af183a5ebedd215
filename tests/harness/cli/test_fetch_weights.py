"""Published weights come with their digest compared, or with words on where they are."""

import hashlib

import pytest

from tests.harness.archives import GOOD, Server
from tests.harness.commands import fails, harness

PLUGIN = """
from harness import PublishedWeights
mine = PublishedWeights(
    name="mine", description="mine", backbone="unet", settings={{"features": "4,4,8,8,8"}}, channels=1, spacing="",
    intensities="", corpus="my scans", licence="MIT", reference="me", page="here",
    url="{url}", file="{file}", sha256="{sha256}", known_from="me"
)
"""


def plugin(folder, url, sha256="", file="../w.pt"):
    path = folder / "mine.py"
    path.write_text(PLUGIN.format(url=url, sha256=sha256, file=file))
    return path


@pytest.mark.parametrize("sha256", ["", hashlib.sha256(GOOD).hexdigest()])
def test_a_file_comes_with_its_digest_and_the_command_that_uses_it(sha256, tmp_path, capsys):
    with Server(GOOD) as server:
        path = plugin(tmp_path, server.archive.url, sha256)
        harness("fetch-weights", "mine", "--out", tmp_path / "out", "--plugin", path)
    said = capsys.readouterr().out
    # The name is a name, not a path that leads out of the folder.
    assert (tmp_path / "out" / "w.pt").read_bytes() == GOOD
    assert hashlib.sha256(GOOD).hexdigest() in said
    assert ("as expected" in said) == bool(sha256)
    assert "method.corpus=mine --set backbone.features=4,4,8,8,8" in said
    assert "there already" in fails(capsys, "fetch-weights", "mine", "--out", tmp_path / "out", "--plugin", path)


def test_another_file_is_removed(tmp_path, capsys):
    with Server(GOOD) as server:
        path = plugin(tmp_path, server.archive.url, "0" * 64)
        harness("fetch-weights", "mine", "--out", tmp_path / "out", "--plugin", path, status=2)
    assert "expected 0000" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_weights_behind_a_form_are_named_with_their_page(capsys):
    said = fails(capsys, "fetch-weights", "transvw_chest_ct")
    assert "github.com/fhaghighi/TransVW" in said
    assert "--backbone genesis_unet3d" in said
    assert "transvw_chest_ct" in fails(capsys, "fetch-weights", "transvw_chest")
