"""What the tests of the methods that mask share."""

from harness import random_patches, to_voxels
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
