"""What the weights that a run starts from have been trained on, and whether test cases are among it.

`harness.training.lineage` has the format of a lineage; `RunPlan` says what the run itself trains on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from harness.api.nnssl import own_citations
from harness.api.registry import Registry
from harness.api.settings import Settings
from harness.api.task import Case, Task
from harness.api.weight_files import read_weights_file
from harness.config.request import Request
from harness.data.corpus import folder_corpus, with_normalisation
from harness.data.datasets import CorpusData, TaskData, open_corpora, read_spec
from harness.data.duplicates import Signature
from harness.data.inventory import Inventory
from harness.system.console import say
from harness.system.errors import UserError, listing
from harness.system.files import printable
from harness.training.lineage import Foreign, Lineage, cache_lineage, read_lineage, say_what_is_lost
from harness.training.models import Plugins

MOST_SAID = 10  # trainings of the starting weights that are printed
UNKNOWN = "unknown"
"""Value of `method.corpus` for weights of which nobody says what they were trained on."""


def named_files(settings: Settings) -> dict[str, Path]:
    """The files that the settings of a method name, by field; those of a tuple by field and number."""
    files: dict[str, Path] = {}
    for name, value in settings:
        items = value if isinstance(value, list | tuple) else [value]
        for number, item in enumerate(items):
            if isinstance(item, Path):
                files[name if item is value else f"{name}.{number}"] = item
    return files


def parent_lineage(
    settings: Settings, files: Mapping[str, str], registry: Registry, task: Task, request: Request
) -> tuple[Lineage, list[dict[str, str]]]:
    """The lineage of the files that the settings of a method name; empty where they name none.

    A file without a lineage, or one that cannot be read as weights, is foreign: then `method.corpus` may say what it was
    trained on.

    Args:
        settings: of the method.
        files: digest of the content of each file, by setting.

    Returns:
        the lineage; and what the files themselves ask to be cited, as in `citations`.

    Raises:
        UserError: `method.corpus` is neither a folder nor a known name, or cannot be used.
    """
    lineage, cache = Lineage(), request.runs / "cache"
    cited: list[dict[str, str]] = []
    for name, path in named_files(settings).items():
        try:
            file = read_weights_file(path)
        except UserError:  # a method that needs weights says so itself
            lineage += Lineage(foreign=(Foreign(file=printable(path.name)[:200], digest=files[name]),))
            continue
        lineage += read_lineage(path, file.tensors, files[name], cache)
        cache_lineage(path, cache)
        cited += own_citations(file)
    spec = getattr(settings, "corpus", UNKNOWN)
    if spec != UNKNOWN:
        lineage = _with_statement(lineage, spec, registry, task, request)
    for each in lineage.generations[-MOST_SAID:]:
        say(f"the weights went through: {each}")
    say_what_is_lost(lineage)
    for unknown in lineage.foreign:
        if not unknown.scans:
            stated = f", stated: {unknown.stated}" if unknown.stated else ""
            say(
                f"{unknown.file}: what it was trained on is not known{stated}, so that tables say `unknown` for the test cases "
                "that it has seen; method.corpus=DIR or NAME says what it was"
            )
    return lineage, cited


def _with_statement(lineage: Lineage, spec: str, registry: Registry, task: Task, request: Request) -> Lineage:
    """The lineage with the scans that the user states for its foreign files, if these scans are at hand."""
    data, label = _stated_scans(spec, registry, task, request)
    # A scan that could not be read was perhaps trained on.
    statement = {"stated": label[:1000], "scans": data is not None and not data.inventory.bad}
    foreign = tuple(each if each.scans else each.model_copy(update=statement) for each in lineage.foreign)
    lineage = replace(lineage, foreign=foreign)
    if data is None:
        return lineage
    return lineage + Lineage(scans=scans_of(data.inventory, data.cases))


def _stated_scans(spec: str, registry: Registry, task: Task, request: Request) -> tuple[CorpusData | None, str]:
    """The scans that a value of `method.corpus` names, None if they are not at hand; and the statement for the record."""
    if spec in registry.names("weights"):
        published = registry.load("weights", spec)
        return None, f"{published.corpus} ({spec})"
    name, folder, normalisation = read_spec(registry, spec)
    if folder is not None:
        corpus = folder_corpus(folder, task)
    else:
        corpus = registry.load("corpus", name)
        try:
            folder = corpus.find(request.data) if request.data is not None else None
        except UserError as error:
            say(f"method.corpus={spec}: {error}")
        if folder is None:
            return None, name
    located = [(with_normalisation(corpus, normalisation), folder)]
    (data,) = open_corpora(located, request.runs / "cache", request.skip_bad)
    return data, data.label


def check_lineage(data: TaskData, lineage: Lineage, allow: bool) -> list[tuple[str, str]]:
    """The pairs (digest of a scan that the starting weights were trained on, test case).

    Raises:
        UserError: there are any, and `allow` is false.
    """
    digests, signatures = data.inventory.digests, data.inventory.signatures
    pairs = lineage.seen({case.id: (digests[case.id], signatures[case.id]) for case in data.split.test})
    if not pairs:
        return []
    # In ascending order, so that the highest correlation of a case stays.
    cases = {case: value for value, case in sorted((value, case) for _, case, value in pairs)}
    labels = " with their labels" if lineage.labelled & {scan for scan, _, _ in pairs} else ""
    listed = f"{len(cases)} of {len(data.split.test)} test cases of {data.task.name!r} ("
    listed += (
        listing(case if value == 1 else f"{case}, correlation {value:.3f}" for case, value in sorted(cases.items()))
        + ")"
    )
    if not allow:
        raise UserError(
            f"the weights were trained on {listed}{labels}: give other weights or another --split, or give --allow-overlap, and "
            "the tables will say so"
        )
    say(f"OVERLAP: the weights were trained on {listed}{labels}; every table says so")
    return [(f"weights:{scan[:12]}", case) for scan, case, _ in pairs]


def scans_of(inventory: Inventory, cases: Sequence[Case]) -> dict[str, Signature]:
    """Digest of the files -> signatures, of some cases of an inventory."""
    return {inventory.digests[case.id]: inventory.signatures[case.id] for case in cases}


def citations(
    registry: Registry, request: Request, plugins: Plugins, task: Task, corpora: Sequence[CorpusData]
) -> list[dict[str, str]]:
    """What to cite for a run: kind, name, licence, reference in words and BibTeX of each thing that it uses.

    A licence or BibTeX that is not known is empty. Controls are nothing to cite.
    """
    cited: list[tuple[str, str, str, str]] = [
        ("backbone", request.backbone, "", plugins.backbone.reference),
        ("task", request.task, task.licence, task.reference),
        *(("corpus", each.corpus.name, each.corpus.licence, each.corpus.reference) for each in corpora),
    ]
    if plugins.method.trains and not plugins.method.uses_labels:
        cited.insert(0, ("method", request.method, "", plugins.method.reference))
    settings = dict(setting.split("=", 1) for setting in request.settings)
    if (name := settings.get("method.corpus", UNKNOWN)) in registry.names("weights"):
        published = registry.load("weights", name)
        cited.append(("weights", name, published.licence, published.reference))
    return [
        {
            "kind": kind,
            "name": name,
            "licence": licence,
            "reference": reference,
            "bibtex": registry.citation(kind, name),
        }
        for kind, name, licence, reference in cited
    ]
