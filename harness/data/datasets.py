"""Which data a run uses: the task's cases and their split, the corpora, and whether they share scans."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from harness.api.registry import Registry
from harness.api.task import Case, Percentiles, Task, Window
from harness.data.corpus import Corpus, folder_corpus, parse_spec, with_normalisation
from harness.data.duplicates import ALIKE, same_scans, twins
from harness.data.inventory import Inventory, fingerprint, take_inventory
from harness.data.phantom import CORPUS_CASES, PHANTOM, is_phantom, write_phantom
from harness.data.splits import SAME, Split, split_cases
from harness.system.console import say, say_once
from harness.system.errors import UserError, unknown
from harness.system.files import check_name, digest, expand, is_folder
from harness.system.locks import held


@dataclass(frozen=True)
class TaskData:
    """A task's labelled cases, opened, checked and split."""

    task: Task
    phantom: bool
    split: Split
    inventory: Inventory

    @property
    def fingerprint(self) -> str:
        """Digest of the content of all cases."""
        return fingerprint(self.inventory.digests)


@dataclass(frozen=True)
class CorpusData:
    """A corpus's scans, opened and checked; `inventory.bad` has those that were skipped."""

    corpus: Corpus
    phantom: bool
    cases: list[Case]
    inventory: Inventory

    @property
    def label(self) -> str:
        """Name, and the beginning of a digest of the scans and of how they are prepared: what a table shows."""
        prepared = [self.corpus.version, self.corpus.spacing, repr(self.corpus.normalisation)]
        return f"{self.corpus.name}@{digest([prepared, fingerprint(self.inventory.digests)])[:8]}"


def find_data(task: Task, data: Path | None, runs: Path) -> Path:
    """The task's folder: the user's, or a phantom written on first use."""
    if data is not None:
        if not is_folder(data):
            raise UserError(f"--data {data} is not a folder: give the task's own folder or the one that contains it")
        return task.find(data)
    return task.find(_phantom(task, runs, task.phantom_cases))


def find_corpora(
    registry: Registry, specs: Sequence[str], task: Task | None, data: Path | None, runs: Path
) -> list[tuple[Corpus, Path]]:
    """The corpora that `--corpus` names, with their folders.

    A folder is one as it is; a name is looked for in and beside the data folder, or made up as a phantom where no data
    is given.

    Raises:
        UserError: neither a folder nor a known name, not found, or one name twice.
    """
    found: list[tuple[Corpus, Path]] = []
    for spec in specs:
        name, folder, normalisation = read_spec(registry, spec)
        if folder is None:
            corpus = registry.load("corpus", name)
            root = corpus.find(data) if data is not None else _phantom(corpus, runs, CORPUS_CASES)
        else:
            corpus, root = folder_corpus(folder, task), folder
        if any(other.name == corpus.name for other, _ in found):
            raise UserError(f"--corpus {spec}: two corpora are named {corpus.name!r}: give it once, or rename a folder")
        found.append((with_normalisation(corpus, normalisation), root))
    if len({len(corpus.channels) for corpus, _ in found}) > 1:
        listed = ", ".join(f"{corpus.name} has {len(corpus.channels)}" for corpus, _ in found)
        raise UserError(f"corpora must have equally many channels: {listed}: pre-train on them in turn")
    return found


def read_spec(registry: Registry, spec: str) -> tuple[str, Path | None, Percentiles | Window | None]:
    """A `--corpus`: its name, its folder where it is one, and the normalisation where that is given; reads no data.

    Raises:
        UserError: neither a folder nor a known name.
    """
    name, normalisation = parse_spec(spec)
    if not name:
        raise UserError("--corpus is empty: give a name (`harness list corpora`) or a folder of scans")
    folder = expand(name)
    if name in registry.names("corpus"):
        return name, None, normalisation
    if is_folder(folder):
        return name, folder, normalisation
    if "/" in name:
        raise UserError(f"--corpus {spec}: folder {folder} does not exist: give a folder of scans, or a name")
    raise unknown("corpus (nor is it a folder)", name, registry.names("corpus"))


