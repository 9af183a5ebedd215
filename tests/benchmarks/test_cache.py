"""Random 96^3 crops of a 512 x 512 x 200 volume: our cache against its peers, in one run; `pytest -m benchmark -s`.

Everything is in the page cache, as it is in training after the first pass where memory suffices.
"""

import multiprocessing
import os
import resource
import time
from dataclasses import replace
from pathlib import Path

import blosc2
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import PersistentDataset
from monai.transforms import Compose, RandSpatialCropd, ToTensord
from scipy import ndimage

from harness.api.registry import Registry
from harness.api.task import Case
from harness.compute.memory import peak_memory
from harness.data import volumes
from harness.data.phantom import make_phantom
from harness.data.preprocessing import STEPS, quantise
from harness.data.volumes import Volume, preprocess_cases
from harness.system.files import digest_file
from tests.benchmarks.test_speed import fastest

pytestmark = pytest.mark.benchmark

SHAPE, EDGE, CROPS = (512, 512, 200), 96, 40
# What nnU-Net v2 (July 2026) chooses for this shape and a patch of 96^3 in float32: LZ4HC at level 5, these chunks and
# blocks, and the better of no filter and shuffle; one thread per reader, memory-mapped.
BLOCKS, CHUNKS = (1, 32, 32, 32), (1, 128, 128, 96)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """One CT-like volume (1, x, y, z) in [0, 1], in every format."""
    folder = tmp_path_factory.mktemp("cache")
    rng = np.random.default_rng(0)
    smooth = ndimage.gaussian_filter(rng.standard_normal(SHAPE).astype(np.float32), 4)
    x, y = np.indices(SHAPE[:2], dtype=np.float32)
    body = (((x - 256) / 220) ** 2 + ((y - 256) / 160) ** 2 < 1)[..., None]
    noise = 0.02 * rng.standard_normal(SHAPE).astype(np.float32)
    image = np.where(body, 0.5 + 0.1 * smooth / smooth.std() + noise, 0.001).clip(0.001, 1).astype(np.float32)[None]
    np.save(folder / "volume.image.npy", quantise(image))
    np.save(folder / "float32.npy", image)
    sizes = {}
    for name in ("NOFILTER", "SHUFFLE"):
        place = folder / f"{name}.b2nd"
        params = {"codec": blosc2.Codec.LZ4HC, "clevel": 5, "nthreads": 2, "filters": [blosc2.Filter[name]]}
        blosc2.asarray(image, urlpath=str(place), chunks=CHUNKS, blocks=BLOCKS, cparams=params)
        sizes[place] = place.stat().st_size
    torch.save({"image": torch.from_numpy(image)}, folder / "source.pt")
    return folder, image, min(sizes, key=sizes.__getitem__)


def origins():
    rng = np.random.default_rng(1)
    return [[int(rng.integers(0, edge - EDGE + 1)) for edge in SHAPE] for _ in range(CROPS)]


def ours(folder):
    volume = Volume(Case("x", (), None), folder / "volume")

    def every():
        for origin in origins():
            volume.crop(origin, (EDGE,) * 3)

    return every


def test_crops_against_persistent_dataset(stored, benchmark, claim, tmp_path):
    folder, image, _ = stored
    crop = RandSpatialCropd("image", (EDGE,) * 3, random_size=False)
    load = Compose([_Load(), ToTensord("image"), crop])
    data = PersistentDataset([{"image": str(folder / "source.pt")}], load, cache_dir=tmp_path / "monai")
    theirs = fastest(lambda: [data[0] for _ in range(3)]) / 3
    benchmark.pedantic(ours(folder), rounds=5, warmup_rounds=1)
    mine = benchmark.stats.stats.min / CROPS
    print(f"crop of 96^3: PersistentDataset {theirs * 1000:.1f} ms, ours {mine * 1000:.2f} ms")
    claim("crop of 96^3: MONAI's PersistentDataset / ours", theirs / mine, at_least=10)
    volume = Volume(Case("x", (), None), folder / "volume")
    for x, y, z in origins():
        found = volume.crop((x, y, z), (EDGE,) * 3)
        assert np.abs(found - image[:, x : x + EDGE, y : y + EDGE, z : z + EDGE]).max() <= 0.51 / STEPS


class _Load:
    """A deterministic first transform, whose result PersistentDataset keeps on disk."""

    def __call__(self, item):
        return torch.load(item["image"], weights_only=True)


def test_crops_against_blosc2_as_nnunet_configures_it(stored, benchmark, claim):
    folder, _, place = stored
    blosc2.set_nthreads(1)

    def theirs():
        for x, y, z in origins():
            opened = blosc2.open(urlpath=str(place), mode="r", dparams={"nthreads": 1}, mmap_mode="r")
            opened[:, x : x + EDGE, y : y + EDGE, z : z + EDGE]

    other = fastest(theirs, rounds=5) / CROPS
    benchmark.pedantic(ours(folder), rounds=5, warmup_rounds=1)
    mine = benchmark.stats.stats.min / CROPS
    print(f"crop of 96^3: blosc2 {other * 1000:.2f} ms, ours {mine * 1000:.2f} ms")
    claim("crop of 96^3: blosc2 as nnU-Net configures it / ours", other / mine, at_least=1)


