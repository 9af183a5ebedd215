"""The checks of one method on one backbone: gradients, seeds, state, shapes, cost.

Each check returns what it measured, as text, and raises CheckError where the method does not pass.
"""

import io
import pickle
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from torch import Tensor, nn

from harness.api.backbone import Backbone
from harness.api.method import Batch
from harness.api.returned import wrong_images
from harness.compute.layers import prepare_module
from harness.conformance.consistency import check_micro_batches, check_resume
from harness.conformance.fixture import CPU, STEPS, CheckError, MethodFixture, sum_of_terms
from harness.system.errors import UserError

NUDGE = 0.01  # standard deviation of the steps between the batches of `check_gradients`


def check_losses(fixture: MethodFixture) -> str:
    """The loss terms are named, finite scalars, and their sum has a gradient."""
    built = fixture.new()
    terms = built.method(built.batches(1)[0])
    sum_of_terms(terms)
    return ", ".join(f"{name} {term.item():.3g}" for name, term in terms.items())


def check_gradients(fixture: MethodFixture) -> str:
    """A gradient reaches every trainable parameter within three batches; frozen parameters stay unchanged."""
    method = (built := fixture.new()).method
    before = {key: value.clone() for key, value in method.backbone.named_parameters() if not value.requires_grad}
    reached: set[str] = set()
    generator = torch.Generator().manual_seed(0)
    for batch in built.batches(3):
        sum_of_terms(method(batch)).backward()
        reached |= {key for key, value in method.named_parameters() if value.grad is not None and value.grad.any()}
        # Factors that begin at 0, as the last norm of a residual block may, let gradients through once they have moved.
        with torch.no_grad():
            for value in method.parameters():
                if value.requires_grad:
                    value.add_(torch.randn(value.shape, generator=generator), alpha=NUDGE)
    trainable = [key for key, value in method.named_parameters() if value.requires_grad]
    dead = [key for key in trainable if key not in reached]
    if dead:
        raise CheckError(
            f"no gradient reaches {_shorten(dead)}: use them in forward, take them out, or name fewer parts in trains; "
            "harness.new_teacher makes a teacher without gradients"
        )
    frozen = [
        key for key, value in method.backbone.named_parameters() if not value.requires_grad and value.grad is not None
    ]
    if frozen:
        raise CheckError(f"frozen parameters {_shorten(frozen)} have a gradient: do not switch requires_grad on")
    built.train(1)
    moved = [key for key, value in method.backbone.named_parameters() if key in before and not before[key].equal(value)]
    if moved:
        raise CheckError(f"frozen parameters {_shorten(moved)} have changed: trains is {method.trains}")
    return f"{len(trainable)} parameters trained, {len(before)} frozen"


