"""A step is AdamW's under a cosine schedule, however its batch is dealt out; a bad one changes nothing."""

import copy
from math import cos, pi

import pytest
import torch
from torch import nn

from harness import UserError, gather, rand
from harness.api.global_batch import batch_parts
from harness.compute.processes import SingleProcess
from harness.config.schema import Training
from harness.training.trainer import FINITE, Trainer, divide_batch

CPU = torch.device("cpu")
STEPS, WARMUP, LR = 7, 3, 0.05


class Contrast(nn.Module):
    """A loss that compares crops, on features with noise that the engine draws."""

    def __init__(self):
        super().__init__()
        # No bias: the norm takes it out again, and AdamW would make steps of what rounding leaves of its gradient.
        self.layer, self.norm = nn.Conv3d(1, 4, 2, bias=False), nn.InstanceNorm3d(4, affine=True)
        self.generator = torch.Generator()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, batch):
        image = batch["image"]
        self.seen += image.detach().mean()
        noise = rand(image.shape, image.device, self.generator).to(image.dtype)
        features = gather(self.norm(self.layer(image + 0.1 * noise)).flatten(1))
        return {
            "contrast": torch.logsumexp(features @ features.T / 100, dim=1).mean(),
            "size": features.square().mean(),
        }


def new(module, micro_batches=1, skip=False, **changed):
    settings = {"steps": STEPS, "crop": 4, "batch_size": 4, "lr": LR, "weight_decay": 0.1, "precision": "fp32"}
    settings = Training(**(settings | {"channels_last": False} | changed))
    return Trainer(module, settings, STEPS, WARMUP, SingleProcess(CPU, micro_batches), seed=5, skip_nonfinite=skip)


def step(trainer, number, image, parts=1):
    trainer.clock.start()
    return trainer.step(number, [{"image": part} for part in image.chunk(parts)])


def batches(number=STEPS):
    torch.manual_seed(1)
    return torch.rand(number, 4, 1, 4, 4, 4, dtype=torch.float64)


@pytest.fixture
def module():
    torch.manual_seed(0)
    return Contrast().double()


class Plain(nn.Module):
    """A loss without draws, for torch's own loop."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Conv3d(1, 4, 2), nn.BatchNorm3d(4)

    def forward(self, batch):
        features = self.norm(self.layer(batch["image"]))
        return {"a": features[:, 0].square().mean(), "b": 0.5 * features.sin().mean()}


def test_steps_are_those_of_torchs_adamw_and_a_cosine():
    torch.manual_seed(0)
    module = Plain().double()
    theirs, trainer = copy.deepcopy(module), new(module, clip_norm=0.2)
    # As the schema says: biases and norms are left out of the weight decay.
    decayed, free = [theirs.layer.weight], [theirs.layer.bias, *theirs.norm.parameters()]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": free, "weight_decay": 0.0}], lr=LR, weight_decay=0.1)
    for number, image in enumerate(batches(), start=1):
        terms = step(trainer, number, image)
        rate = LR * number / WARMUP if number < WARMUP else LR * (1 + cos(pi * number / (STEPS + 1))) / 2
        assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(rate)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        expected = theirs({"image": image})
        sum(expected.values()).backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.2)
        assert float(trainer.gradient_norm) == pytest.approx(float(norm), rel=1e-6)
        optimizer.step()
        assert bool(terms.pop(FINITE))
        assert {k: float(v) for k, v in terms.items()} == {
            k: pytest.approx(v.item(), rel=1e-5) for k, v in expected.items()
        }
    for mine, other in zip(module.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_in_parts_is_the_same_step(parts, module):
    other = copy.deepcopy(module)
    whole, dealt = new(module), new(other, micro_batches=parts)
    for number, image in enumerate(batches(3), start=1):
        first, second = step(whole, number, image), step(dealt, number, image, parts)
        for name, term in first.items():
            torch.testing.assert_close(second[name], term, rtol=1e-6, atol=0)
    for mine, theirs in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


class PerCrop(nn.Module):
    """A mean over crops, which parts of a batch compute on their own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv3d(1, 2, 1)

    def forward(self, batch):
        return {"sine": self.layer(batch["image"]).sin().mean(), "square": self.layer(batch["image"]).square().mean()}


def test_terms_are_means_over_the_parts():
    torch.manual_seed(0)
    module = PerCrop().double()
    other, image = copy.deepcopy(module), batches(1)[0] * torch.arange(1, 5).view(4, 1, 1, 1, 1)
    first, second = step(new(module), 1, image), step(new(other, micro_batches=4), 1, image, 4)
    for name, term in first.items():
        torch.testing.assert_close(second[name], term, rtol=1e-6, atol=0)
    for mine, theirs in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


