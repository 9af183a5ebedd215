"""The data of a run: the task's cases and their split, the corpora, and the check that they share no scans."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from harness.api.registry import Registry
from harness.api.task import Case, Normalisation, Task, ZScore
from harness.data.corpus import Corpus, folder_corpus, parse_spec, with_normalisation
from harness.data.duplicates import duplicate_pairs, named_pairs
from harness.data.inventory import Inventory, fingerprint, take_inventory
from harness.data.phantom import CORPUS_CASES, PHANTOM, is_phantom, write_phantom
from harness.data.splits import SAME, VALIDATION_SHARE, Split, split_cases
from harness.system.console import say, say_once
from harness.system.errors import UserError, listing, unknown
from harness.system.files import check_name, digest, expand, is_folder
from harness.system.locks import held


@dataclass(frozen=True)
class TaskData:
    """The labelled cases of a task, opened, checked and split; `phantom` is true if they are made up."""

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
    """The scans of a corpus, opened and checked; `inventory.bad` has the problems of the scans that were skipped."""

    corpus: Corpus
    phantom: bool
    cases: list[Case]
    inventory: Inventory

    @property
    def label(self) -> str:
        """The corpus in a table: its name, and the beginning of a digest of its scans and preprocessing."""
        preprocessing = [self.corpus.version, self.corpus.spacing, repr(self.corpus.normalisation)]
        return f"{self.corpus.name}@{digest([preprocessing, fingerprint(self.inventory.digests)])[:8]}"


def find_data(task: Task, data: Path | None, runs: Path) -> Path:
    """The folder of a task: in `data`, or without `data` a phantom, which is written on first use.

    Raises:
        UserError: `data` is no folder, or does not hold the task.
    """
    if data is not None:
        _check_folder(data)
        try:
            return task.find(data)
        except UserError as error:
            offer = "; or give --data phantom for made-up data" if task.phantom else ""
            raise UserError(f"{error}{offer}") from None
    return task.find(_phantom(task, runs, task.phantom_cases))


def _check_folder(data: Path) -> None:
    """Raise UserError if `data`, of --data or the environment, is no folder."""
    if not is_folder(data):
        raise UserError(
            f"--data or HARNESS_DATA: {data} is not a folder: give the task's own folder or the one that contains it"
        )


def find_corpora(
    registry: Registry, specs: Sequence[str], task: Task | None, data: Path | None, runs: Path
) -> list[tuple[Corpus, Path]]:
    """The corpora that `--corpus` names, with their folders.

    A spec that is a folder is a corpus of its own. A spec that is a name is searched in and beside `data`; without `data` it
    is a phantom.

    Raises:
        UserError: a spec is neither a folder nor a known name, a corpus is not found, a name occurs twice, or the corpora
            differ in their number of channels.
    """
    corpora: list[tuple[Corpus, Path]] = []
    for spec in specs:
        name, folder, normalisation = read_spec(registry, spec)
        if folder is None:
            corpus = registry.load("corpus", name)
            if data is not None:
                _check_folder(data)
            root = corpus.find(data) if data is not None else _phantom(corpus, runs, CORPUS_CASES)
        else:
            corpus, root = folder_corpus(folder, task), folder
        if any(other.name == corpus.name for other, _ in corpora):
            raise UserError(f"--corpus {spec}: two corpora are named {corpus.name!r}: give it once, or rename a folder")
        corpora.append((with_normalisation(corpus, normalisation), root))
    for corpus, _ in corpora:
        if task is not None and isinstance(task.normalisation, ZScore) != isinstance(corpus.normalisation, ZScore):
            raise UserError(
                f"--corpus {corpus.name}: it and task {task.name!r} must both have z-scores, or neither: give --corpus "
                "NAME=zscore and --set task.normalisation=zscore, or leave both out"
            )
    if len({len(corpus.channels) for corpus, _ in corpora}) > 1:
        listed = ", ".join(f"{corpus.name} has {len(corpus.channels)}" for corpus, _ in corpora)
        raise UserError(f"corpora must have equally many channels: {listed}: pre-train on them in turn")
    return corpora


def read_spec(registry: Registry, spec: str) -> tuple[str, Path | None, Normalisation | None]:
    """Read a value of `--corpus`. No data is read.

    Returns:
        Name as given; its folder, or None for a registered name; the normalisation, or None if none is given.

    Raises:
        UserError: the value is neither a folder nor a known name.
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


