"""Claims as ratios of times in one run, beside those of the stored baseline: `pytest -m benchmark -s tests/benchmarks`.

The summary at the end says what got slower; `--save-baseline` stores this run's ratios as the new baseline.
"""

import json
import time
from pathlib import Path

import numpy as np
import pytest

BASELINE = Path(__file__).with_name("baseline.json")
SLOWER = 0.10  # share by which a ratio must be worse than the baseline's to be named
FOUND = pytest.StashKey[dict]()


def pytest_addoption(parser):
    parser.addoption(
        "--save-baseline", action="store_true", help="store the ratios of this run as tests/benchmarks/baseline.json"
    )


@pytest.fixture
def claim(request):
    """`claim(name, ratios, at_least=... | at_most=...)`: the median must keep the limit."""

    def check(name, ratios, *, at_least=None, at_most=None):
        ratios = np.atleast_1d(ratios)
        median, low, high = float(np.median(ratios)), float(ratios.min()), float(ratios.max())
        limit = f"at least {at_least:g}" if at_least is not None else f"at most {at_most:g}"
        entry = {"median": median, "low": low, "high": high, "limit": limit, "larger_is_better": at_least is not None}
        request.config.stash.setdefault(FOUND, {})[name] = entry
        print(f"\n{name}: {median:.3g} ({low:.3g} to {high:.3g}), {limit}")
        assert median >= at_least if at_least is not None else median <= at_most

    return check


@pytest.fixture
def in_turn(benchmark):
    """`in_turn(first, second, ..., rounds=5)`: seconds of each, all of them once per round, after a round that does not count."""

    def measure(*functions, rounds=5):
        times = [[] for _ in functions[1:]]

        def others():
            for function, seconds in zip(functions[1:], times, strict=True):
                began = time.perf_counter()
                function()
                seconds.append(time.perf_counter() - began)

        benchmark.pedantic(functions[0], setup=others, rounds=rounds, warmup_rounds=1)
        return [np.asarray(seconds[-rounds:]) for seconds in (benchmark.stats.stats.data, *times)]

    return measure


@pytest.fixture
def over(in_turn, benchmark):
    """`over(theirs, ours)`: time of theirs over time of ours, round by round."""

    def measure(theirs, ours, rounds=5):
        mine, other = in_turn(ours, theirs, rounds=rounds)
        benchmark.extra_info["ratio"] = float(np.median(other / mine))
        return other / mine

    return measure


def pytest_terminal_summary(terminalreporter, config):
    found = config.stash.get(FOUND, {})
    if not found:
        return
    baseline = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    terminalreporter.section("ratios in this run, and in the baseline")
    slower = []
    for name, now in found.items():
        then = baseline.get(name)
        compared = "not in the baseline"
        if then is not None:
            change = now["median"] / then["median"] - 1
            compared = f"baseline {then['median']:.3g}, {change:+.0%}"
            if (-change if now["larger_is_better"] else change) > SLOWER:
                slower.append(f"{name}: {then['median']:.3g} was, {now['median']:.3g} is")
        spread = f"{now['low']:.3g} to {now['high']:.3g}"
        terminalreporter.write_line(f"{name}: {now['median']:.3g} ({spread}; {now['limit']}); {compared}")
    for line in slower:
        terminalreporter.write_line(f"SLOWER by more than {SLOWER:.0%}: {line}", red=True)
    if baseline and not slower:
        terminalreporter.write_line("nothing got slower than the baseline")
    # The option is known only where this folder is named on the command line.
    if config.getoption("--save-baseline", default=False):
        BASELINE.write_text(json.dumps(baseline | found, indent=1) + "\n")
        terminalreporter.write_line(f"stored in {BASELINE}")
