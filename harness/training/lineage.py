"""The lineage of weights: the trainings that they went through, and the scans that were trained on.

A file of weights that this harness writes has its lineage as metadata. A sidecar beside it, `weights.lineage.safetensors`,
adds the signatures of the scans, so that a scan is recognised in other files too (`harness.data.duplicates`). Copies of the
sidecars in the cache recognise weights by their tensors, whatever the file's name, format or key names are.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from harness.data.duplicates import GRID, Signature, named_pairs
from harness.system.console import say
from harness.system.files import LINEAGE, digest, printable, write_atomic

KEY = "lineage"
"""Name of the metadata in a file of weights and in its sidecar."""

MOST_GENERATIONS = 1000
Text = Annotated[str, Field(min_length=1, max_length=1000)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{8,64}$")]


class _Part(BaseModel):
    """A part of a lineage; fields that it does not know are an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Generation(_Part):
    """One training that the weights went through.

    Attributes:
        data: the task or the corpora.
        labels: whether labels of its scans were used.
        settings: everything else that the training depended on, by section.
    """

    stage: Literal["pretrain", "finetune"]
    method: Text
    method_version: Text
    backbone: Text
    harness: Text
    data: Text
    num_scans: Annotated[int, Field(ge=0, le=10**9)]
    labels: bool
    seed: int
    settings: dict[str, Any]

    def __str__(self) -> str:
        labels = "with labels" if self.labels else "without labels"
        what = {"pretrain": "pre-training", "finetune": "fine-tuning after"}
        scans = "1 scan" if self.num_scans == 1 else f"{self.num_scans} scans"
        return printable(f"{what[self.stage]} {self.method} on {scans} of {self.data}, {labels}")


class Foreign(_Part):
    """A file of weights of which not all trainings are known.

    Attributes:
        stated: what its user says that it was trained on; empty if nothing is said.
        scans: whether the scans that the statement names are at hand, so that they are among those of the lineage.
    """

    file: Text
    digest: Digest
    stated: Annotated[str, Field(max_length=1000)] = ""
    scans: bool = False


class _Header(_Part):
    """The lineage as it is written, without signatures.

    Attributes:
        tensors: the digests of the file's tensors.
        changed: of these, the ones that the last training changed. The others are known by the file that they came from.
    """

    version: Literal[1] = 1
    generations: Annotated[tuple[Generation, ...], Field(max_length=MOST_GENERATIONS)] = ()
    scans: tuple[Digest, ...] = ()
    labelled: tuple[Digest, ...] = ()
    foreign: tuple[Foreign, ...] = ()
    tensors: tuple[Digest, ...] = ()
    changed: tuple[Digest, ...] = ()


@dataclass(frozen=True)
class Lineage:
    """What weights were trained on.

    Attributes:
        generations: the trainings, the oldest first.
        scans: digest of a case's files -> its signatures (channels, GRID, GRID, GRID); without channels where they are lost.
        labelled: the digests of the scans whose labels were used.
        foreign: files with trainings that are not known.
    """

    generations: tuple[Generation, ...] = ()
    scans: Mapping[str, Signature] = field(default_factory=dict)
    labelled: frozenset[str] = frozenset()
    foreign: tuple[Foreign, ...] = ()

    def after(self, generation: Generation, scans: Mapping[str, Signature], labelled: Iterable[str] = ()) -> "Lineage":
        """The lineage of weights that went through one more training, on `scans`."""
        return self + Lineage((generation,), scans, frozenset(labelled))

    def __add__(self, other: "Lineage") -> "Lineage":
        """The lineage of weights that come from both."""
        generations = tuple(each for each in other.generations if each not in self.generations)
        foreign = tuple(each for each in other.foreign if each not in self.foreign)
        known = {name: value for name, value in other.scans.items() if len(value) or name not in self.scans}
        return Lineage(
            (*self.generations, *generations),
            {**self.scans, **known},
            self.labelled | other.labelled,
            (*self.foreign, *foreign),
        )

    def seen(self, cases: Mapping[str, tuple[str, Signature]]) -> list[tuple[str, str, float]]:
        """Those of `cases` that were trained on: sorted triples (digest of a scan, case, correlation; 1 for the same files).

        Args:
            cases: case id -> digest of its files, and its signatures (channels, GRID, GRID, GRID).
        """
        same_files = {(name, case): 1.0 for case, (name, _) in cases.items() if name in self.scans}
        scans = [(name, signature) for name, signatures in self.scans.items() for signature in signatures]
        tested = [(case, signature) for case, (_, signatures) in cases.items() for signature in signatures]
        highest = named_pairs(scans, tested) | same_files
        return sorted((scan, case, correlation) for (scan, case), correlation in highest.items())

    @property
    def is_complete(self) -> bool:
        """Whether all scans that were trained on are known, or are at hand as the user states."""
        return all(each.scans for each in self.foreign) and not self.without_signatures

    @property
    def without_signatures(self) -> list[str]:
        """The digests of the scans that can be recognised by their files only."""
        return [name for name, signatures in self.scans.items() if not len(signatures)]

    def as_record(self) -> dict[str, Any]:
        """The lineage as values of JSON, with numbers of scans instead of the scans."""
        return {
            "generations": [each.model_dump(mode="json") for each in self.generations],
            "num_scans": len(self.scans),
            "num_labelled": len(self.labelled),
            "num_without_signatures": len(self.without_signatures),
            "foreign": [each.model_dump(mode="json") for each in self.foreign],
        }


