"""BibTeX for everything that the runs of a table used."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from leaderboards.records import Run
from leaderboards.text import printable

KEY = re.compile(r"^@(\w+)\{([^,\s]*)\s*,")
OWN = "ssl_seg_harness"
ORDER = ("method", "backbone", "weights", "task", "corpus")


def cite(runs: Iterable[Run], lookup: Callable[[str, str], str]) -> str:
    """One BibTeX entry for each method, network, file of weights, task and corpus of the runs, and one for the harness.

    Entries that differ in their key only are printed once. What has no entry is named in a comment, with its licence and
    reference in words, so that nothing is left out in silence.

    Args:
        lookup: gives the entry of (kind, name) for records of versions before 0.6.0, which hold none; empty if unknown.
    """
    runs = list(runs)
    cited: dict[tuple[str, str], Mapping[str, Any]] = {}
    for run in runs:
        for each in run.record.get("citations") or _from_names(run, lookup):
            cited.setdefault((each["kind"], each["name"]), each)
    versions = sorted({str(run.record.get("environment", {}).get("harness", "unknown")) for run in runs})
    lines = [_harness(versions)]
    printed: dict[str, str] = {}
    order = {kind: number for number, kind in enumerate(ORDER)}
    for (kind, name), each in sorted(cited.items(), key=lambda pair: (order.get(pair[0][0], len(order)), pair[0])):
        lines.append(_entry(kind, name, each, printed))
    return "\n\n".join(lines)


def _entry(kind: str, name: str, each: Mapping[str, Any], printed: dict[str, str]) -> str:
    """The comment and the entry of one thing; only the comment where its entry was printed before, or is not known."""
    licence = f", licence: {each['licence']}" if each.get("licence") else ""
    comment = _comment(f"{kind} {name}{licence}")
    # Lines of BibTeX stay lines; characters that would act on a terminal do not.
    entry = "\n".join(map(printable, str(each.get("bibtex") or "").strip().splitlines()))
    match = KEY.match(entry)
    if match is None:
        return f"{comment}: no BibTeX is known; {_comment(each.get('reference') or 'no reference either')[2:]}"
    body = entry[match.end() :]
    if body in printed:
        return f"{comment}: see {printed[body]}"
    taken = {OWN, *printed.values()}
    keys = (match[2], f"{match[2]}_{kind}", *(f"{match[2]}_{kind}_{number}" for number in range(2, len(taken) + 3)))
    key = next(each_key for each_key in keys if each_key not in taken)
    printed[body] = key
    return f"{comment}\n@{match[1]}{{{key},{body}"


def _comment(text: str) -> str:
    """A line that BibTeX skips: an at sign would begin an entry, even behind a percent sign."""
    return f"% {printable(text)}".replace("@", "(at)")


def _from_names(run: Run, lookup: Callable[[str, str], str]) -> list[dict[str, str]]:
    """What a record without citations names: method, network and task, and corpora."""
    record, data = run.record, run.record["data"]
    named = [("backbone", record["backbone"]), ("task", record["task"])]
    named += [] if run.control else [("method", record["method"])]
    named += [("corpus", corpus["name"]) for corpus in data.get("corpora", [])]
    licences = {"task": str(data.get("licence", ""))}
    return [
        {"kind": kind, "name": name, "licence": licences.get(kind, ""), "reference": "", "bibtex": lookup(kind, name)}
        for kind, name in named
    ]


def _harness(versions: list[str]) -> str:
    """The entry of this software."""
    return (
        f"@software{{{OWN},\n"
        "  title = {ssl-seg-harness: Matched Comparisons of Self-Supervised Pre-Training for {3D} Medical Image Segmentation},\n"
        "  author = {{The ssl-seg-harness authors}},\n"
        f"  version = {{{printable(', '.join(versions))}}}\n"
        "}"
    )
