"""A teacher copies the encoder, gets no gradient, draws no dropout, and follows the student."""

import pytest
import torch
from torch import nn

from backbones.unet import UNet
from harness import follow, new_teacher


def unet(**settings):
    torch.manual_seed(0)
    return UNet(UNet.Config(features=(4, 4, 8, 8, 16), **settings), in_channels=1)


def test_a_teacher_is_the_encoder_with_weights_of_its_own():
    student = unet(dropout=0.5)
    teacher, image = new_teacher(student), torch.rand(2, 1, 32, 32, 32)
    assert set(teacher.state_dict()) == {key for key in student.state_dict() if student.part_of(key) == "encoder"}
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert torch.equal(teacher.encode(image)[-1], teacher.encode(image)[-1])  # in training mode
    assert torch.equal(teacher.encode(image)[-1], student.eval().encode(image)[-1])
    with torch.no_grad():
        next(student.parameters()).add_(1)
    assert not torch.equal(next(student.parameters()), next(teacher.parameters()))


def test_it_follows_parameters_by_name_and_copies_buffers():
    teacher = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    student = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    student(torch.rand(8, 2))
    before = {name: value.detach().clone() for name, value in teacher.named_parameters()}
    follow(teacher, student, 0.9)
    of_student = dict(student.named_parameters())
    for name, value in teacher.named_parameters():
        torch.testing.assert_close(value, 0.9 * before[name] + 0.1 * of_student[name])
    assert torch.equal(teacher[1].running_mean, student[1].running_mean)
    assert int(teacher[1].num_batches_tracked) == 1
    with pytest.raises(KeyError):
        follow(student, teacher, 0.9)