@dataclass(frozen=True)
class Written:
    """A lineage as it is written in a file: `path` has the signatures, or is None where they are lost."""

    header: _Header
    path: Path | None

    @cached_property
    def tensors(self) -> frozenset[str]:
        """The digests of the tensors of its file."""
        return frozenset(self.header.tensors)

    @cached_property
    def changed(self) -> frozenset[str]:
        """The digests of the tensors that its last training changed."""
        return frozenset(self.header.changed)

    @property
    def size(self) -> tuple[int, int]:
        """Numbers of generations and of scans: of two lineages of the same tensors, the smaller one is enough."""
        return len(self.header.generations), len(self.header.scans)

    def load(self) -> Lineage:
        """The lineage with the signatures of its scans."""
        signatures = {name: np.zeros((0, GRID, GRID, GRID), np.int8) for name in self.header.scans}
        if self.path is not None:
            signatures |= _read_signatures(self.path, self.header.scans)
        return Lineage(self.header.generations, signatures, frozenset(self.header.labelled), self.header.foreign)


def tensor_digests(weights: Mapping[str, Tensor]) -> frozenset[str]:
    """Digests of the tensors that tell weights apart: of floating point, and not one value throughout."""
    return frozenset(_digest_tensor(value) for value in weights.values() if _is_telling(value))


def _is_telling(value: Tensor) -> bool:
    """Whether a tensor tells weights apart."""
    if not value.is_floating_point() or value.numel() < 2:
        return False
    # Types of 8 bits have no comparison.
    comparable = value.float() if value.element_size() == 1 else value
    return bool(comparable.min() < comparable.max())


def _digest_tensor(value: Tensor) -> str:
    """Digest of type, shape and values of a tensor."""
    state = hashlib.blake2b(f"{value.dtype} {tuple(value.shape)}".encode(), digest_size=16)
    state.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return state.hexdigest()


def sidecar(weights: Path) -> Path:
    """The path of the sidecar of a file of weights."""
    return weights.with_suffix(LINEAGE)


def write_lineage(
    lineage: Lineage, weights: Mapping[str, Tensor], path: Path, unchanged: frozenset[str] = frozenset()
) -> dict[str, str]:
    """Write the sidecar of the file of weights at `path`. Returns the metadata for that file.

    Args:
        unchanged: digests of the tensors that the last training began with; for a copy of weights, of all of them.
    """
    tensors = tensor_digests(weights)
    header = _Header(
        generations=lineage.generations,
        scans=tuple(sorted(lineage.scans)),
        labelled=tuple(sorted(lineage.labelled)),
        foreign=lineage.foreign,
        tensors=tuple(sorted(tensors)),
        changed=tuple(sorted(tensors - unchanged)),
    )
    channels = [(number, channel) for number, name in enumerate(header.scans) for channel in lineage.scans[name]]
    cubes = np.stack([channel for _, channel in channels]) if channels else np.zeros((0, *[GRID] * 3), np.int8)
    owners = np.array([number for number, _ in channels], np.int32)
    content = {"signatures": torch.from_numpy(np.ascontiguousarray(cubes)), "scan": torch.from_numpy(owners)}
    metadata = {KEY: json.dumps(header.model_dump(mode="json"), sort_keys=True)}
    write_atomic(sidecar(path), serialise(content, metadata))
    return metadata


