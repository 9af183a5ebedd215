"""No pre-training: the control that every other method is compared with."""

from harness import Method


class Scratch(Method):
    """Random initialisation, no pre-training: the matched control of every table."""

    name = "scratch"
    reference = "the control of every comparison"
    trains = ()
