"""Sweeps from the text of their files, short ones among them."""

from harness.config.request import Request
from harness.sweeps.cells import SweepCell, read, select_cells

TINY_SWEEP = """
[defaults]
task = "msd_hippocampus"
[defaults.settings]
"pretrain.steps" = 2
"pretrain.warmup_steps" = 0
"pretrain.crop" = [32, 32, 64]
"finetune.steps" = 2
"finetune.warmup_steps" = 0
"finetune.crop" = [32, 32, 64]
"backbone.features" = [4, 4, 8, 8, 8]
"""


def cells_of(tmp_path, text, **base) -> list[SweepCell]:
    """What a file of this text expands to."""
    path = tmp_path / "sweep.toml"
    path.write_text(text)
    return read(path, Request(method="", task="", **base))


DYING = """
import os
from harness import Method

class Dying(Method):
    \"\"\"Takes its process with it.\"\"\"
    name = "dying"
    def forward(self, batch):
        os._exit(9)
"""


def planned(tmp_path, hippocampus_phantom, text, plugin, **more):
    """The cells of a short sweep of a plugin: to run, and known."""
    path = tmp_path / "plugin.py"
    path.write_text(plugin)
    given = {"data": hippocampus_phantom, "runs": tmp_path / "runs", "plugins": (str(path),)}
    return select_cells(cells_of(tmp_path, TINY_SWEEP + text, **given), tmp_path / "notes", **more)
