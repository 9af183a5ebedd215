"""The same voxels at the same place, in every format."""

import gzip
import struct

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from harness import UserError
from harness.data.image_files import read_header, read_image, write_label

NIFTI_BYTES = nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)).to_bytes()


@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".mhd", ".nii.gz"])
def test_formats_place_voxels_alike(ending, tmp_path):
    """The same oblique, anisotropic image in every format: the same voxels at the same place."""

    rng = np.random.default_rng(0)
    voxels = rng.integers(-1000, 2000, (7, 6, 5)).astype(np.int16)
    image = sitk.GetImageFromArray(voxels.transpose())
    image.SetSpacing((0.7, 0.8, 2.5))
    image.SetOrigin((10.0, -20.0, 30.0))
    turn = sitk.Euler3DTransform()
    turn.SetRotation(0.1, -0.2, 0.3)
    image.SetDirection(turn.GetMatrix())
    path = tmp_path / f"x{ending}"
    sitk.WriteImage(image, str(path))
    found, affine = read_image(path)
    assert np.array_equal(found, voxels)
    for index in [(0, 0, 0), (6, 5, 4), (3, 0, 2)]:
        left, back, up = image.TransformIndexToPhysicalPoint(index)
        assert np.allclose(affine @ [*index, 1], [-left, -back, up, 1], atol=1e-4)


def test_slope_and_intercept_are_applied(tmp_path):

    image = nib.Nifti1Image(np.arange(27, dtype=np.int16).reshape(3, 3, 3), np.eye(4))
    image.header.set_slope_inter(0.5, -3)
    data = image.to_bytes()
    # nibabel would scale back on writing: the slope goes into the bytes.
    header = bytearray(data)
    struct.pack_into("<2f", header, 112, 0.5, -3.0)
    path = tmp_path / "x.nii"
    path.write_bytes(bytes(header))
    stored = np.asarray(nib.load(path).dataobj.get_unscaled())
    assert np.allclose(read_image(path)[0], stored * 0.5 - 3)


def test_a_tilted_gantry_is_written_so_that_it_can_be_read(tmp_path):
    affine = np.diag([1.0, 1, 5, 1])
    affine[1, 2] = 1.5
    label = np.zeros((20, 20, 20), np.uint8)
    label[3:9] = 1
    write_label(tmp_path / "x.nii.gz", label, affine)
    voxels, found = read_image(tmp_path / "x.nii.gz")
    assert np.array_equal(voxels, label)
    assert np.allclose(found, affine)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.nii.gz", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
        ("a.nii", b"\xef\xbb\xbf<!DOCTYPE html><html></html>", "web page"),
        ("a.nii.gz", b"\0" * 128 + b"DICM" + b"\0" * 400, "DICOM file: convert .* dcm2niix"),
        ("a.nii", gzip.compress(NIFTI_BYTES, mtime=0), "compressed with gzip: name it .nii.gz"),
        ("a.nii.gz", NIFTI_BYTES, "not compressed: name it .nii"),
        ("a.nii.gz", b"PK\x03\x04" + b"\0" * 400, "zip archive: unpack it"),
        ("a.mha", b"<html>", "web page"),
    ],
    ids=["LFS", "page", "DICOM", "gzip", "plain", "zip", "page as MetaImage"],
)
def test_an_image_that_is_something_else_is_called_what_it_is(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_header(tmp_path / name)


def test_a_compressed_file_whose_checksum_is_wrong_is_refused(tmp_path):
    """A flipped bit changes half of the voxels; nibabel stops before the checksum and tells nobody."""
    path = tmp_path / "a.nii.gz"
    voxels = np.random.default_rng(0).integers(0, 900, (20, 20, 20)).astype(np.int16)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)
    assert np.array_equal(read_image(path)[0], voxels)
    content = bytearray(path.read_bytes())
    content[-8] ^= 1  # of the checksum itself, so that the voxels can be read
    path.write_bytes(content)
    assert np.array_equal(np.asarray(nib.load(path).dataobj), voxels)
    with pytest.raises(UserError, match=r"CRC check failed.*restore the file"):
        read_image(path)


def test_a_file_without_the_name_of_an_image_is_said_to_be_none(tmp_path):
    (tmp_path / "notes.md").write_text("# Notes\n")
    with pytest.raises(
        UserError, match=r"notes\.md has not the name of an image: give one that ends in \.nii\.gz, \.nii, "
    ):
        read_header(tmp_path / "notes.md")
