"""Does a method keep the contract? The checks behind `harness check-method`, and the same ones for a plugin's own tests.

from harness.conformance import assert_conforms

def test_my_method():
    assert_conforms("my_method")            # an installed plugin, or plugins=["my_method.py"]
"""

import io
import pickle
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from torch import Tensor, nn

from harness.bench import STEPS, Bench, CheckError, total
from harness.contracts import Backbone, Batch, Method
from harness.equality import check_micro_batches, check_processes, check_resume
from harness.errors import UserError
from harness.registry import Registry

TWO = "two processes"


@dataclass(frozen=True)
class Result:
    """One check of one method on one backbone.

    Attributes:
        status: pass, FAIL, refused (the method or the backbone says no, in words), or n/a.
        detail: what was measured, or what to mend.
    """

    check: str
    backbone: str
    status: str
    detail: str


def check_losses(bench: Bench) -> str:
    built = bench.new()
    terms = built.method(built.batches(1)[0])
    total(terms)
    return ", ".join(f"{name} {term.item():.3g}" for name, term in terms.items())


def check_gradients(bench: Bench) -> str:
    method = (built := bench.new()).method
    before = {key: value.clone() for key, value in method.backbone.named_parameters() if not value.requires_grad}
    reached: set[str] = set()
    for batch in built.batches(3):
        total(method(batch)).backward()
        reached |= {key for key, value in method.named_parameters() if value.grad is not None and value.grad.any()}
    trainable = [key for key, value in method.named_parameters() if value.requires_grad]
    dead = [key for key in trainable if key not in reached]
    if dead:
        raise CheckError(
            f"no gradient reaches {_some(dead)}: use them in forward, take them out, or name fewer parts in trains"
        )
    frozen = [
        key for key, value in method.backbone.named_parameters() if not value.requires_grad and value.grad is not None
    ]
    if frozen:
        raise CheckError(f"frozen parameters {_some(frozen)} have a gradient: do not switch requires_grad on")
    built.train(built.batches(1))
    moved = [key for key, value in method.backbone.named_parameters() if key in before and not before[key].equal(value)]
    if moved:
        raise CheckError(f"frozen parameters {_some(moved)} have changed: trains is {method.trains}")
    return f"{len(trainable)} parameters trained, {len(before)} frozen"


