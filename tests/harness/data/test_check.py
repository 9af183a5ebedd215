"""Every kind of bad input: what came, what is allowed and what to do, in one line; nothing already computed is lost."""

import gzip
import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from harness import UserError
from harness.api.task import Case
from harness.cli.main import main
from harness.data.phantom import write_phantom
from tests.conftest import small
from tests.harness.commands import harness
from tests.harness.spoilt import poke, rewrite

SPOILS, LOOK, FINE = "spoils a run", "deserves a look", "fine"


@dataclass(frozen=True)
class Kind:
    """How a data set is spoilt, and what is said of it: an error, a line in the check's tables, or nothing."""

    spoil: Callable[[Path, Case], Any]
    says: str
    verdict: str = SPOILS
    task: str = "msd_hippocampus"


def of_image(change, **more):
    return lambda root, case: rewrite(case.images[0], change, **more)


def of_label(change, **more):
    return lambda root, case: rewrite(case.label, change, **more)


def raw(offset: int, form: str, *values, codes=None):
    """Bytes of the header as other programs write them, which nibabel would refuse to."""

    def spoil(root, case):
        header = bytearray(gzip.decompress(case.images[0].read_bytes()))
        struct.pack_into(form, header, offset, *values)
        if codes is not None:
            struct.pack_into("<hh", header, 252, *codes)
        case.images[0].write_bytes(gzip.compress(bytes(header)))

    return spoil


def moved_label(change):
    def spoil(root, case):
        affine = nib.load(case.label).affine.copy()
        rewrite(case.label, lambda voxels: voxels, affine=change(affine))

    return spoil


def by_one_slice(affine):
    affine[2, 3] += affine[2, 2]
    return affine


def mirrored(affine):
    affine[0, 0] *= -1
    return affine


def turned_plane(affine):
    affine[:, [0, 1]] = affine[:, [1, 0]]
    return affine


def disagree(root, case):
    image = nib.load(case.images[0])
    other = image.affine.copy()
    other[:3, 3] += 7
    image.set_sform(image.affine, code=1)
    image.set_qform(other, code=1)
    nib.save(image, case.images[0])


def bytes_of(make):
    return lambda root, case: case.images[0].write_bytes(make(case.images[0].read_bytes()))


def in_the_place(make):
    def spoil(root, case):
        case.images[0].unlink()
        make(case.images[0])

    return spoil


def colour(root, case):
    voxels = np.zeros((8, 8, 8), dtype=np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), case.images[0])


def described(**changed):
    def spoil(root, case):
        path = root / "dataset.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    return spoil


def entry(**changed):
    def spoil(root, case):
        path = root / "dataset.json"
        content = json.loads(path.read_text())
        content["training"][0] |= changed
        path.write_text(json.dumps(content))

    return spoil


def twice(root, case):
    """One scan under two names: re-saved in another type, mirrored, with another origin."""
    other = sorted((root / "imagesTr").glob("*.nii.gz"))[0]
    image = nib.load(other)
    voxels = np.asarray(image.dataobj)[::-1].astype(np.float64)
    affine = image.affine.copy()
    affine[:3, 3] = 5
    nib.save(nib.Nifti1Image(voxels, affine), case.images[0])
    label = nib.load(str(other).replace("imagesTr", "labelsTr"))
    nib.save(nib.Nifti1Image(np.asarray(label.dataobj)[::-1].copy(), affine), case.label)


def odd_names(root, case):
    path = root / "dataset.json"
    content = json.loads(path.read_text())
    for place, name in zip(content["training"], ["a b", 'it\'s "x" <b>', "a, b; c", "Größe 大"], strict=True):
        for kind in ("image", "label"):
            new = f"./{Path(place[kind]).parent.name}/{name}.nii.gz"
            (root / place[kind]).rename(root / new)
            place[kind] = new
    path.write_text(json.dumps(content))


def scaled(root, case):
    """int16 with a slope, as scanners store floats."""
    image = nib.load(case.images[0])
    packed = nib.Nifti1Image(np.asarray(image.dataobj), image.affine)
    packed.set_data_dtype(np.int16)
    packed.header.set_slope_inter(*(None, None))
    nib.save(packed, case.images[0])


def other_shape(root, case):
    rewrite(case.images[2], lambda voxels: np.moveaxis(voxels, 0, 1).copy())