def open_task(task: Task, root: Path, cache: Path, how: str) -> TaskData:
    """Open, check, recognise and split the cases of a task.

    Raises:
        UserError: a case that cannot be used, or a split that leaves nothing on one side.
    """
    phantom = is_phantom(root)
    # A phantom's cases have the names of real ones, the shipped test list does not speak of them.
    task = replace(task, test_ids=None) if phantom else task
    cases = task.cases(root)
    for each in cases:
        check_name(each.id)
    inventory = take_inventory(task, cases, cache)
    split = split_cases(task, cases, how, twins([inventory.signatures[case.id] for case in cases]))
    if split.by == SAME:
        say(
            "PLUMBING CHECK: trained and tested on the same cases (--split same); the numbers say nothing about a method"
        )
    for case, other in split.left_out:
        say(f"left out of training: {case} is the same patient or scan as test case {other}")
    return TaskData(task, phantom, split, inventory)


def open_corpora(found: Sequence[tuple[Corpus, Path]], cache: Path, skip_bad: bool) -> list[CorpusData]:
    """Open, check and recognise the scans of corpora.

    Raises:
        UserError: a file that cannot be used, unless `skip_bad`; or no scan is left.
    """
    opened = []
    for corpus, root in found:
        cases = corpus.cases(root)
        if labels := corpus.num_labels(root):
            say(f"corpus {corpus.name}: {labels} files that are named as labels are left out")
        try:
            inventory = take_inventory(corpus, cases, cache, skip_bad)
        except UserError as error:
            raise UserError(
                f"{error}; or give --skip-bad to leave out what cannot be used, and have it counted"
            ) from None
        for problem in inventory.bad.values():
            say(f"skipped: {' '.join(problem.split())}")
        cases = [case for case in cases if case.id not in inventory.bad]
        if not cases:
            raise UserError(f"corpus {corpus.name!r}: none of its {len(inventory.bad)} files can be used: mend them")
        opened.append(CorpusData(corpus, is_phantom(root), cases, inventory))
    return opened


def overlap(data: TaskData, corpora: Sequence[CorpusData]) -> list[tuple[str, str]]:
    """Pairs (scan of a corpus, test case) that are alike as copies are, whatever their files are called and say."""
    scans = [(case.id, one) for each in corpora for case in each.cases for one in each.inventory.signatures[case.id]]
    tested = [(case.id, one) for case in data.split.test for one in data.inventory.signatures[case.id]]
    pairs = same_scans([one for _, one in scans], [one for _, one in tested], ALIKE)
    return sorted({(scans[i][0], tested[j][0]) for i, j in pairs})


def check_overlap(data: TaskData, corpora: Sequence[CorpusData], allow: bool) -> list[tuple[str, str]]:
    """`overlap`, which is an error unless it is allowed, and then said."""
    pairs = overlap(data, corpora)
    if not pairs:
        return pairs
    shown = "; ".join(f"{scan} is test case {case}" for scan, case in pairs[:3]) + ("; ..." if len(pairs) > 3 else "")
    if not allow:
        raise UserError(
            f"{len(pairs)} scans to pre-train on are test cases of {data.task.name!r}, by their voxels ({shown}): take them out "
            "of the corpus, or give --allow-overlap, and the tables will say so"
        )
    say(f"OVERLAP: {len(pairs)} scans of the corpora are test cases ({shown}); every table says so")
    return pairs


def _phantom(images: Task | Corpus, runs: Path, number: int) -> Path:
    root = runs / "phantoms" / f"{images.name}-v{PHANTOM}-n{number}"
    say_once(
        f"No data given (--data or HARNESS_DATA): using a PHANTOM of {images.name} in {root}. "
        "Its numbers say that the software works, nothing about any method."
    )
    if is_phantom(root):
        return root
    with held(root, f"the phantom {root.name}"):
        if is_phantom(root):
            return root
        write_phantom(images, root, number, seed=0)
    return root