def test_crops_against_float32(stored, benchmark, claim):
    """Half the space costs no more than a little time."""
    folder, _, _ = stored

    def theirs():
        for x, y, z in origins():
            opened = np.load(folder / "float32.npy", mmap_mode="r")
            np.array(opened[:, x : x + EDGE, y : y + EDGE, z : z + EDGE])

    other = fastest(theirs, rounds=5) / CROPS
    benchmark.pedantic(ours(folder), rounds=5, warmup_rounds=1)
    mine = benchmark.stats.stats.min / CROPS
    print(f"crop of 96^3: float32 memory-mapped {other * 1000:.2f} ms, ours {mine * 1000:.2f} ms")
    claim("crop of 96^3: float32 memory-mapped / ours", other / mine, at_least=0.4)


def test_formats_side_by_side(stored):
    """The table of docs/data.md: a crop from the page cache, a crop from the disk, and the size."""
    folder, _, place = stored

    def from_blosc2(x, y, z):
        opened = blosc2.open(urlpath=str(place), mode="r", dparams={"nthreads": 1}, mmap_mode="r")
        return opened[:, x : x + EDGE, y : y + EDGE, z : z + EDGE]

    def from_float32(x, y, z):
        return np.array(np.load(folder / "float32.npy", mmap_mode="r")[:, x : x + EDGE, y : y + EDGE, z : z + EDGE])

    volume = Volume(Case("x", (), None), folder / "volume")
    ours = folder / "volume.image.npy"
    formats = {
        "int16, memory-mapped (ours)": (ours, lambda *origin: volume.crop(origin, (EDGE,) * 3)),
        "float32, memory-mapped": (folder / "float32.npy", from_float32),
        "blosc2 as nnU-Net v2": (place, from_blosc2),
    }
    for name, (path, crop) in formats.items():

        def every(crop=crop):
            for origin in origins():
                crop(*origin)

        hot = fastest(every, rounds=5) / CROPS
        cold = []
        for origin in origins()[:12]:
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            began = time.perf_counter()
            crop(*origin)
            cold.append(time.perf_counter() - began)
        size = path.stat().st_size / 2**20
        print(f"| {name} | {hot * 1000:.2f} ms | {np.median(cold) * 1000:.1f} ms | {size:.0f} MiB |")
        assert hot < np.median(cold)


def _worker(folder, number, start, pipe):
    """Crops of many volumes, kept; then how much the peak memory grew, in MiB."""
    volumes = [Volume(Case(str(n), (), None), Path(folder) / f"v{n}") for n in range(number)]
    rng = np.random.default_rng(start)
    volumes[start].sample((EDGE,) * 3, rng)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kept = [volume.sample((32,) * 3, rng) for volume in volumes]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    pipe.send((grown, sum(sample["image"].nbytes for sample in kept) / 2**20))


def test_workers_touch_pages_not_volumes(tmp_path):
    """200 volumes of 512 MiB each (sparse files) in two workers at once: memory grows by what crops touch."""
    number, shape = 200, (1, 512, 512, 1024)
    header = np.lib.format.header_data_from_array_1_0(np.empty(shape, np.int16, order="C")[:0]) | {"shape": shape}
    for n in range(number):
        with (tmp_path / f"v{n}.image.npy").open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + 2 * int(np.prod(shape)))
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for worker in range(2):
        here, there = context.Pipe()
        processes.append(context.Process(target=_worker, args=(str(tmp_path), number, worker, there)))
        processes[-1].start()
        pipes.append(here)
    grown = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join()
    print(f"two workers grew by {grown[0][0]:.0f} and {grown[1][0]:.0f} MiB for crops of 200 volumes of 512 MiB")
    assert max(peak for peak, _ in grown) < 150


@pytest.mark.slow
def test_preparing_uses_all_cores_in_three_gib(tmp_path):
    """100 abdominal CTs of 512 x 512 x 100 at 0.8 x 0.8 x 3 mm with thirteen organs, prepared in a process of its own."""
    images, label = make_phantom(Registry().task("btcv"), np.random.default_rng(0))
    zoom = [new / old for new, old in zip((512, 512, 100), label.shape, strict=True)]
    for name, voxels, order in (("image", images[0], 1), ("label", label, 0)):
        grown = ndimage.zoom(voxels, zoom, order=order, mode="nearest", grid_mode=True)
        nib.save(nib.Nifti1Image(grown, np.diag([0.8, 0.8, 3.0, 1.0])), tmp_path / f"{name}.nii.gz")
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_prepare_many, args=(str(tmp_path), there))
    process.start()
    seconds, cores, peak = here.recv()
    process.join()
    print(f"100 CTs prepared in {seconds:.0f} s on {cores:.2f} cores, peak {peak:.2f} GiB")
    assert peak < 3
    assert cores > 0.7 * len(os.sched_getaffinity(0))


def _prepare_many(folder, pipe):
    root = Path(folder)
    cases = [Case(f"c{n}", (root / "image.nii.gz",), root / "label.nii.gz") for n in range(100)]
    task = replace(Registry().task("btcv"), name="many")
    # The cases are one file under many names: it is read again as for a digest, which is not compared.
    volumes.check_unchanged = lambda volume: [digest_file(path) for path in volume.case.files]
    before = resource.getrusage(resource.RUSAGE_SELF)
    began = time.perf_counter()
    preprocess_cases(task, cases, {case.id: case.id.ljust(20, "x") for case in cases}, root / "cache")
    seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_SELF)
    busy = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    pipe.send((seconds, busy / seconds, peak_memory(torch.device("cpu"))["host_peak_gib"]))
