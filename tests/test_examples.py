"""The notebook in examples/ runs as it stands."""

import json
from pathlib import Path

import matplotlib as mpl
import pandas as pd

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_every_cell_runs(monkeypatch, capsys):
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.delenv("HARNESS_DATA", raising=False)
    mpl.use("Agg")
    notebook = json.loads((EXAMPLES / "from_python.ipynb").read_text())
    names: dict = {"Image": str}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"]).replace("from IPython.display import Image", "")
            exec(compile(source, "from_python.ipynb", "exec"), names)
    assert names["run"].record["method"] == "hybridmim"
    assert "PHANTOM" not in str(names["results"])
    assert names["difference"].is_file()
    assert isinstance(names["cases"], pd.DataFrame)
    assert names["comparison"].seeds == [0, 1, 2]
    out = capsys.readouterr().out
    assert "scratch 0." in out
    assert "Dice minus scratch with 95 % intervals" in out
