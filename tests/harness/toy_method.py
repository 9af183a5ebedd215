"""A method in a file that keeps the contract, and each way to break it."""

from harness.conformance.fixture import STEPS

TOY = '''
import os
from functools import partial

import numpy as np
import torch
from harness import Method, randn, Settings

class Noise(Settings):
    noise: float = 0.1

def shift_with(model, sample, rng):
    return sample

def unseeded(image):
    return torch.from_numpy(np.random.standard_normal(image.shape)).float()

def count(method):
    method.calls = getattr(method, "calls", 0) + 1
    return method.calls

@torch.no_grad()
def meddle(method, step):
    next(method.backbone.parameters()).add_(1)

def shift(sample, rng):
    return {**sample, "image": sample["image"] + rng.random()}

class Toy(Method):
    """Denoise."""
    name = "toy"
    Config = Noise

    def __init__(self, config, backbone):
        super().__init__(config, backbone)
        self.restore = torch.nn.Conv3d(backbone.width, backbone.in_channels, 1)

    @classmethod
    def transform(cls, config):
        return shift

    def forward(self, batch):
        image = batch["image"]
        noise = randn(image.shape, image.device, self.generator)
        features = self.backbone.decode(self.backbone.encode(image + noise))
        return {"denoise": (self.restore(features) - image).square().mean()}
'''


FAULTS = {
    "nan": (
        ".square().mean()}",
        ".square().mean() * float('nan')}",
        "finite losses",
        "is nan",
    ),
    "gradient of nan": (
        ".square().mean()}",
        ".square().mean() + (features * 0).sum().sqrt()}",
        "gradients",
        "look for a division by 0 or a logarithm of 0",
    ),
    "not a scalar": (
        ".square().mean()}",
        ".square()}",
        "finite losses",
        "not a scalar",
    ),
    "no gradient": (
        ".square().mean()}",
        ".square().mean().detach()}",
        "finite losses",
        "no term has a gradient",
    ),
    "dead head": (
        "1)\n\n    @",
        "1)\n        self.unused = torch.nn.Linear(2, 2)\n\n    @",
        "gradients",
        "no gradient reaches unused",
    ),
    "decoder not used": (
        "self.backbone.decode(self.backbone.encode(image + noise))",
        "self.backbone.encode(image + noise)[0]",
        "gradients",
        "no gradient reaches backbone.down_1",
    ),
    "frozen part trained": (
        'name = "toy"',
        'name = "toy"\n    trains = ("decoder",)\n    after_step = meddle',
        "gradients",
        "have changed",
    ),
    "does not learn": (
        "(self.restore(features) - image).square().mean()",
        "features.sum() * 0 + torch.rand(()) + self.restore(features).sum() * 0",
        f"loss falls, {STEPS} steps",
        "does not fall",
    ),
    "global randomness": (
        "randn(image.shape, image.device, self.generator)",
        "unseeded(image)",
        "same seed",
        "self.generator",
    ),
    "state outside": (
        ".square().mean()}",
        ".square().mean() * count(self)}",
        "state",
        "keep what counts",
    ),
    "state that a checkpoint lacks": (
        ".square().mean()}",
        ".square().mean() * count(self)}",
        "resume",
        "a resumed training ends with another",
    ),
    "draws for its own rows only": (
        "randn(image.shape, image.device, self.generator)",
        "torch.randn(image.shape, generator=self.generator)",
        "micro-batches",
        "draw with harness.rand or harness.randn",
    ),
    "counts its own rows only": (
        ".square().mean()}",
        ".square().sum() / (image > 0.5).sum()}",
        "micro-batches",
        "harness.gather and harness.total",
    ),
    "lambda": (
        "return shift",
        "return lambda sample, rng: sample",
        "transform",
        "cannot be pickled",
    ),
    "transform with numpy's generator": (
        "+ rng.random()",
        "+ np.random.random()",
        "transform",
        "draws from numpy.random, which no seed fixes",
    ),
    "transform of another shape": (
        'return {**sample, "image": sample["image"] + rng.random()}',
        'return {**sample, "image": np.rot90(sample["image"], rng.integers(2), (1, 2)).copy()}',
        "transform",
        "need equal keys and shapes",
    ),
    "transform that adds a key at times": (
        'return {**sample, "image": sample["image"] + rng.random()}',
        'return {**sample, "x": 1} if rng.random() > 0.5 else sample',
        "transform",
        "need equal keys and shapes",
    ),
    "transform that returns nothing": (
        'return {**sample, "image": sample["image"] + rng.random()}',
        'sample["image"] += 1',
        "transform",
        "returned NoneType: return the sample",
    ),
    "transform with a model": (
        "return shift",
        "return partial(shift_with, torch.nn.Linear(1, 1))",
        "transform",
        "holds a Linear",
    ),
    "worker": (
        "+ rng.random()",
        "+ os.getpid()",
        "loader worker",
        "gives another image",
    ),
    "one sample": (
        ".square().mean()}",
        ".square().mean() / (1 if len(image) > 1 else image[1])}",
        "batch sizes",
        "1: IndexError",
    ),
}


def write_toy(tmp_path, old="", new=""):
    """The toy, with a part of its text replaced by another; the path of its file."""
    plugin = tmp_path / "toy.py"
    assert old in TOY
    plugin.write_text(TOY.replace(old, new, 1) if old else TOY)
    return str(plugin)