def open_task(
    task: Task, root: Path, cache: Path, how: str, validation: int = 0, share: Fraction = VALIDATION_SHARE
) -> TaskData:
    """Open, check and split the cases of a task; cases that are the same scan count as one patient.

    Args:
        how: value of `--split`, as `check_split` returns it.
        validation, share: largest number and share of the training cases that are held out.

    Raises:
        UserError: a case cannot be used, or the split leaves no case on one side.
    """
    phantom = is_phantom(root)
    # The cases of a phantom have the names of real ones, but the shipped test list is not about them.
    task = replace(task, test_ids=None) if phantom else task
    cases = task.cases(root)
    for case in cases:
        check_name(case.id)
    inventory = take_inventory(task, cases, cache)
    alike = duplicate_pairs([inventory.signatures[case.id] for case in cases])
    split = split_cases(task, cases, how, [(i, j) for i, j, _ in alike], validation, share)
    if split.by == SAME:
        say(
            "PLUMBING CHECK: trained and tested on the same cases (--split same); the numbers say nothing about a method"
        )
    if alike:
        listed = listing(f"{cases[i].id} and {cases[j].id}, correlation {value:.3f}" for i, j, value in alike)
        say(f"{len(alike)} pairs of cases look like one scan, and count as one patient: {listed}")
    for case_id, test_id in split.left_out:
        say(f"left out of training: {case_id} is the same patient or scan as test case {test_id}")
    if split.unused:
        say(f"not used: {len(split.unused)} cases that the file of folds does not list, {split.unused[0]} among them")
    return TaskData(task, phantom, split, inventory)


def open_corpora(located: Sequence[tuple[Corpus, Path]], cache: Path, skip_bad: bool) -> list[CorpusData]:
    """Open and check the scans of corpora.

    Args:
        located: corpora and their folders, from `find_corpora`.

    Raises:
        UserError: a file cannot be used and `skip_bad` is false, or no scan of a corpus can be used.
    """
    opened = []
    for corpus, root in located:
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
        _refuse_label_maps(corpus, cases, inventory)
        opened.append(CorpusData(corpus, is_phantom(root), cases, inventory))
    return opened


def _refuse_label_maps(corpus: Corpus, cases: Sequence[Case], inventory: Inventory) -> None:
    """Raises UserError if most scans of a corpus look like label maps; says so if some do."""
    if not (suspected := inventory.label_like):
        return
    listed = ", ".join(suspected[:3]) + (", ..." if len(suspected) > 3 else "")
    text = f"corpus {corpus.name!r}: {len(suspected)} of {len(cases)} files have few whole values as label maps do ({listed})"
    if 2 * len(suspected) > len(cases):
        raise UserError(f"{text}: give the folder of the scans, or name label maps as such (labels/, _seg)")
    say(f"DESERVES A LOOK: {text}; they are pre-trained on")


def overlap(data: TaskData, corpora: Sequence[CorpusData]) -> dict[tuple[str, str], float]:
    """Sorted pairs (scan of a corpus, test case) that look like one scan, whatever their names and headers, and how much.

    The values are the correlations that `harness.data.duplicates` describes.
    """
    scans = [
        (case.id, signature)
        for corpus in corpora
        for case in corpus.cases
        for signature in corpus.inventory.signatures[case.id]
    ]
    tested = [(case.id, signature) for case in data.split.test for signature in data.inventory.signatures[case.id]]
    return named_pairs(scans, tested)


def check_overlap(data: TaskData, corpora: Sequence[CorpusData], allow: bool) -> list[tuple[str, str]]:
    """The pairs of `overlap`. Raises UserError if there are any and `allow` is false; else prints them."""
    pairs = overlap(data, corpora)
    if not pairs:
        return []
    listed = listing(f"{scan} like {case}, correlation {value:.3f}" for (scan, case), value in pairs.items())
    if not allow:
        raise UserError(
            f"{len(pairs)} scans to pre-train on look like test cases of {data.task.name!r} ({listed}): take them out "
            "of the corpus, or give --allow-overlap, and the tables will say so"
        )
    say(f"OVERLAP: {len(pairs)} scans of the corpora look like test cases ({listed}); every table says so")
    return list(pairs)


def _phantom(images: Task | Corpus, runs: Path, number: int) -> Path:
    """The folder of a phantom with `number` cases, which is written if it does not exist."""
    root = runs / "phantoms" / f"{images.name}-v{PHANTOM}-n{number}"
    say_once(
        f"Using a PHANTOM of {images.name} in {root} (real data: --data or HARNESS_DATA). "
        "Its numbers say that the software works, nothing about any method."
    )
    if is_phantom(root):
        return root
    with held(root, f"the phantom {root.name}"):
        if is_phantom(root):
            return root
        write_phantom(images, root, number, seed=0)
    return root