def cache_lineage(weights: Path, cache: Path) -> None:
    """Copy the sidecar of a file of weights to the cache, where its tensors are looked up. Without a sidecar, nothing is done."""
    own = _read_header(sidecar(weights))
    if own is not None:
        copy = _cached(own, cache)
        if not copy.exists():
            write_atomic(copy, sidecar(weights).read_bytes())


def _cached(header: _Header, cache: Path) -> Path:
    """The path of a sidecar's copy in the cache."""
    return cache / KEY / f"{digest(header.model_dump(mode='json'))}.safetensors"


def read_lineage(path: Path, weights: Mapping[str, Tensor], file_digest: str, cache: Path) -> Lineage:
    """The lineage of a file of weights: from its metadata, its sidecar, or the cache, by the digests of its tensors.

    Tensors that no lineage is about make the file a `foreign` one.

    Args:
        weights: the tensors in the file.
        file_digest: of the content of the file.
    """
    names = tensor_digests(weights)
    own = [each for each in _own_candidates(path, cache) if names and names <= each.tensors]
    if own:
        return own[0].load()
    # Weights may be put together from several files, and a file holds tensors that its own training did not change. So for
    # each tensor the lineage of the training counts that changed it last.
    candidates = [*_own_candidates(path, cache), *_candidates((cache / KEY).glob("*.safetensors"))]
    about = [[each for each in candidates if name in each.changed] for name in sorted(names)]
    least = [min(each, key=lambda other: other.size) for each in about if each]
    lineage = Lineage()
    for written in {id(each): each for each in least}.values():
        lineage += written.load()
    if not names or not all(about):
        lineage += Lineage(foreign=(Foreign(file=printable(path.name)[:200], digest=file_digest),))
    return lineage


def lineage_of(path: Path, cache: Path) -> Lineage | None:
    """The lineage that a file of weights of this harness states, without a look at its tensors; None if it states none."""
    written = next(iter(_own_candidates(path, cache)), None)
    return None if written is None else written.load()


def say_what_is_lost(lineage: Lineage) -> None:
    """Tell the user if scans of a lineage can be recognised by their files only, and what to do."""
    if lost := len(lineage.without_signatures):
        say(
            f"{lost} scans that the weights were trained on are known by their files only, so that copies of them are not "
            f"recognised: put the file that ends in {LINEAGE} beside the weights, as it was written"
        )


def _own_candidates(path: Path, cache: Path) -> list[Written]:
    """The lineages in the metadata of a file of weights and in its sidecar; signatures come from the sidecar or the cache."""
    lineages = _candidates([sidecar(path)])
    own = _read_header(path) if path.suffix == ".safetensors" else None
    if own is not None and all(each.header != own for each in lineages):
        copy = _cached(own, cache)
        lineages.insert(0, Written(own, copy if copy.is_file() else None))
    return lineages


def _candidates(paths: Iterable[Path]) -> list[Written]:
    """The lineages in sidecars; files that are none are left out."""
    headers = [(path, _read_header(path)) for path in sorted(paths)]
    return [Written(header, path) for path, header in headers if header is not None]


def _read_header(path: Path) -> _Header | None:
    """The lineage in the metadata of a safetensors file; None if there is none that can be read."""
    try:
        if not path.is_file():  # a pipe would never end
            return None
        with safe_open(path, "numpy") as file:
            text = (file.metadata() or {}).get(KEY)
        return None if text is None else _Header.model_validate_json(text)
    except (OSError, SafetensorError):
        return None
    except ValidationError as error:
        say(f"{path}: its lineage cannot be read ({error.errors()[0]['msg']}), so that it is not used")
        return None


def _read_signatures(path: Path, scans: Sequence[str]) -> dict[str, Signature]:
    """The signatures in a sidecar, by the digest of the scan; empty if it does not hold what a sidecar holds."""
    try:
        with safe_open(path, "numpy") as file:
            cubes, owners = file.get_tensor("signatures"), file.get_tensor("scan")
    # NumPy lacks some types of torch; whatever is not what `write_lineage` writes is no sidecar.
    except (SafetensorError, TypeError, AttributeError):
        return {}
    types = cubes.dtype == np.int8 and owners.dtype == np.int32
    if not types or cubes.shape[1:] != (GRID, GRID, GRID) or owners.shape != cubes.shape[:1]:
        return {}
    if len(owners) and not (owners.min() >= 0 and owners.max() < len(scans)):
        return {}
    return {scans[number]: cubes[owners == number] for number in np.unique(owners)}
