"""A teacher: a copy of the student's encoder that follows it as an exponential moving average (Tarvainen and Valpola 2017)."""

import copy

import torch
from torch import nn

from harness.api.backbone import Backbone


def new_teacher(backbone: Backbone) -> Backbone:
    """A copy of the encoder of `backbone`, with its weights, without gradients, and without decoder and head.

    It draws no dropout, even where the student does: its outputs are targets, and noise in them is learned.
    """
    teacher = copy.deepcopy(backbone).requires_grad_(False)
    teacher.dropout = nn.Identity()
    for child in (*backbone.parts["decoder"], *backbone.parts["head"]):
        if hasattr(teacher, child):
            delattr(teacher, child)
    return teacher


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move every parameter of `teacher` towards that of the same name in `student`: momentum * old + (1 - momentum) * new.

    Buffers are statistics and not learned, so they are copied. The student may have more of both.
    """
    parameters, buffers = dict(student.named_parameters()), dict(student.named_buffers())
    for name, parameter in teacher.named_parameters():
        parameter.lerp_(parameters[name], 1 - momentum)
    for name, buffer in teacher.named_buffers():
        buffer.copy_(buffers[name])
