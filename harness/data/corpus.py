"""Corpora: unlabelled scans for pre-training in `generic` mode. A corpus has a registered name, or is any folder."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from harness.api.task import Case, ImageSet, Normalisation, Percentiles, Task, Window, ZScore
from harness.data.image_names import IMAGE_ENDINGS, is_named_label
from harness.system.errors import UserError
from harness.system.files import slug, walk

ANY = "**/*"
NUMBER = r"(-?\d+(?:\.\d+)?)"
NORMALISATION = re.compile(rf"{NUMBER},{NUMBER}|percentiles|zscore")
WINDOW = re.compile(rf"Window\(low={NUMBER}, high={NUMBER}\)")  # as records state it


@dataclass(frozen=True, kw_only=True)
class Corpus(ImageSet):
    """A set of unlabelled scans, in the layout in which its archive unpacks.

    Attributes:
        folders: names that the folder of the corpus may have.
        patterns: globs of its images, relative to its folder.
        phantom: path of a phantom's file, with a format field such as `{:03d}` for the case number.
    """

    folders: tuple[str, ...] = ()
    patterns: tuple[str, ...] = (ANY,)
    phantom: str = "scan_{:03d}.nii.gz"

    def find(self, data: Path) -> Path:
        """The folder of the corpus: a folder of its name in `data` or beside `data`, or `data` itself.

        Raises:
            UserError: none of these folders holds an image of the corpus.
        """
        # pathlib says that "." is its own parent.
        beside = Path(os.path.abspath(data)).parent  # noqa: PTH100 - `resolve` would leave a folder that is a link
        folders = [data / name for name in self.folders] + [beside / name for name in self.folders] + [data]
        for folder in folders:
            if folder.is_dir() and any(not label for _, label in self._matching(folder)):
                return folder
        raise UserError(
            f"corpus {self.name!r}: not found as {', '.join(self.folders) or 'itself'} in or beside {data}; expected: "
            f"{self.layout}; get it from {self.registration}, or name its folder: --corpus DIR"
        )

    def cases(self, root: Path) -> list[Case]:
        """Its scans as cases without labels, sorted; ids are paths relative to `root`. Raises UserError if there is no scan."""
        paths = sorted({path for path, label in self._matching(root) if not label})
        if not paths:
            raise UserError(
                f"corpus {self.name!r}: no image below {root}; images end in {', '.join(IMAGE_ENDINGS)}: give another folder"
            )
        # The id contains the ending, so that two files never have the same id.
        return [
            Case(id=f"{self.name}/{path.relative_to(root).as_posix()}", images=(path,), label=None) for path in paths
        ]

    def num_labels(self, root: Path) -> int:
        """Number of images that are no scans because their names, or those of their folders, are names of label maps."""
        return len({path for path, label in self._matching(root) if label})

    def _matching(self, root: Path) -> Iterator[tuple[Path, bool]]:
        """Paths of the images, each with a flag: whether its name is that of a label map."""
        for pattern in self.patterns:
            for path in map(Path, walk(root)) if pattern == ANY else root.glob(pattern):
                relative = path.relative_to(root)
                hidden = any(name.startswith(".") for name in relative.parts)
                if path.name.endswith(IMAGE_ENDINGS) and not hidden and not path.is_dir():
                    yield path, is_named_label(relative)


def folder_corpus(folder: Path, like: Task | None = None) -> Corpus:
    """A corpus of all images in a folder and its subfolders, preprocessed like the images of the task `like`.

    Images with names of label maps are left out. Without a task, each scan keeps its own spacing and is scaled by
    percentiles.
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


def parse_spec(spec: str) -> tuple[str, Normalisation | None]:
    """Parse `NAME|DIR[=LOW,HIGH|=percentiles|=zscore]`: the name or folder, and the normalisation or None.

    Raises:
        UserError: the window is empty or too wide.
    """
    name, sign, how = spec.rpartition("=")
    match = NORMALISATION.fullmatch(how) if sign else None
    if match is None:
        return spec, None
    if how in ("percentiles", "zscore"):
        return name, Percentiles() if how == "percentiles" else ZScore()
    window = Window(float(match[1]), float(match[2]))
    if not window.usable:
        raise UserError(
            f"--corpus {spec}: the window {how} is empty or too wide: give its lower end first, for instance -1000,400"
        )
    return name, window


def with_intensities(spec: str, recorded: str) -> str:
    """The spec of a corpus with the normalisation that a record states as text, unless it names one, or the text is unknown."""
    window = WINDOW.fullmatch(recorded)
    if parse_spec(spec)[1] is not None:
        return spec
    if recorded == repr(Percentiles()):
        return f"{spec}=percentiles"
    if recorded.startswith(f"{ZScore.__name__}("):
        return f"{spec}=zscore"
    return f"{spec}={window[1]},{window[2]}" if window else spec


def with_normalisation(corpus: Corpus, normalisation: Normalisation | None) -> Corpus:
    """The corpus with another normalisation, or unchanged for None."""
    if isinstance(normalisation, ZScore):
        normalisation = ZScore(corpus.hounsfield)
    return corpus if normalisation is None else replace(corpus, normalisation=normalisation)