def other_place(root, case):
    affine = nib.load(case.images[1]).affine.copy()
    affine[0, 3] += 30
    rewrite(case.images[1], lambda voxels: voxels, affine=affine)


def mixed(root, case):
    old = case.images[0].parent
    shutil.copytree(old, root / "BraTS2021_00001")
    for path in (root / "BraTS2021_00001").iterdir():
        path.rename(path.with_name(path.name.replace(old.name, "BraTS2021_00001")))


KINDS = {
    # files
    "truncated gzip": Kind(bytes_of(lambda b: b[: len(b) // 2]), "cannot be read"),
    "wrong magic": Kind(raw(344, "4s", b"xxxx"), "cannot be read"),
    "no gzip": Kind(bytes_of(lambda b: b"not an image"), "cannot be read"),
    "gzip of something": Kind(bytes_of(lambda b: gzip.compress(b"x" * 1000)), "cannot be read"),
    "header only": Kind(bytes_of(lambda b: gzip.compress(gzip.decompress(b)[:352])), "cannot be read"),
    "half a header": Kind(bytes_of(lambda b: gzip.compress(gzip.decompress(b)[:100])), "cannot be read"),
    "zero bytes": Kind(bytes_of(lambda b: b""), "zero bytes"),
    "missing": Kind(in_the_place(lambda path: None), "is missing: restore it"),
    "dangling link": Kind(
        in_the_place(lambda path: path.symlink_to("/nowhere/x.nii.gz")), "is a link to /nowhere/x.nii.gz"
    ),
    "link to itself": Kind(in_the_place(lambda path: path.symlink_to(path.name)), "cannot be opened"),
    "folder named like a file": Kind(
        in_the_place(lambda path: path.mkdir()), "is a folder, where an image file is due"
    ),
    "claims 10^12 voxels": Kind(raw(40, "<4h", 3, 32000, 32000, 1000), "its header claims 32000 x 32000 x 1000 voxels"),
    # voxels
    "2D": Kind(of_image(lambda v: v[:, :, 5]), "expected a 3D or 4D image"),
    "single slice": Kind(of_image(lambda v: v[:, :, 5:6]), "single slice"),
    "4D for 3D": Kind(of_image(lambda v: np.stack([v, v], -1)), "2 channels, 'msd_hippocampus' has 1"),
    "3D for 4D": Kind(of_image(lambda v: v[..., 0]), "1 channels, 'msd_prostate' has 2", task="msd_prostate"),
    "4D label": Kind(of_label(lambda v: v[..., None]), "a label map has 3 dimensions"),
    "colour": Kind(colour, "colour or vector voxels"),
    "complex": Kind(of_image(lambda v: v.astype(np.complex64)), "of complex64"),
    "NaN": Kind(of_image(poke(np.nan)), "1 voxels are NaN or infinite"),
    "infinite": Kind(of_image(poke(np.inf)), "1 voxels are NaN or infinite"),
    "beyond float32": Kind(of_image(lambda v: poke(1e39)(v.astype(np.float64))), "beyond 3.4e+38"),
    "constant": Kind(of_image(lambda v: v * 0 + 7), "the same value 7"),
    "all zero": Kind(of_image(lambda v: v * 0), "the same value 0"),
    "negative values without a sign": Kind(
        of_image(lambda v: (v.astype(np.int32) % 65536).astype(np.uint16), dtype=np.uint16),
        "stored without a sign",
        task="msd_spleen",
    ),
    "CT rescaled to 0..1": Kind(
        of_image(lambda v: ((v - v.min()) / np.ptp(v)).astype(np.float32), dtype=np.float32),
        "have no contrast in the window",
        task="msd_spleen",
    ),
    "CT without its intercept": Kind(
        of_image(lambda v: np.where(v < -500, 0, v + 1024).astype(np.int16)),
        "was the intercept of -1024 lost?",
        LOOK,
        "msd_spleen",
    ),
    "image that is a label map": Kind(
        of_image(lambda v: np.digitize(v, np.quantile(v, (0.5, 0.8, 0.9))).astype(np.uint8)),
        "as a label map has: is it a scan?",
        LOOK,
    ),
    "16 bit scaled by a slope": Kind(scaled, "", FINE),
    # geometry
    "metres": Kind(raw(123, "B", 1), "lengths are in metres: convert them to millimetres"),
    "micrometres and seconds": Kind(raw(123, "B", 3 + 8), "lengths are in micrometres"),
    "no unit": Kind(raw(123, "B", 0), "", FINE),
    "zero spacing": Kind(raw(80, "<3f", 0, 1, 1), "a spacing of 0, 1, 1 mm"),
    "negative spacing": Kind(raw(80, "<3f", 1, -1, 1), "a spacing of 1, -1, 1 mm"),
    "tiny spacing": Kind(raw(80, "<3f", 1e-5, 100, 100, codes=(0, 0)), "each must be within 0.0001 to 10000 mm"),
    "huge spacing": Kind(raw(80, "<3f", 1e30, 1e-30, 1, codes=(0, 0)), "each must be within 0.0001 to 10000 mm"),
    "spacing NaN": Kind(raw(80, "<3f", 1, float("nan"), 1), "each must be more than 0"),
    "singular affine": Kind(raw(280, "<4f", 0, 0, 0, 0, codes=(0, 1)), "cannot be inverted"),
    "affine NaN": Kind(raw(280, "<4f", float("nan"), 0, 0, 0, codes=(0, 1)), "cannot be inverted"),
    "sform and qform disagree": Kind(disagree, "its sform and qform place voxels"),
    "turned label": Kind(of_label(lambda v: np.rot90(v).copy()), "the same edges in another order (turned?)"),
    "label turned by its header": Kind(moved_label(turned_plane), "their axes run ARS and RAS"),
    "label mirrored by its header": Kind(moved_label(mirrored), "their axes run LAS and RAS: one of them is mirrored"),
    "label off by one slice": Kind(moved_label(by_one_slice), "shifted by 0, 0, 1 voxels"),
    "label one slice short": Kind(of_label(lambda v: v[:, :, 1:]), "they must be the same grid"),
    "thick spacing": Kind(
        lambda root, case: [rewrite(p, lambda v: v, affine=np.diag([1.0, 1, 25, 1])) for p in case.files],
        "1 x 1 x 25 mm",
        LOOK,
    ),
    # labels
    "float label": Kind(of_label(lambda v: v.astype(np.float32) * np.float32(0.9999999)), "rounded", LOOK),
    "interpolated label": Kind(
        of_label(lambda v: poke(0.5)(v.astype(np.float32))), "label values 0.5 are no whole numbers"
    ),
    "label NaN": Kind(of_label(lambda v: poke(np.nan)(v.astype(np.float32))), "no whole numbers"),
    "unknown label": Kind(of_label(poke(3)), "label values 3 are unknown to task 'msd_hippocampus', which has 0, 1, 2"),
    "negative label": Kind(of_label(lambda v: poke(-1)(v.astype(np.int16))), "label values -1 are unknown"),
    "label that overflows": Kind(of_label(lambda v: poke(257)(v.astype(np.int16))), "label values 257 are unknown"),
    "empty mask": Kind(of_label(lambda v: v * 0), "no voxel of any target", LOOK),
    "absent target": Kind(of_label(lambda v: np.where(v == 2, 0, v)), "no posterior", LOOK),
    "label of another case": Kind(
        of_label(lambda v: np.roll(v, v.shape[0] // 2, 0)), "lie where the image has nothing", LOOK
    ),
    "duplicate": Kind(twice, "(correlation 1.000): they count as one patient", LOOK),
    # modalities
    "missing modality": Kind(
        lambda root, case: case.images[1].unlink(), "_t1.nii.gz (or .nii) is missing", task="brats"
    ),
    "modality of another shape": Kind(other_shape, "the same edges in another order", task="brats"),
    "modality at another place": Kind(other_place, "shifted by 30, 0, 0 voxels", task="brats"),
    "label of another release": Kind(of_label(poke(3)), "is this another release or another task?", task="brats"),
    "two releases": Kind(mixed, "mixes the releases 2020 and 2021", task="brats"),
    # descriptions
    "labels are a list": Kind(described(labels=["background", "a"]), "labels = "),
    "training is a number": Kind(described(training=3), "training = '3' cannot be used"),
    "entry without label": Kind(described(training=[{"image": "./x.nii.gz"}]), "training.0.label"),
    "modality is text": Kind(described(modality="CT"), "modality = 'CT' cannot be used"),
    "label value is text": Kind(described(labels={"zero": "background", "1": "a"}), "labels.zero"),
    "label value too large": Kind(described(labels={"0": "background", "300": "a"}), "whole numbers of 0..255"),
    "no background": Kind(described(labels={"1": "anterior", "2": "posterior"}), "no label is 0"),
    "two labels of one name": Kind(described(labels={"0": "background", "1": "a", "2": "A"}), "cannot be told apart"),
    "path out of the folder": Kind(entry(image="../../../etc/passwd"), "leaves the task's folder"),
    "absolute path": Kind(entry(label="/etc/passwd"), "leaves the task's folder"),
    "path with a null": Kind(entry(image="./imagesTr/\0"), "leaves the task's folder"),
    "path with half a character": Kind(entry(image="./imagesTr/\ud800"), "leaves the task's folder"),
    "no JSON": Kind(lambda root, case: (root / "dataset.json").write_text("{"), "cannot be read as JSON"),
    "JSON without end": Kind(
        lambda root, case: (root / "dataset.json").write_text("[" * 100000), "cannot be read as JSON"
    ),
    "a list": Kind(lambda root, case: (root / "dataset.json").write_text("[]"), "must hold a JSON object"),
    "no cases": Kind(described(training=[]), "'training' must list the labelled cases"),
    "names with spaces, quotes, commas, unicode": Kind(odd_names, "", FINE),
}


@pytest.fixture(scope="module")
def clean(registry, tmp_path_factory):
    """A clean phantom of four cases per task, to be copied and spoilt."""
    roots = {}
    for name in {kind.task for kind in KINDS.values()}:
        task = small(registry.task(name))
        root = tmp_path_factory.mktemp("clean") / name
        write_phantom(task, root, 4, seed=0)
        roots[name] = root
    return roots


def test_there_are_enough_kinds():
    assert len(KINDS) >= 40


@pytest.mark.parametrize("name", KINDS)
def test_bad_input(name, clean, registry, tmp_path, capsys):
    kind = KINDS[name]
    root = tmp_path / "data"
    shutil.copytree(clean[kind.task], root)
    case = registry.task(kind.task).cases(root)[-1]
    kind.spoil(root, case)
    runs = tmp_path / "runs"
    data = ["--data", str(root), "--runs", str(runs)]

    status = main(["data", "check", kind.task, *data])
    out, err = capsys.readouterr()
    assert status == (2 if kind.verdict == SPOILS else 0)
    assert "Traceback" not in out + err
    assert kind.says in out + err
    if kind.verdict == LOOK:
        assert f"({LOOK}, " in out
    if kind.verdict == FINE:
        assert "(" not in out.partition("cases")[0]

    status = main(["data", "prepare", kind.task, *data])
    out, err = capsys.readouterr()
    if kind.verdict != SPOILS:
        assert status == 0
        assert "4 cases prepared" in out
        return
    last = [line for line in err.splitlines() if line.startswith("harness: error: ")]
    assert status == 2
    assert len(last) == 1
    assert kind.says in last[0]
    whole_set = not (root / "dataset.json").exists() or kind.says not in str(_listing_error(registry, kind, root))
    if whole_set and not _listing_error(registry, kind, root):
        # The case that is spoilt is named, the three others are prepared.
        assert case.id in last[0]
        assert len(list((runs / "cache" / "prepared").rglob("*.json"))) == 3


def _listing_error(registry, kind, root):

    try:
        task = registry.task(kind.task)
        task.cases(task.find(root))
    except UserError as error:
        return str(error)
    return ""


def test_a_file_that_may_not_be_read(clean, registry, tmp_path, capsys, monkeypatch):
    case = registry.task("msd_hippocampus").cases(clean["msd_hippocampus"])[0]
    # Permissions do not stop root, who runs the tests in containers.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != case.images[0])
    data = ["--data", str(clean["msd_hippocampus"]), "--runs", str(tmp_path)]
    assert main(["data", "check", "msd_hippocampus", *data]) == 2
    assert "may not be read: change its permissions" in capsys.readouterr().out


def test_a_case_listed_twice_spoils_a_run_in_the_check_too(hippocampus_phantom, tmp_path, capsys):
    shutil.copytree(hippocampus_phantom, tmp_path / "twice")
    path = tmp_path / "twice" / "dataset.json"
    content = json.loads(path.read_text())
    content["training"].append(content["training"][0])
    path.write_text(json.dumps(content))
    harness("data", "check", "msd_hippocampus", "--data", path.parent, "--runs", tmp_path, status=2)
    assert "has the name of another case" in capsys.readouterr().out
