"""Corpora: unlabelled scans for pre-training in `generic` mode, named ones and any folder."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from harness.api.task import Case, ImageSet, Percentiles, Task, Window
from harness.data.image_names import IMAGE_ENDINGS, is_named_label
from harness.system.errors import UserError
from harness.system.files import slug, walk

ANY = "**/*"
NORMALISATION = re.compile(r"(-?\d+(?:\.\d+)?),(-?\d+(?:\.\d+)?)|percentiles")


@dataclass(frozen=True, kw_only=True)
class Corpus(ImageSet):
    """Unlabelled scans as they are unpacked.

    Attributes:
        folders: names that the corpus has in a data folder.
        patterns: globs of its images, below its folder.
        phantom: name of a phantom's file, with the case number as `{:03d}` or the like.
    """

    folders: tuple[str, ...] = ()
    patterns: tuple[str, ...] = (ANY,)
    phantom: str = "scan_{:03d}.nii.gz"

    def find(self, data: Path) -> Path:
        """The corpus's own folder: `data`, or a folder of its name in it or beside it.

        Raises:
            UserError: it is in none of these places.
        """
        places = [data / name for name in self.folders] + [data.parent / name for name in self.folders] + [data]
        for place in places:
            if place.is_dir() and any(not label for _, label in self._matching(place)):
                return place
        raise UserError(
            f"corpus {self.name!r}: not found as {', '.join(self.folders) or 'itself'} in or beside {data}; expected: "
            f"{self.layout}; get it from {self.registration}, or name its folder: --corpus DIR"
        )

    def cases(self, root: Path) -> list[Case]:
        """Its scans as cases without labels, sorted; ids are paths below `root`. Raises UserError for none."""
        paths = sorted({path for path, label in self._matching(root) if not label})
        if not paths:
            raise UserError(
                f"corpus {self.name!r}: no image below {root}; images end in {', '.join(IMAGE_ENDINGS)}: give another folder"
            )
        # With its ending, so that two files are never of one name.
        return [
            Case(id=f"{self.name}/{path.relative_to(root).as_posix()}", images=(path,), label=None) for path in paths
        ]

    def num_labels(self, root: Path) -> int:
        """Files that would be scans were they not named as label maps are, or in a folder of such a name."""
        return len({path for path, label in self._matching(root) if label})

    def _matching(self, root: Path) -> Iterator[tuple[Path, bool]]:
        """Images, and whether their names say that they are label maps."""
        for pattern in self.patterns:
            for path in map(Path, walk(root)) if pattern == ANY else root.glob(pattern):
                inner = path.relative_to(root)
                hidden = any(part.startswith(".") for part in inner.parts)
                if path.name.endswith(IMAGE_ENDINGS) and not hidden and not path.is_dir():
                    yield path, is_named_label(inner)


def folder_corpus(folder: Path, like: Task | None = None) -> Corpus:
    """Any folder of scans: every image below it, prepared like a task's images; what is named as labels is left out.

    Without a task: on each scan's own grid, scaled by percentiles.
    """
    return Corpus(
        name=slug(folder.resolve().name),
        version="1",
        description=f"images below {folder}",
        licence="unknown",
        reference="",
        channels=like.channels[:1] if like else ("image",),
        spacing=like.spacing if like else None,
        normalisation=like.normalisation if like else Percentiles(),
    )


def parse_spec(spec: str) -> tuple[str, Percentiles | Window | None]:
    """`NAME|DIR[=LOW,HIGH|=percentiles]` -> the name or folder, and the normalisation where it was given."""
    name, sign, how = spec.rpartition("=")
    match = NORMALISATION.fullmatch(how) if sign else None
    if match is None:
        return spec, None
    if how == "percentiles":
        return name, Percentiles()
    window = Window(float(match[1]), float(match[2]))
    if not window.usable:
        raise UserError(
            f"--corpus {spec}: the window {how} is empty or too wide: give its lower end first, for instance -1000,400"
        )
    return name, window


def with_normalisation(corpus: Corpus, normalisation: Percentiles | Window | None) -> Corpus:
    """The corpus under another window, where one was given."""
    return corpus if normalisation is None else replace(corpus, normalisation=normalisation)
