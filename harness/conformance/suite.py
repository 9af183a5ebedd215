"""All conformance checks of a method: those of `harness check-method`, and the same for the tests of a plugin.

from harness.conformance import assert_conforms

def test_my_method():
    assert_conforms("my_method")            # an installed plugin, or plugins=["my_method.py"]
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch.nn.modules.dropout import _DropoutNd

from harness.api.method import Method
from harness.api.plugin_fault import plugin_fault
from harness.api.registry import Registry
from harness.api.returned import wrong_features
from harness.conformance.checks import CHECKS
from harness.conformance.consistency import check_processes
from harness.conformance.fixture import CheckError, MethodFixture
from harness.system.errors import UserError
from leaderboards.text import align

TWO = "two processes"
FEATURES = "features of the backbone"
AS_DECLARED = "its features are as declared; to check more of a backbone, take a method that trains: hybridmim"
FIRST = ("transform", "finite losses")
"""Checks without which no other one says anything."""


@dataclass(frozen=True)
class Result:
    """One check of one method on one backbone.

    Attributes:
        status: pass, FAIL, refused (the method or the backbone raised UserError), or n/a (the check does not apply).
        detail: what was measured, or what the author has to mend.
    """

    check: str
    backbone: str
    status: str
    detail: str


def check_method(
    name: str,
    plugins: Sequence[str] = (),
    backbones: Sequence[str] | None = None,
    settings: Mapping[str, str] | None = None,
    checks: Sequence[str] | None = None,
    done: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Run every check of a method on every backbone that has what the method needs.

    Args:
        plugins: files or modules with further plugins.
        backbones: names; None: all.
        settings: of the method, without the prefix `method.`.
        checks: names of the checks to run; None: all.
        done: is called with each result as soon as it is there.

    Raises:
        UserError: an unknown name, or a plugin that does not load.
    """
    registry = Registry(plugins)
    method: type[Method] = registry.load("method", name)
    results: list[Result] = []

    def add(result: Result) -> None:
        """Append a result, and pass it to `done`."""
        results.append(result)
        done(result)

    for backbone in backbones or registry.names("backbone"):
        with tempfile.TemporaryDirectory() as folder:
            fixture = MethodFixture(method, registry.load("backbone", backbone), Path(folder), settings or {})
            try:
                lacking = method.needs - fixture.backbone.abilities
                if lacking:
                    raise UserError(f"it needs {', '.join(sorted(lacking))}")
                if problem := wrong_features(fixture.new_backbone(1), fixture.crop):
                    add(Result(FEATURES, backbone, "FAIL", f"{problem}: without that no method can be checked"))
                    continue
                trains = fixture.new().method.trains
            except UserError as error:
                add(Result("fits", backbone, "refused", str(error)))
                continue
            # A plugin is foreign code: any exception while it is built becomes a result that its author reads.
            except Exception as error:
                text = " ".join(str(error).split())[:300]
                detail = f"{type(error).__name__} in __init__, transform, check or prepare: {text}"
                add(Result("builds", backbone, "FAIL", detail))
                continue
            if not trains and checks is None:
                add(Result(FEATURES, backbone, "pass", AS_DECLARED))
            broken = ""
            for check, function in CHECKS.items():
                if checks is not None and check not in checks:
                    continue
                if broken:
                    add(Result(check, backbone, "n/a", f"not run: {broken} failed"))
                elif trains or check == "weights":
                    add(_with_advice(_result(check, backbone, partial(function, fixture), plugins), fixture))
                    broken = check if check in FIRST and results[-1].status == "FAIL" else ""
                else:
                    add(Result(check, backbone, "n/a", "trains nothing"))
            if trains and not broken and (checks is None or TWO in checks):
                shared = _result(
                    TWO, backbone, partial(check_processes, 2, name, plugins, backbone, settings or {}), plugins
                )
                add(_with_advice(shared, fixture))
    return results


def _result(check: str, backbone: str, function: Callable[[], str], plugins: Sequence[str]) -> Result:
    """Run one check. The result is FAIL where it raises, whatever it raises; it names the plugin's line."""
    try:
        return Result(check, backbone, "pass", function())
    except CheckError as error:
        return Result(check, backbone, "FAIL", str(error))
    # A plugin is foreign code: any exception becomes a result that its author reads, and the other checks go on.
    except Exception as error:
        text = plugin_fault(error, plugins) or f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return Result(check, backbone, "FAIL", text)


def _with_advice(result: Result, fixture: MethodFixture) -> Result:
    """The result; where parts of a batch gave something else, with the backbone's modules that draw for each part anew."""
    if result.status != "FAIL" or result.check not in ("micro-batches", TWO):
        return result
    modules = fixture.new_backbone(1).named_modules()
    drawing = [name for name, module in modules if isinstance(module, _DropoutNd) and module.p]
    advice = f"; {drawing[0]} of the backbone is PyTorch's dropout: take harness.Dropout" if drawing else ""
    return replace(result, detail=result.detail + advice)


def assert_conforms(
    name: str,
    plugins: Sequence[str] = (),
    backbones: Sequence[str] | None = None,
    checks: Sequence[str] | None = None,
) -> None:
    """Run every check of a method on every backbone that can serve it, in the tests of a plugin.

    Raises:
        AssertionError: a check fails, or no backbone can serve the method.
    """
    results = check_method(name, plugins, backbones, checks=checks)
    failed = [f"{result.check} on {result.backbone}: {result.detail}" for result in results if result.status == "FAIL"]
    assert not failed, "\n".join([f"method {name!r} does not keep the contract:", *failed])
    assert any(result.status == "pass" for result in results), f"no backbone can serve method {name!r}: {results}"


def report(results: Sequence[Result]) -> str:
    """A table of checks by backbones; below it one line per check and result: what to mend, or what was measured."""
    backbones = list(dict.fromkeys(result.backbone for result in results))
    checks = list(dict.fromkeys(result.check for result in results))
    by_check = {(result.check, result.backbone): result for result in results}
    rows = [["", *backbones]]
    for check in checks:
        table_cells = [by_check.get((check, backbone)) for backbone in backbones]
        rows.append([check, *(cell.status if cell else "-" for cell in table_cells)])
    lines = align(rows)
    details: dict[tuple[str, str, str], list[str]] = {}
    for result in results:
        if result.status != "n/a":
            details.setdefault((result.status, result.check, result.detail), []).append(result.backbone)
    order = {"FAIL": 0, "refused": 1, "pass": 2}
    for (status, check, detail), names in sorted(details.items(), key=lambda item: order[item[0][0]]):
        lines.append(f"{status:7} {check} ({', '.join(names)}): {detail}")
    return "\n".join(lines)
