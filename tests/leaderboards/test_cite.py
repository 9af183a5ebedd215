"""Everything that a table used is cited once, and what has no BibTeX is named."""

import re

import pytest

from harness.api.registry import Registry
from leaderboards.cite import cite
from leaderboards.records import load_run
from tests.leaderboards.made import write_run

ENTRY = "@misc{{{key},\n  title = {{{title}}}\n}}"


def cited(kind, name, title, key=None, **more):
    return {"kind": kind, "name": name, "bibtex": ENTRY.format(key=key or name, title=title), **more}


def runs(tmp_path, *lists):
    folders = [write_run(tmp_path / str(number), citations=each) for number, each in enumerate(lists)]
    return [load_run(folder) for folder in folders]


def test_each_entry_is_printed_once_and_twins_are_named(tmp_path):
    method, backbone = cited("method", "a", "A"), cited("backbone", "b", "A")
    task = cited("task", "t", "T", licence="CC-BY")
    text = cite(runs(tmp_path, [method, task], [method, backbone, task]), lambda *_: "")
    assert text.count("@misc{a,") == text.count("@misc{t,") == 1
    assert "% backbone b: see a" in text
    assert "% task t, licence: CC-BY\n@misc{t," in text
    assert text.startswith("@software{ssl_seg_harness,")


def test_two_entries_with_one_key_keep_both(tmp_path):
    text = cite(runs(tmp_path, [cited("method", "x", "A"), cited("backbone", "x", "B")]), lambda *_: "")
    assert "@misc{x," in text
    assert "@misc{x_backbone," in text


def test_many_entries_with_one_key_all_get_their_own(tmp_path):
    many = [cited("method", f"m{number}", str(number), key="ssl_seg_harness") for number in range(4)]
    text = cite(runs(tmp_path, many), lambda *_: "")
    keys = re.findall(r"^@\w+\{([^,]+),", text, re.MULTILINE)
    assert len(keys) == len(set(keys)) == 5


def test_other_kinds_and_signs_of_bibtex_in_names(tmp_path):
    odd = [cited("poem", "p", "P"), {"kind": "corpus", "name": "me@x", "bibtex": "  @misc{q ,\n  title = {Q}\n}"}]
    text = cite(runs(tmp_path, odd), lambda *_: "")
    assert "@misc{p," in text
    assert "@misc{q," in text
    assert all("@" not in line for line in text.splitlines() if line.startswith("%"))


def test_what_has_no_entry_is_said(tmp_path):
    unknown = {"kind": "weights", "name": "w.pt", "licence": "", "reference": "ask Jane", "bibtex": ""}
    text = cite(runs(tmp_path, [unknown]), lambda *_: "")
    assert "% weights w.pt: no BibTeX is known; ask Jane" in text


def test_older_records_are_looked_up_by_name(tmp_path):
    run = load_run(write_run(tmp_path / "run", method="hybridmim"))
    text = cite([run], lambda kind, name: ENTRY.format(key=f"{kind}_{name}", title=name))
    for kind in ("method", "backbone", "task"):
        assert f"@misc{{{kind}_{run.record[kind]}," in text


def test_text_that_would_act_on_a_terminal_does_not(tmp_path):
    text = cite(runs(tmp_path, [cited("method", "a", "\x1b[2J", licence="\x1b]0;x\x07")]), lambda *_: "")
    assert "\x1b" not in text


@pytest.mark.parametrize("kind", ["method", "backbone", "task", "corpus", "weights"])
def test_every_shipped_plugin_has_an_entry(kind):
    registry = Registry()
    nothing = {"scratch", "supervised", "untrained", "official"}
    for name in set(registry.names(kind)) - nothing:
        entry = registry.citation(kind, name)
        assert entry.startswith("@"), name
        assert entry.count("{") == entry.count("}"), name
        assert entry.endswith("\n}"), name
    assert registry.citation(kind, "no such plugin") == ""
