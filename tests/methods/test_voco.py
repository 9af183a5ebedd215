"""VoCo: overlaps are those of the crops, the teacher moves, the losses separate."""

import pytest
import torch

from harness import UserError
from methods.voco import VoCo, orthogonality, overlap_losses
from tests.methods.parts import generator, images, swin, unet


def make(backbone=unet, **settings):
    made = VoCo(VoCo.Config(**{"grid": (2, 4, 1), "projection": 32} | settings), backbone())
    made.generator = generator()
    return made


def test_overlaps_are_counted_voxels():
    made, image = make(crops=5), images()
    start, overlap = made.draw_crops(image)
    cell = (16, 16, 32)
    owner = torch.arange(8).view(2, 4, 1)
    for axis, edge in enumerate(cell):
        owner = owner.repeat_interleave(edge, dim=axis)
    for n in range(2):
        for k in range(5):
            spans = tuple(slice(int(a), int(a) + edge) for a, edge in zip(start[n, k], cell, strict=True))
            counted = torch.bincount(owner[spans].flatten(), minlength=8) / 16 / 16 / 32
            torch.testing.assert_close(overlap[n, k].float(), counted)
    torch.testing.assert_close(overlap.sum(dim=-1), torch.ones(2, 5))


def test_a_view_at_its_own_size_is_the_crop_itself():
    made, image = make(view=(16, 16, 32)), images(2, channels=1)
    start, _ = made.draw_crops(image)
    views = made.cut(image, start)
    for n in range(2):
        for k in range(2):
            x, y, z = (int(v) for v in start[n, k])
            torch.testing.assert_close(views[n, k], image[n, :, x : x + 16, y : y + 16, z : z + 32], atol=1e-5, rtol=0)


def test_the_teacher_follows_the_student_with_momentum():
    """A port without a moving teacher has a flat loss (MIC-DKFZ/nnssl#22)."""
    made = make(momentum=0.9)
    key = "conv_0.conv_0.conv.weight"
    teacher, student = made.teacher_backbone.get_parameter(key), made.backbone.get_parameter(key)
    with torch.no_grad():
        before = teacher.clone()
        student.add_(1.0)
    made.after_step(1)
    torch.testing.assert_close(teacher, before + 0.1)
    projector = made.teacher_projector[0].weight
    with torch.no_grad():
        made.projector[0].weight.fill_(2.0)
        projector.fill_(1.0)
    made.after_step(2)
    torch.testing.assert_close(projector, torch.full_like(projector, 1.1))


def test_the_teacher_gets_no_gradient_and_no_decoder():
    made = make()
    sum(made({"image": images()}).values()).backward()
    teacher = [p for name, p in made.named_parameters() if name.startswith("teacher")]
    assert teacher
    assert all(p.grad is None and not p.requires_grad for p in teacher)
    assert not any("upcat" in name for name, _ in made.teacher_backbone.named_parameters())


def test_losses_separate_overlaps():
    overlap = torch.tensor([[[0.75, 0.25, 0.0, 0.0]]])
    right, flat, wrong = overlap.clone(), torch.full_like(overlap, 0.25), overlap.flip(-1)
    losses = [sum(overlap_losses(overlap, likeness)).item() for likeness in (right, flat, wrong)]
    assert losses[0] == pytest.approx(0, abs=1e-4)
    assert losses[0] < losses[1] < losses[2]


def test_losses_are_those_of_the_released_definition():
    overlap, likeness = torch.tensor([[[0.6, 0.4, 0.0]]]), torch.tensor([[[0.1, 0.9, 0.3]]])
    near, apart = overlap_losses(overlap, likeness)
    expected = -(0.6 * torch.log(torch.tensor(0.5)) + 0.4 * torch.log(torch.tensor(0.5)))
    assert near.item() == pytest.approx(expected.item(), rel=1e-4)
    assert apart.item() == pytest.approx(0.09, rel=1e-4)


def test_bases_are_pushed_apart():
    assert orthogonality(torch.eye(4)[None]).item() == pytest.approx(0, abs=1e-6)
    same = torch.ones(1, 4, 8, requires_grad=True)
    assert orthogonality(same).item() == pytest.approx(1)
    opposed = torch.stack([torch.ones(8), -torch.ones(8)])[None]
    assert orthogonality(opposed).item() == 0


def test_training_makes_likeness_follow_overlap():
    """On one fixed batch the overlap loss must come down from its start, or the task cannot be learned."""
    made, image = make(), images()
    optimizer = torch.optim.Adam([p for p in made.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for step in range(40):
        made.generator = generator()
        terms = made({"image": image})
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        made.after_step(step)
        losses.append(terms["overlap"].item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("backbone", "settings", "says"),
    [
        (unet, {"grid": (3, 4, 1)}, "does not divide the crop"),
        (unet, {"grid": (1, 1, 1)}, "one base crop"),
        (unet, {"view": (16, 16, 24)}, "not a multiple of the deepest stride"),
        (unet, {"view": (16, 16, 16)}, "at least twice the stride"),
    ],
)
def test_settings_that_do_not_fit_are_refused(backbone, settings, says):
    with pytest.raises(UserError, match=says):
        make(backbone, **settings).check((32, 64, 32), 2)


def test_view_is_the_cell_rounded_up_to_strides():
    assert make()._view((32, 64, 32)) == (16, 16, 32)
    assert make(swin)._view((32, 64, 32)) == (32, 32, 32)
    assert make(grid=(4, 4, 1))._view((96, 96, 96)) == (32, 32, 96)
