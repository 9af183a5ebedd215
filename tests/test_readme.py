"""README and docs: their table is the published one, their links lead somewhere, and their commands are commands."""

import csv
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from harness import write_image
from harness.cli.main import _parser
from harness.conformance.suite import check_method
from tests.harness.commands import BUDGET, SMALL, fails, harness, record_of

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BOARD = ROOT / "leaderboards" / "published" / "msd_hippocampus_controls" / "leaderboard.csv"
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
# Variables and words that stand for something of the reader's.
STANDS_FOR = {"RUN": "run", "$m": "scratch", "$method": "scratch", "$seed": "0", "FILE": "file", "DIR": "folder"}


def rows_of_the_readme():
    text = (ROOT / "README.md").read_text()
    table = text.partition("| minutes of pre-training |\n|---|---|---|---|---|\n")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_the_table_is_the_published_one():
    with BOARD.open(newline="") as file:
        rows = [
            row for row in csv.DictReader(file) if row["target"] == "average" and row["preset"].startswith("fewshot")
        ]
    published = {row["method"].partition("{")[0]: row for row in rows}
    rows = rows_of_the_readme()
    assert {row[0].removesuffix(" (control)") for row in rows} == set(published)
    for name, dice, delta, hd95, minutes in rows:
        row = published[name.removesuffix(" (control)")]
        assert dice == f"{float(row['dice']):.4f} [{float(row['dice_ci_low']):.4f}, {float(row['dice_ci_high']):.4f}]"
        difference = [float(row[key] or 0) for key in ("delta_dice_vs_scratch", "delta_ci_low", "delta_ci_high")]
        assert delta == ("-" if name == "scratch" else "{:+.4f} [{:+.4f}, {:+.4f}]".format(*difference))
        assert hd95 == f"{float(row['hd95_mm']):.2f}"
        assert minutes == (f"{float(row['pretrain_seconds']) / 60:.0f}" if row["pretrain_seconds"] else "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in LINK.findall(prose):
        if "://" not in target and not target.startswith("#"):
            assert (page.parent / target.partition("#")[0]).exists(), target


def commands(page):
    """Every `harness` command in the blocks of a page, as words."""
    for block in BLOCK.findall(page.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|;|\||>|\bdo\b", line.partition(" #")[0]):
                words = shlex.split(part)
                starts = [n for n, word in enumerate(words) if word.rpartition("/")[2] == "harness"]
                if starts and words[starts[0] - 1 : starts[0]] != ["-m"]:
                    yield [STANDS_FOR.get(word, word) for word in words[starts[0] + 1 :]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_commands(page):
    """Their names and options exist; a word that is wrong raises UserError."""
    for words in commands(page):
        _parser().parse_args(words)


def test_the_method_in_the_docs_is_one(tmp_path):
    (code,) = re.findall(
        r"^```python\n(# denoise\.py\n.*?)^```", (ROOT / "docs/write_a_method.md").read_text(), re.M | re.S
    )
    (tmp_path / "denoise.py").write_text(code)
    results = check_method("denoise", [str(tmp_path / "denoise.py")], ["unet"], checks=["finite losses", "gradients"])
    assert [result.status for result in results] == ["pass", "pass"], results


def test_the_transform_in_the_docs_is_one(tmp_path):
    """It passes the checks of transforms, as part of the page's method."""
    text = (ROOT / "docs/write_a_method.md").read_text()
    (code,) = re.findall(r"^```python\n(def flip.*?)^```", text, re.M | re.S)
    code = code.replace("class Flips(Method):", "class Flips(Denoise):\n    name = 'flips'\n")
    (tmp_path / "flips.py").write_text(f"{example('write_a_method.md', 'denoise.py')}\n\n{code}")
    checks = ["transform", "loader worker"]
    results = check_method("flips", [str(tmp_path / "flips.py")], ["unet"], checks=checks)
    assert [result.status for result in results] == ["pass", "pass"], results
    assert "none: plain crops" not in results[0].detail


def example(page, name):
    """The code of a file that a page shows."""
    text = (ROOT / "docs" / page).read_text()
    (code,) = re.findall(rf"^```python\n(# {name}\n.*?)^```", text, re.M | re.S)
    return code


def test_the_backbone_in_the_docs_is_one(tmp_path):
    (tmp_path / "segresnet_ds.py").write_text(example("write_a_backbone.md", "segresnet_ds.py"))
    checks = ["finite losses", "gradients", "state"]
    results = check_method("simmim", [str(tmp_path / "segresnet_ds.py")], ["segresnet_ds"], checks=checks)
    assert [result.status for result in results] == ["pass"] * len(checks), results


def patients(root, rng):
    """Ten cases of the task that `write_a_task.md` writes."""
    for number in range(10):
        label = np.zeros((32, 40, 32), np.uint8)
        label[8:20, 8:20, 8:20], label[12:16, 12:16, 12:16] = 1, 2
        image = rng.normal(100, 20, label.shape) + 50 * label + number
        folder = root / f"p{number}"
        folder.mkdir(parents=True)
        write_image(folder / "image.nii.gz", image.astype(np.float32), np.eye(4))
        write_image(folder / "label.nii.gz", label, np.eye(4))


def test_the_task_in_the_docs_is_one(tmp_path, capsys):
    (tmp_path / "lesions.py").write_text(example("write_a_task.md", "lesions.py"))
    patients(tmp_path / "patients", np.random.default_rng(0))
    given = ["--plugin", tmp_path / "lesions.py", "--data", tmp_path / "patients"]
    harness("data", "check", "lesions", *given)
    assert "10 cases, 8 for training and 2" in capsys.readouterr().out
    (tmp_path / "visits.py").write_text(
        example("write_a_task.md", "lesions.py").replace(
            'label.nii.gz"))', 'label.nii.gz"), patient=str(int(image.parent.name[1:]) // 2))'
        )
    )
    harness("data", "check", "lesions", "--plugin", tmp_path / "visits.py", "--data", tmp_path / "patients")
    assert "10 cases of 5 patients, 8 for training and 2" in capsys.readouterr().out
    words = ["--method", "scratch", "--task", "lesions", *BUDGET, *SMALL["unet"], "--runs", tmp_path / "runs"]
    harness("run", *words, *given, "--set", "finetune.crop=32,32,32", "--set", "pretrain.crop=32,32,32")
    assert record_of(tmp_path / "runs", "scratch")["metrics"].keys() == {"lesion", "core", "average"}
    for more in (["--data", "phantom"], ["--dry-run"]):
        assert "describes no phantom: give --data" in fails(capsys, "run", *words, "--plugin", given[1], *more)


def test_there_are_commands_to_look_at():
    assert sum(len(list(commands(page))) for page in PAGES) > 40
