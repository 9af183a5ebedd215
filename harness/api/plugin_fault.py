"""Says where a plugin failed and what its contract wants, for an exception that a plugin's code raised."""

import re
import traceback
from collections.abc import Iterable
from pathlib import Path

from harness.api.plugin_code import code_files
from harness.api.registry import Registry
from harness.system.files import ENGINE

CONTRACT = {
    "forward": "forward(batch) returns named loss terms: a dict of scalars; batch['image'] is (N, C, x, y, z)",
    "transform": "transform(config) is a classmethod that returns f(sample, rng), or None",
    "prepare": "prepare(volumes, preparation) returns the sources of the samples",
    "after_step": "after_step(step) is called after each step and returns nothing",
    "check": "check(crop, batch_size) raises UserError where the settings do not fit",
    "show": "show(batch) returns images by name, each (N, C, x, y, z) in [0, 1]",
    "weights": "weights() returns tensors by the keys of the backbone's state dict",
    "encode": "encode(image) returns the features of each level, the finest first",
    "decode": "decode(features) returns the features at the resolution of the image",
    "__init__": "__init__(config, backbone) of a method, and __init__(config, in_channels) of a backbone, call super().__init__",
    "find": "find(data) returns the task's own folder, or raises UserError",
    "cases": "cases(root) returns the labelled cases below the folder, or raises UserError",
}
"""What the harness expects of each function of a plugin that it calls."""
PLUGIN_FOLDERS = ("methods", "backbones", "tasks", "weights")
"""Where the harness has its own plugins, beside the engine."""
IN_WORKER = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<name>\w+)')


def explain_plugin_fault(error: BaseException, plugins: Iterable[str]) -> str | None:
    """As `plugin_fault`, followed by the commands that say more."""
    fault = plugin_fault(error, plugins)
    more = "`harness check-method` or `harness data check` checks the whole contract, --traceback shows where the call came from"
    return f"{fault}; {more}" if fault else None


def plugin_fault(error: BaseException, plugins: Iterable[str]) -> str | None:
    """One line about an exception that came out of a plugin's code; None if no code of a plugin took part.

    Args:
        error: with its traceback. That of a loader's worker is in its text.
        plugins: the values of `--plugin`; installed plugins are known.
    """
    frames = [(frame.filename, frame.lineno or 0, frame.name) for frame in traceback.extract_tb(error.__traceback__)]
    frames += [(match["file"], int(match["line"]), match["name"]) for match in IN_WORKER.finditer(str(error))]
    files = _foreign_code(plugins)
    own = [frame for frame in frames if Path(frame[0]).resolve() in files]
    if not own:
        return None
    file, line, name = own[-1]
    due = next((CONTRACT[called] for _, _, called in own if called in CONTRACT), "")
    # The text of an error in a worker ends with the error itself.
    text = str(error).strip().splitlines()[-1] if str(error).strip() else ""
    kind = "" if text.startswith(type(error).__name__) else f"{type(error).__name__}: "
    return f"plugin {file}, line {line}, in {name}: {kind}{text[:300]}" + (f" ({due})" if due else "")


def _foreign_code(plugins: Iterable[str]) -> set[Path]:
    """The files of all plugins that are not the harness's own."""
    sources = [source.resolve() for source in Registry(list(plugins)).sources()]
    own = {ENGINE.parent / name for name in PLUGIN_FOLDERS}
    return {file for source in sources if source.parent not in own for file in code_files(source)}
