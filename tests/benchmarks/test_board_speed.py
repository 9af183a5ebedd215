"""Tables of 10,000 records, the site of 1,000 runs, a page of 1,000 rows; `pytest -m "benchmark and slow" -s`.

The limits are seconds, against the house's rule, because that is how they were asked for; so these tests are no part of CI.
"""

import itertools
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.leaderboards.made import write_run

pytestmark = [pytest.mark.benchmark, pytest.mark.slow]

AXES = (
    range(10),
    (1.0, 0.5, 0.2, 0.1),
    ("scratch", *(f"m{number}" for number in range(16))),
    ("unet", "swinunetr", "segresnet"),
    range(5),
)


def write_many(root: Path, number: int) -> None:
    """So many runs of 40 cases and two targets, of ten tasks, four fractions, 17 methods, three backbones, five seeds."""
    template = write_run(root / "template", cases=40)
    record = json.loads((template / "record.json").read_text())
    history, rng = (template / "history.jsonl").read_text(), np.random.default_rng(0)
    cells = itertools.islice(itertools.product(*AXES), number)
    for task, fraction, method, backbone, seed in cells:
        place = root / "runs" / f"t{task}-{method}-{backbone}-s{seed}-{fraction:g}"
        place.mkdir(parents=True)
        own = {"run_id": place.name, "task": f"t{task}", "label_fraction": fraction, "method": method}
        (place / "record.json").write_text(json.dumps(record | own | {"backbone": backbone, "seed": seed}, indent=1))
        lines = ["case,target,status,dice,hd95_mm,surface_dice"]
        for case, target in itertools.product(range(40), "ab"):
            dice = float(np.clip(rng.normal(0.8, 0.05), 0, 0.999))
            lines.append(f"c{case:03d},{target},scored,{dice!r},{float(rng.gamma(2, 2))!r},{dice!r}")
        (place / "cases.csv").write_text("\n".join(lines) + "\n")
        (place / "history.jsonl").write_text(history)


def measured(*words) -> tuple[float, float]:
    """Seconds, and GiB at the peak, of a `harness` command in a process of its own."""
    # Not getrusage: what it gives begins with the memory of the process that started this one.
    code = (
        "import sys; from harness.cli import main; status = main(sys.argv[1:]); "
        "peak = next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')); "
        "print(int(peak) / 2**20, file=sys.stderr); sys.exit(status)"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=True)
    return time.perf_counter() - began, float(done.stderr.split()[-1])


def test_tables_and_statistics_of_ten_thousand_records(tmp_path):
    write_many(tmp_path, 10_000)
    seconds, memory = measured("leaderboard", "build", "--runs", tmp_path / "runs")
    print(f"10,000 records x 40 cases: {seconds:.1f} s, {memory:.2f} GiB")
    assert seconds < 10
    assert memory < 1


def test_the_site_of_a_thousand_runs(tmp_path):
    write_many(tmp_path, 1000)
    seconds, memory = measured("leaderboard", "publish", "--runs", tmp_path / "runs", "--out", tmp_path / "site")
    print(f"site of 1,000 runs: {seconds:.1f} s, {memory:.2f} GiB")
    assert seconds < 60


def test_the_page_of_a_thousand_rows(tmp_path):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    for number in range(1000):
        write_run(tmp_path / "runs", f"method{number}", dice=0.5 + number / 4000, cases=2)
    measured("leaderboard", "publish", "--runs", tmp_path / "runs", "--out", tmp_path / "site")
    with sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"]).new_page()
        began = time.perf_counter()
        page.goto((tmp_path / "site" / "index.html").as_uri())
        page.locator("#shown", has_text="rows").wait_for()
        seconds = time.perf_counter() - began
    print(f"page of 1,000 rows, usable after {seconds:.2f} s")
    assert seconds < 2