def check_learns(fixture: MethodFixture) -> str:
    """The loss falls in `STEPS` steps on a phantom."""
    built = fixture.new()
    # Three batches with the same masks and dropout are repeated ten times, and each batch is compared with its own mean:
    # differences between batches would hide what thirty steps learn.
    turns = np.asarray(built.train(STEPS, cycle=STEPS // 10)).reshape(10, -1)
    first, last = float(turns[:2].mean()), float(turns[-2:].mean())
    # Rank correlation of loss and step: noise without a trend passes once in a hundred times, a steady fall always.
    deviations = (turns - turns.mean(axis=0)).ravel()
    chance = spearmanr(np.arange(STEPS), deviations, alternative="less").pvalue if np.ptp(deviations) else 1.0
    if not (last < first and chance < 0.01):
        raise CheckError(
            f"the loss went from {first:.4g} to {last:.4g} in {STEPS} steps (p = {chance:.2g} that this is noise): it does "
            "not fall on a phantom"
        )
    return f"{first:.4g} to {last:.4g}"


def check_same_seed(fixture: MethodFixture) -> str:
    """Two trainings with one seed end with equal states."""
    states = []
    for number in range(2):
        # Each training gets an empty folder: what `prepare` cached must not change the training that follows.
        folder = fixture.folder / f"same-seed-{number}"
        folder.mkdir(exist_ok=True)
        built = replace(fixture, folder=folder).new()
        built.train(2)
        states.append({key: value.clone() for key, value in built.method.state_dict().items()})
    differing = [key for key, value in states[0].items() if not torch.equal(value, states[1][key])]
    if differing:
        raise CheckError(
            f"two runs of one seed differ in {_shorten(differing)}: draw from self.generator and the transform's rng only"
        )
    return "equal after 2 steps"


def check_state(fixture: MethodFixture) -> str:
    """A method that loads a saved state gives the same loss terms as the method that was saved."""
    built, other = fixture.new(), fixture.new(seed=1)
    batches = built.batches(2)
    built.train(1)
    # Use the memory layout of training: another layout may change the last digits.
    prepare_module(other.method, CPU, other.budget.channels_last)
    path = fixture.folder / "state.safetensors"
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
    """A pickler that refuses modules and tensors."""

    def persistent_id(self, value: Any) -> None:
        """Raises CheckError for a module or a tensor; is called for every object that is pickled."""
        if isinstance(value, nn.Module | Tensor):
            raise CheckError(
                f"the transform holds a {type(value).__name__}: it runs in loader workers, keep models out of it"
            )


def check_transform(fixture: MethodFixture) -> str:
    """The transform can be pickled without models or tensors, draws from its own generator, and keeps shapes; size and time."""
    built = fixture.new()
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
    times, shapes, states = [], set(), _global_states()
    for number in range(5):
        copy = {key: value.copy() for key, value in before.items()}
        began = time.perf_counter()
        made = built.transform(copy, np.random.default_rng(number))
        times.append(time.perf_counter() - began)
        if not isinstance(made, dict):
            raise CheckError(f"the transform returned {type(made).__name__}: return the sample, a dict")
        shapes.add(str({key: np.shape(value) for key, value in sorted(made.items())}))
    if drawn := [name for name, state in _global_states().items() if state != states[name]]:
        raise CheckError(
            f"the transform draws from {drawn[0]}, which no seed fixes: draw from the rng that it is given only"
        )
    if len(shapes) > 1:
        raise CheckError(
            f"the transform gives shapes {' and '.join(sorted(shapes)[:2])} for crops of one shape: the samples of a batch "
            "need equal keys and shapes, and the edges of a crop may differ"
        )
    return f"{len(buffer.getvalue())} bytes, {1000 * float(np.median(times)):.1f} ms a sample"


def _global_states() -> dict[str, bytes]:
    """The states of the generators that belong to nobody, by name."""
    return {
        "numpy.random": pickle.dumps(np.random.get_state()),
        "random": pickle.dumps(random.getstate()),
        "torch's global generator": torch.get_rng_state().numpy().tobytes(),
    }


def check_worker(fixture: MethodFixture) -> str:
    """A loader worker makes the same samples as the main process."""
    built = fixture.new()
    in_main, in_worker = built.batches(2), built.batches(2, workers=1)
    for batch, worker_batch in zip(in_main, in_worker, strict=True):
        differing = [key for key, value in batch.items() if not torch.equal(value, worker_batch[key])]
        if differing:
            raise CheckError(
                f"a loader worker gives another {_shorten(differing)}: draw from the rng that the transform is given only"
            )
    return "as in the main process"


def check_batches(fixture: MethodFixture) -> str:
    """The method trains with batches of 1 and of 3 crops, or refuses one of these sizes in words."""
    return _sizes(fixture, {"1": {"batch": 1}, "3": {"batch": 3}})


def check_channels(fixture: MethodFixture) -> str:
    """The method trains with 2 and with 4 channels, or refuses one of these numbers in words."""
    return _sizes(fixture, {"2": {"channels": 2}, "4": {"channels": 4}})


def check_crops(fixture: MethodFixture) -> str:
    """The method trains with crops of two other shapes, or refuses one of them in words."""
    x, y, z = fixture.crop
    return _sizes(fixture, {f"{y}x{x}x{z}": {"crop": (y, x, z)}, f"{x}x{y}x{y}": {"crop": (x, y, y)}})


def _sizes(fixture: MethodFixture, variants: Mapping[str, Mapping[str, Any]]) -> str:
    """Train one step with each variant of the fixture. `variants`: name -> arguments of `MethodFixture.new`."""
    remarks = []
    for name, arguments in variants.items():
        try:
            built = fixture.new(**arguments)
        except UserError as error:
            # A method may refuse a size, in words; it may not fail on it.
            remarks.append(f"{name} refused: {error}")
            continue
        try:
            built.train(1)
        # The author has to see any error that the method raises here.
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise CheckError(f"{name}: {type(error).__name__}: {error}; mend it, or refuse it in check") from error
        remarks.append(f"{name} works")
    if not any(text.endswith("works") for text in remarks):
        raise CheckError("; ".join(remarks))
    return "; ".join(remarks)


class _Plain(nn.Module):
    """A plain autoencoder: the least that any method computes in a step."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone, self.restore = backbone, nn.Conv3d(backbone.width, backbone.in_channels, kernel_size=1)

    def forward(self, batch: Batch) -> Tensor:
        """Mean squared error of the restored images."""
        features = self.backbone.decode(self.backbone.encode(batch["image"]))
        return (self.restore(features) - batch["image"]).square().mean()


def check_cost(fixture: MethodFixture) -> str:
    """Time of a step of the method, as a multiple of a step of a plain autoencoder. It never fails."""
    built, plain = fixture.new(), _Plain(fixture.new_backbone(1))
    (batch,) = built.batches(1)
    image = {"image": batch["image"]}
    seconds: dict[str, list[float]] = {"method": [], "plain": []}
    # The two take turns, so that other work of the machine slows both.
    for _ in range(4):
        for name, loss in (("method", lambda: sum_of_terms(built.method(batch))), ("plain", lambda: plain(image))):
            began = time.perf_counter()
            loss().backward()
            seconds[name].append(time.perf_counter() - began)
    ratio = min(seconds["method"]) / min(seconds["plain"])
    return f"{ratio:.2f} x a plain autoencoding step"


def check_weights(fixture: MethodFixture) -> str:
    """The weights that the method hands over have the shapes of the backbone's own."""
    method = fixture.new().method
    state, weights = method.backbone.state_dict(), method.weights()
    foreign = [key for key, value in weights.items() if method.trains and state[key].shape != value.shape]
    if foreign:
        raise CheckError(f"weights gives {_shorten(foreign)}, which do not fit the backbone")
    return f"{len(weights)} tensors handed over"


@torch.inference_mode()
def check_picture(fixture: MethodFixture) -> str:
    """The images that `show` returns are finite and have the extent of the crop."""
    built = fixture.new()
    built.reseed()
    (batch,) = built.batches(1)
    images = built.method.eval().show(batch)
    if wrong := wrong_images(images):
        raise CheckError(wrong)
    for name, image in images.items():
        if image.shape[2:] != batch["image"].shape[2:] or not image.float().isfinite().all():
            raise CheckError(f"show gives {name!r} of shape {tuple(image.shape)}: give finite (N, C, x, y, z)")
    return ", ".join(images) or "nothing to show"


CHECKS: dict[str, Callable[[MethodFixture], str]] = {
    "transform": check_transform,
    "finite losses": check_losses,
    "gradients": check_gradients,
    f"loss falls, {STEPS} steps": check_learns,
    "same seed": check_same_seed,
    "state": check_state,
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


def _shorten(keys: Sequence[str]) -> str:
    """The first three keys, and the number of the others."""
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