def check_learns(bench: Bench) -> str:
    built = bench.new()
    # A few batches with the same masks and dropout, again and again, each against its own mean: what one batch is harder
    # than another would drown thirty steps of learning.
    batches, losses = built.batches(STEPS // 10), []
    optimizer = built.optimizer()
    for _ in range(10):
        built.reseed()
        losses.append(built.train(batches, optimizer=optimizer))
    turns = np.asarray(losses)
    first, last = float(turns[:2].mean()), float(turns[-2:].mean())
    # Rank correlation with the step: noise without a trend passes once in a hundred times, a steady fall always.
    apart = (turns - turns.mean(axis=0)).ravel()
    chance = spearmanr(np.arange(STEPS), apart, alternative="less").pvalue if np.ptp(apart) else 1.0
    if not (last < first and chance < 0.01):
        raise CheckError(
            f"the loss went from {first:.4g} to {last:.4g} in {STEPS} steps (p = {chance:.2g} that this is noise): it does "
            "not fall on a phantom"
        )
    return f"{first:.4g} to {last:.4g}"


def check_same_seed(bench: Bench) -> str:
    states = []
    for number in range(2):
        # An empty folder each: what a method keeps from preparing must not change what comes after.
        folder = bench.folder / f"same-seed-{number}"
        folder.mkdir(exist_ok=True)
        built = replace(bench, folder=folder).new()
        built.train(built.batches(2))
        states.append({key: value.clone() for key, value in built.method.state_dict().items()})
    other = [key for key, value in states[0].items() if not torch.equal(value, states[1][key])]
    if other:
        raise CheckError(
            f"two runs of one seed differ in {_some(other)}: draw from self.generator and the transform's rng only"
        )
    return "equal after 2 steps"


def check_state(bench: Bench) -> str:
    built, other = bench.new(), bench.new(seed=1)
    batches = built.batches(2)
    built.train(batches[:1])
    path = bench.folder / "state.safetensors"
    save_file({key: value.contiguous().clone() for key, value in built.method.state_dict().items()}, path)
    other.method.load_state_dict(load_file(path))
    losses = []
    for method in (built.method, other.method):
        method.eval()
        method.generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            losses.append({name: term.item() for name, term in method(batches[1]).items()})
    if losses[0] != losses[1]:
        raise CheckError(
            f"a loaded state gives {losses[1]}, the saved one {losses[0]}: keep what counts in parameters or buffers"
        )
    return f"{path.stat().st_size / 2**20:.1f} MiB"


class _NoModels(pickle.Pickler):
    def persistent_id(self, value: Any) -> None:
        if isinstance(value, nn.Module | Tensor):
            raise CheckError(
                f"the transform holds a {type(value).__name__}: it runs in loader workers, keep models out of it"
            )


def check_transform(bench: Bench) -> str:
    built = bench.new()
    if built.transform is None:
        return "none: plain crops"
    buffer = io.BytesIO()
    try:
        _NoModels(buffer).dump(built.transform)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise CheckError(
            f"the transform cannot be pickled ({error}): make it a module-level class or function"
        ) from None
    sample = built.sources[0].sample(built.crop, np.random.default_rng(0))
    before = {key: np.array(value) for key, value in sample.items()}
    times = []
    for number in range(5):
        copy = {key: value.copy() for key, value in before.items()}
        began = time.perf_counter()
        built.transform(copy, np.random.default_rng(number))
        times.append(time.perf_counter() - began)
    return f"{len(buffer.getvalue())} bytes, {1000 * float(np.median(times)):.1f} ms a sample"


def check_worker(bench: Bench) -> str:
    built = bench.new()
    here, there = built.batches(2), built.batches(2, workers=1)
    for mine, other in zip(here, there, strict=True):
        unlike = [key for key, value in mine.items() if not torch.equal(value, other[key])]
        if unlike:
            raise CheckError(
                f"a loader worker gives another {_some(unlike)}: draw from the rng that the transform is given only"
            )
    return "as in the main process"


def check_batches(bench: Bench) -> str:
    return _sizes(bench, {"1": {"batch": 1}, "3": {"batch": 3}})


def check_channels(bench: Bench) -> str:
    return _sizes(bench, {"2": {"channels": 2}, "4": {"channels": 4}})


def check_crops(bench: Bench) -> str:
    x, y, z = bench.crop
    return _sizes(bench, {f"{y}x{x}x{z}": {"crop": (y, x, z)}, f"{x}x{y}x{y}": {"crop": (x, y, y)}})


def _sizes(bench: Bench, variants: Mapping[str, Mapping[str, Any]]) -> str:
    said = []
    for name, changed in variants.items():
        try:
            built = bench.new(**changed)
        except UserError as error:
            # A method may refuse a size, in words; it may not fail on it.
            said.append(f"{name} refused: {error}")
            continue
        try:
            built.train(built.batches(1))
        # Whatever it raises is what the author has to look at.
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise CheckError(f"{name}: {type(error).__name__}: {error}; mend it, or refuse it in check") from error
        said.append(f"{name} works")
    if not any(text.endswith("works") for text in said):
        raise CheckError("; ".join(said))
    return "; ".join(said)


class _Plain(nn.Module):
    """What any method at least does: encode, decode, compare."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone, self.restore = backbone, nn.Conv3d(backbone.width, backbone.in_channels, kernel_size=1)

    def forward(self, batch: Batch) -> Tensor:
        features = self.backbone.decode(self.backbone.encode(batch["image"]))
        return (self.restore(features) - batch["image"]).square().mean()


def check_cost(bench: Bench) -> str:
    built, plain = bench.new(), _Plain(bench.new_backbone(1))
    (batch,) = built.batches(1)
    image = {"image": batch["image"]}
    seconds: dict[str, list[float]] = {"method": [], "plain": []}
    # Turn by turn, so that what else the machine does falls on both.
    for _ in range(4):
        for name, loss in (("method", lambda: total(built.method(batch))), ("plain", lambda: plain(image))):
            began = time.perf_counter()
            loss().backward()
            seconds[name].append(time.perf_counter() - began)
    ratio = min(seconds["method"]) / min(seconds["plain"])
    return f"{ratio:.2f} x a plain autoencoding step"


def check_weights(bench: Bench) -> str:
    method = bench.new().method
    state, weights = method.backbone.state_dict(), method.weights()
    foreign = [key for key, value in weights.items() if method.trains and state[key].shape != value.shape]
    if foreign:
        raise CheckError(f"weights gives {_some(foreign)}, which do not fit the backbone")
    return f"{len(weights)} tensors handed over"


@torch.inference_mode()
def check_picture(bench: Bench) -> str:
    built = bench.new()
    built.reseed()
    (batch,) = built.batches(1)
    shown = built.method.eval().show(batch)
    for name, image in shown.items():
        if image.ndim != 5 or image.shape[2:] != batch["image"].shape[2:] or not image.float().isfinite().all():
            raise CheckError(f"show gives {name!r} of shape {tuple(image.shape)}: due are finite (N, C, x, y, z)")
    return ", ".join(shown) or "nothing to show"


CHECKS: dict[str, Callable[[Bench], str]] = {
    "finite losses": check_losses,
    "gradients": check_gradients,
    f"loss falls, {STEPS} steps": check_learns,
    "same seed": check_same_seed,
    "state": check_state,
    "transform": check_transform,
    "loader worker": check_worker,
    "batch sizes": check_batches,
    "micro-batches": check_micro_batches,
    "resume": check_resume,
    "channels": check_channels,
    "crops": check_crops,
    "weights": check_weights,
    "picture": check_picture,
    "step time": check_cost,
}


def check_method(
    name: str,
    plugins: Sequence[str] = (),
    backbones: Sequence[str] | None = None,
    settings: Mapping[str, str] | None = None,
    checks: Sequence[str] | None = None,
    done: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Every check of a method (or those in `checks`) on every backbone that can serve it (or those in `backbones`).

    `done` hears of each result as it comes.

    Raises:
        UserError: an unknown name, or a plugin that does not load.
    """
    registry = Registry(plugins)
    method: type[Method] = registry.load("method", name)
    results: list[Result] = []

    def add(result: Result) -> None:
        results.append(result)
        done(result)

    for backbone in backbones or registry.names("backbone"):
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(method, registry.load("backbone", backbone), Path(folder), settings or {})
            try:
                lacking = method.needs - bench.backbone.abilities
                if lacking:
                    raise UserError(f"it needs {', '.join(sorted(lacking))}")
                trains = bench.new().method.trains
            except UserError as error:
                add(Result("fits", backbone, "refused", str(error)))
                continue
            # A plugin is foreign code: what it raises while it is built is its author's to see.
            except Exception as error:
                text = " ".join(str(error).split())[:300]
                add(
                    Result(
                        "builds",
                        backbone,
                        "FAIL",
                        f"{type(error).__name__} in __init__, transform, check or prepare: {text}",
                    )
                )
                continue
            for check, function in CHECKS.items():
                if checks is not None and check not in checks:
                    continue
                if trains or check == "weights":
                    add(_result(check, backbone, partial(function, bench)))
                else:
                    add(Result(check, backbone, "n/a", "trains nothing"))
            if trains and (checks is None or TWO in checks):
                add(_result(TWO, backbone, partial(check_processes, 2, name, plugins, backbone, settings or {})))
    return results


def _result(check: str, backbone: str, function: Callable[[], str]) -> Result:
    try:
        return Result(check, backbone, "pass", function())
    except CheckError as error:
        return Result(check, backbone, "FAIL", str(error))
    # A plugin is foreign code: whatever it raises is its author's to see, and the other checks go on.
    except Exception as error:
        return Result(check, backbone, "FAIL", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def assert_conforms(
    name: str,
    plugins: Sequence[str] = (),
    backbones: Sequence[str] | None = None,
    checks: Sequence[str] | None = None,
) -> None:
    """For a plugin's own tests: every check passes on every backbone that can serve. Raises AssertionError."""
    results = check_method(name, plugins, backbones, checks=checks)
    failed = [f"{result.check} on {result.backbone}: {result.detail}" for result in results if result.status == "FAIL"]
    assert not failed, "\n".join([f"method {name!r} does not keep the contract:", *failed])
    assert any(result.status == "pass" for result in results), f"no backbone can serve method {name!r}: {results}"


def report(results: Sequence[Result]) -> str:
    """A table, checks by backbones, and below it what to mend and what was measured."""
    backbones = list(dict.fromkeys(result.backbone for result in results))
    checks = list(dict.fromkeys(result.check for result in results))
    found = {(result.check, result.backbone): result for result in results}
    rows = [["", *backbones]]
    for check in checks:
        cells = [found.get((check, backbone)) for backbone in backbones]
        rows.append([check, *(cell.status if cell else "-" for cell in cells)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    details: dict[tuple[str, str, str], list[str]] = {}
    for result in results:
        if result.status != "n/a":
            details.setdefault((result.status, result.check, result.detail), []).append(result.backbone)
    order = {"FAIL": 0, "refused": 1, "pass": 2}
    for (status, check, detail), where in sorted(details.items(), key=lambda item: order[item[0][0]]):
        lines.append(f"{status:7} {check} ({', '.join(where)}): {detail}")
    return "\n".join(lines)


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
