"""What the tests of the methods that mask share."""

import numpy as np
import pytest
import torch

from harness import UserError, random_patches, to_voxels
from tests.methods.parts import generator


def make(method, backbone, **settings):
    made = method(method.Config(**settings), backbone()).eval()
    made.generator = generator()
    return made


def hidden_by(made, image):
    """The mask that the next forward draws."""
    state = made.generator.get_state()
    patches = random_patches(image, made.config.patch, made.config.mask_ratio, made.generator)
    made.generator.set_state(state)
    return to_voxels(patches, made.config.patch)


def keep(forward, kept):
    def call(features):
        kept.append(forward(features))
        return kept[-1]

    return call


def keep_argument(function, kept):
    def call(argument):
        kept.append(argument)
        return function(argument)

    return call


def check_mask(made, image, masked):
    """In each sample its own choice of so many patches of 16 voxels, drawn from the run's generator."""
    mask = hidden_by(made, image)
    patches = mask[:, 0, ::16, ::16, ::16]
    assert torch.equal(mask[:, 0], torch.from_numpy(np.kron(patches.numpy(), np.ones((1, 16, 16, 16)))).bool())
    assert (patches.flatten(1).sum(dim=1) == masked).all()
    assert not torch.equal(patches[0], patches[1])
    seen = made.show({"image": image})["what it sees"]
    assert torch.equal(seen, torch.where(mask, 0, image))
    made.generator.manual_seed(1)
    assert not torch.equal(hidden_by(made, image), mask)


def check_loss(made, image, restored, error):
    """The loss is the mean of `error` over the masked voxels of all channels, and everything that restores learns."""
    mask = hidden_by(made, image).expand_as(image).numpy()
    made.generator.manual_seed(0)
    (loss,) = made({"image": image}).values()
    expected = error(restored.detach().numpy().astype(np.float64) - image.numpy())[mask].mean()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    for name, parameter in made.named_parameters():
        part = "" if not name.startswith("backbone.") else made.backbone.part_of(name.removeprefix("backbone."))
        learns = parameter.grad is not None and parameter.grad.abs().sum() > 0
        # Instance norm takes the biases of convolutions away, so that their gradients are only nearly 0.
        assert learns == (part in ("", *made.trains)) or name.endswith("bias"), name
    assert {made.backbone.part_of(key) for key in made.weights()} == set(made.trains)


def check_refusals(method, backbone, refused):
    """Each of these settings is refused for a crop of 32 x 64 x 32, with these words; the defaults are not."""
    make(method, backbone).check((32, 64, 32), 2)
    for settings, says in refused:
        with pytest.raises(UserError, match=says):
            make(method, backbone, **settings).check((32, 64, 32), 2)
