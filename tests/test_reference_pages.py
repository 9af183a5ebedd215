"""The pages that follow from the code: commands, settings, and how to cite. And the documentation as a site.

`HARNESS_WRITE_DOCS=1 pytest tests/test_reference_pages.py` writes the pages.
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.api.registry import Registry
from harness.api.settings import describe_settings
from harness.cli.list import SECTIONS, _of_section
from harness.cli.main import _parser

ROOT = Path(__file__).parents[1]
WRITES = "Written by `HARNESS_WRITE_DOCS=1 pytest tests/test_reference_pages.py`."
CONTROLS = ("scratch", "supervised", "untrained")


def cell(text: str) -> str:
    """Text for a cell: nothing in it is markup but code between backticks, where only a bar has to be escaped."""
    parts = " ".join(str(text).split()).replace("<", "&lt;").replace("|", "&#124;").split("`")
    parts[::2] = [re.sub(r"([*\[\]])", r"\\\1", part) for part in parts[::2]]
    parts[1::2] = [f"<code>{part}</code>" for part in parts[1::2]]
    return "".join(parts)


def verbs(parser: argparse.ArgumentParser) -> dict[str, tuple[argparse.ArgumentParser, str]]:
    """The sub-commands of a parser with their help."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            texts = {each.dest: each.help or "" for each in action._choices_actions}
            return {name: (inner, texts.get(name, "")) for name, inner in action.choices.items()}
    return {}


def leaves(parser: argparse.ArgumentParser) -> Iterator[tuple[argparse.ArgumentParser, str]]:
    for inner, text in verbs(parser).values():
        if verbs(inner):
            yield from leaves(inner)
        else:
            yield inner, text


def options(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        name = ", ".join(action.option_strings) or str(action.metavar or action.dest)
        value = action.metavar or ("|".join(map(str, action.choices)) if action.choices else "")
        shown = f"{name} {value}" if action.option_strings and value else name
        needed = " (required)" if action.required and action.option_strings else ""
        # The defaults of some options come from the environment of whoever writes the page, so the help says them.
        yield f"| {cell(f'`{shown}`')} | {cell(action.help or '')}{needed} |"


def commands_page() -> str:
    lines = [f"# Commands\n\n{WRITES} `harness COMMAND --help` says the same.\n"]
    for parser, text in leaves(_parser()):
        lines += [f"## {parser.prog}\n", f"{text[:1].upper()}{text[1:]}.\n"]
        lines += ["| option | meaning |\n|---|---|", *options(parser), ""]
    return "\n".join(lines)


def settings_table(rows: list[dict[str, str]]) -> str:
    lines = ["| setting | default | allowed | meaning |\n|---|---|---|---|"]
    lines += [
        f"| `{row['setting']}` | {cell(row['default'])} | {cell(row['allowed'])} | {cell(row['description'])} |"
        for row in rows
    ]
    return "\n".join(lines) if rows else "Nothing to set."


def settings_page() -> str:
    registry = Registry()
    blocks = [f"# Settings\n\n{WRITES} `--set SETTING=VALUE` gives one; `harness list methods NAME` says the same."]
    blocks += [f"## Every run: {section}\n\n{settings_table(_of_section(section, {}))}" for section in SECTIONS]
    for kind in ("method", "backbone"):
        for name in registry.names(kind):
            blocks.append(
                f"## {kind.capitalize()} {name}\n\n"
                + settings_table(describe_settings(registry.load(kind, name).Config, kind))
            )
    return "\n\n".join(blocks) + "\n"


def citing_page() -> str:
    registry = Registry()
    blocks = [
        f"# Citing\n\n{WRITES} Cite the harness by `CITATION.cff`, and what your run used. `harness leaderboard cite` prints "
        "BibTeX for everything that a table used. A paragraph per method, to be taken over:"
    ]
    for row in registry.describe("method"):
        if row["name"] in CONTROLS:
            continue
        parts = " and ".join(row["trains"])
        does = (
            f"It trains and transfers {parts}."
            if parts
            else "Fine-tuning starts from these weights: cite their authors, too."
        )
        what = row["description"].rstrip(".")
        text = (
            f"Pre-training with `{row['name']}` (version {row['version']} of its implementation in ssl-seg-harness): "
            f"{what[:1].lower()}{what[1:]} "
            f"({row['reference']}). {does} The matched control is training from scratch with the same "
            "network, crops, fine-tuning steps and test cases."
        )
        bibtex = registry.citation("method", row["name"])
        blocks.append(f"## {row['name']}\n\n> {text}" + (f"\n\n```bibtex\n{bibtex.strip()}\n```" if bibtex else ""))
    return "\n\n".join(blocks) + "\n"


@pytest.mark.parametrize("name", ["commands", "settings", "citing"])
def test_the_page_follows_from_the_code(name):
    page = ROOT / "docs" / f"{name}.md"
    text = {"commands": commands_page, "settings": settings_page, "citing": citing_page}[name]()
    if os.environ.get("HARNESS_WRITE_DOCS"):
        page.write_text(text)
    assert page.read_text() == text, "HARNESS_WRITE_DOCS=1 pytest tests/test_reference_pages.py writes it anew"


def test_every_command_and_every_method_is_on_its_page():
    commands = (ROOT / "docs/commands.md").read_text()
    for name in verbs(_parser()):
        assert f"## harness {name}" in commands
    citing = (ROOT / "docs/citing.md").read_text()
    methods = set(Registry().names("method")) - set(CONTROLS)
    assert set(re.findall(r"^## (\w+)$", citing, re.MULTILINE)) == methods
    assert citing.count("```bibtex") >= len(methods) - 1  # `official` has the citation of its weights


def test_the_documentation_builds_without_a_warning(tmp_path):
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    pages = sorted(path.parent.name for path in (tmp_path / "site").rglob("index.html"))
    assert {"first_comparison", "write_a_backbone", "commands", "hybridmim"} < set(pages)
