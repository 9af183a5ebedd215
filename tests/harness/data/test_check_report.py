"""The page of `harness data check`."""

import json
import re
import shutil
import subprocess

import pytest

from tests.harness.commands import harness

NASTY = '<script>alert("x")</script>'


def test_the_report_escapes_names_and_stands_alone(data_folders, tmp_path, capsys):
    root = tmp_path / "data"
    shutil.copytree(data_folders / "msd_hippocampus", root)
    path = root / "dataset.json"
    content = json.loads(path.read_text())
    entry = content["training"][0]
    # "/" cannot be in a file's name; the opening tag is what matters.
    name = NASTY.replace("/", "")
    for kind in ("image", "label"):
        new = entry[kind].rpartition("/")[0] + f"/{name}.nii.gz"
        (root / entry[kind]).rename(root / new)
        entry[kind] = new
    path.write_text(json.dumps(content))
    (root / content["training"][1]["image"]).write_bytes(b"")
    report = tmp_path / "report.html"
    harness("data", "check", "msd_hippocampus", "--data", root, "--report", report, "--runs", tmp_path, status=2)
    page = report.read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;script&gt;" in page
    assert {found[:5] for found in re.findall(r"""(?:src|href)=["']?([^"'\s>]*)""", page)} == {"data:"}
    assert page.count("data:image/png;base64,") == 4
    assert "files that cannot be used" in page


def test_the_report_opens_in_a_browser(data_folders, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    harness(
        "data", "check", "btcv", "--data", data_folders / "btcv", "--report", tmp_path / "r.html", "--runs", tmp_path
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [browser, *flags, "--dump-dom", (tmp_path / "r.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "<h2>Cases</h2>" in done.stdout
    assert done.stdout.count("<img ") == 5
