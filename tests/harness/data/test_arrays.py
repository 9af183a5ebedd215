"""Crops against NumPy's padding, and files that hold arrays and nothing else."""

import errno
import resource

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import cut
from harness.data.arrays import load_array, origins, random_origin, save_array

EDGE = st.integers(1, 7)
TRIPLE = st.tuples(EDGE, EDGE, EDGE)
WIDE = 20  # more than any crop reaches outside


@given(shape=TRIPLE, size=TRIPLE, origin=st.tuples(*[st.integers(-9, 12)] * 3), seed=st.integers(0, 9))
def test_a_crop_is_a_slice_of_the_padded_array(shape, size, origin, seed):
    array = np.random.default_rng(seed).integers(1, 30_000, (2, *shape)).astype(np.uint16)
    padded = np.pad(array, [(0, 0)] + 3 * [(WIDE, WIDE)])
    expected = padded[(slice(None), *(slice(WIDE + o, WIDE + o + s) for o, s in zip(origin, size, strict=True)))]
    found = cut(array, origin, size)
    assert found.dtype == np.uint16
    assert np.array_equal(found, expected)
    scaled = cut(array, origin, size, scale=1 / 65535)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled, expected / 65535, rtol=1e-6)


def test_a_crop_is_a_copy():
    array = np.ones((1, 4, 4, 4), np.float32)
    cut(array, (0, 0, 0), (4, 4, 4))[:] = 0
    assert array.all()


def test_arrays_are_read_whole_or_mapped_and_never_unpickled(tmp_path):
    array = np.arange(24.0).reshape(2, 3, 4)
    np.save(tmp_path / "a.npy", array)
    assert np.array_equal(load_array(tmp_path / "a.npy"), array)
    mapped = load_array(tmp_path / "a.npy", mmap_mode="r")
    assert isinstance(mapped, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        mapped[0] = 1
    np.save(tmp_path / "b.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match="pickle"):
        load_array(tmp_path / "b.npy")


def test_crops_lie_inside_and_small_volumes_lie_inside_the_crop():
    assert origins((10, 4, 6), (4, 10, 6)) == ([0, -6, 0], [6, 0, 0])
    rng = np.random.default_rng(0)
    drawn = np.array([random_origin((10, 4, 6), (4, 10, 6), rng) for _ in range(1400)])
    for axis, values in enumerate((range(7), range(-6, 1), [0])):
        counts = np.array([(drawn[:, axis] == value).sum() for value in values])
        assert counts.sum() == 1400
        # Each origin is drawn about as often: 5 standard deviations of a binomial.
        assert np.abs(counts - 1400 / len(counts)).max() <= 5 * np.sqrt(1400 / len(counts))


def test_cut_fills_with_zeros_outside():
    array = np.arange(1, 28, dtype=np.float32).reshape(1, 3, 3, 3)
    crop = cut(array, (-1, 1, 0), (3, 4, 2))
    assert crop.shape == (1, 3, 4, 2)
    assert (crop[:, 0] == 0).all()
    assert (crop[:, :, 2:] == 0).all()
    assert np.array_equal(crop[:, 1:, :2], array[:, :2, 1:, :2])


@pytest.mark.parametrize(
    "damage",
    [(b"\x93NUMPY", b"PK\x03\x04UM"), (b"{", b"\0"), (b"}", b" "), (b"'descr'", b"  'descr"), (b"(3, 4)", b"(3, 4(")],
)
def test_a_damaged_header_is_a_value_error(damage, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((3, 4)))
    content = (tmp_path / "a.npy").read_bytes()
    assert damage[0] in content
    (tmp_path / "a.npy").write_bytes(content.replace(*damage))
    with pytest.raises(ValueError, match=r"header|mapping|descr|no array of NumPy"):
        load_array(tmp_path / "a.npy")


ARRAYS = {
    "rows": np.arange(24, dtype=np.int16).reshape(2, 3, 4),
    "columns": np.asfortranarray(np.arange(24, dtype=np.float32).reshape(2, 3, 4)),
    "neither": np.arange(24, dtype=np.uint8).reshape(2, 3, 4).transpose(1, 2, 0)[:, ::2],
    "empty": np.zeros((0, 4), np.int32),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_an_array_is_written_as_numpy_writes_it(kind, tmp_path):
    save_array(tmp_path / "ours.npy", ARRAYS[kind])
    np.save(tmp_path / "theirs.npy", ARRAYS[kind])
    assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "theirs.npy").read_bytes()


@pytest.mark.parametrize("kind", ["rows", "columns", "neither"])
def test_a_disk_that_takes_no_more_is_said_with_its_reason(kind, tmp_path):
    """A limit on the size of files stands for a quota: both end a write in its midst."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (130, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            save_array(tmp_path / "ours.npy", np.tile(ARRAYS[kind], (40, 1, 1)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(tmp_path / "ours.npy"))
    assert not list(tmp_path.iterdir())