def test_the_methods_hook_sees_the_new_weights(module):
    """An EMA teacher follows what the step has made."""
    trainer, seen = new(module), []
    before = module.layer.weight.detach().clone()
    trainer.clock.start()
    trainer.step(
        4, [{"image": batches(1)[0]}], lambda number: seen.append((number, module.layer.weight.detach().clone()))
    )
    ((number, after),) = seen
    assert number == 4
    assert torch.equal(after, module.layer.weight)
    assert not torch.equal(after, before)


def test_a_step_depends_on_its_number_and_not_on_what_was_drawn_before(module):
    other, image = copy.deepcopy(module), batches(1)[0]
    first = step(new(module), 2, image)["contrast"]
    torch.manual_seed(123)
    torch.rand(17)
    again, trainer = copy.deepcopy(other), new(other)
    assert torch.equal(step(trainer, 2, image)["contrast"], first)
    assert not torch.equal(step(new(again), 3, image)["contrast"], first)


@pytest.mark.parametrize("skip", [True, False])
def test_a_step_that_is_not_finite_leaves_the_weights_and_all_later_steps_too_unless_it_is_skipped(skip, module):
    trainer, images = new(module, skip=skip), batches(3)
    step(trainer, 1, images[0])
    before = copy.deepcopy(trainer.state())
    images[1, 2, 0, 0, 0, 0] = float("nan")
    assert not bool(step(trainer, 2, images[1])[FINITE])
    for name, value in module.named_parameters():
        assert torch.equal(value, before["module"][name])
    # What a forward pass wrote is put back where training goes on.
    assert torch.equal(module.seen, before["module"]["seen"]) == skip
    assert bool(step(trainer, 3, images[2])[FINITE]) or not skip
    moved = not torch.equal(module.layer.weight, before["module"]["layer.weight"])
    assert moved == skip


def test_a_state_goes_on_where_it_was_taken(module):
    images, other = batches(4), copy.deepcopy(module)
    whole = new(module)
    for number in (1, 2):
        step(whole, number, images[number])
    state = copy.deepcopy(whole.state())
    later = new(other)
    later.load(state)
    for trainer in (whole, later):
        step(trainer, 3, images[3])
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))
    with pytest.raises((RuntimeError, ValueError, KeyError)):
        new(nn.Linear(2, 2)).load(state)


class Numbers:
    def __len__(self):
        return 23

    def __getitem__(self, index):
        return index


class SecondOfTwo(SingleProcess):
    num_processes, process_index = 2, 1


def test_each_process_reads_its_rows_in_their_order(module):
    assert [rows.tolist() for rows in new(module).loader(Numbers(), start=8)] == [
        [8, 9, 10, 11],
        [12, 13, 14, 15],
        [16, 17, 18, 19],
    ]
    trainer = new(module, micro_batches=2)
    assert [rows.tolist() for rows in trainer.loader(Numbers(), start=16)] == [[16, 17], [18, 19], [20, 21]]
    trainer.parts = divide_batch(module, trainer.settings, SecondOfTwo(CPU, 2))
    assert [rows.tolist() for rows in trainer.loader(Numbers(), start=8)] == [[9], [11], [13], [15], [17], [19], [21]]


def test_what_would_change_the_result_is_refused(module):
    with pytest.raises(UserError, match="batch norm needs the whole batch at once"):
        new(nn.Sequential(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2)), micro_batches=2)
    with pytest.raises(UserError, match="cannot be dealt out evenly over 1 processes with 3 micro-batches"):
        new(module, micro_batches=3)


class Two:
    num_processes, process_index, gradient_accumulation_steps = 2, 1, 2


def settings(batch_size):
    return Training(steps=1, crop=32, batch_size=batch_size, lr=0.1, weight_decay=0)


def test_batches_that_cannot_be_dealt_out_evenly():
    parts = divide_batch(torch.nn.Linear(1, 1), settings(8), Two())
    assert (parts.num_parts, parts.index) == (4, 1)
    parts.begin(1)
    assert parts.index == 3
    with pytest.raises(UserError, match="multiples of 4"):
        divide_batch(torch.nn.Linear(1, 1), settings(6), Two())


def test_the_gradient_norm_of_a_step_is_that_before_clipping(module):
    reference = copy.deepcopy(module)
    trainer = new(module, clip_norm=1e-3)
    image = batches(1)[0]
    step(trainer, 1, image)
    reseeded = new(reference, clip_norm=1e-3)
    with batch_parts(reseeded.parts):
        reseeded.seed_step(1)
        sum(reference({"image": image}).values()).backward()
    norm = sum(float(parameter.grad.square().sum()) for parameter in reference.parameters()) ** 0.5
    assert norm > 1e-3
    assert float(trainer.gradient_norm) == pytest.approx(norm, rel=1e-6)
