"""A plugin that fails is told so in one line, with its file, its line and what its contract wants."""

import pytest

from harness.api.plugin_fault import explain_plugin_fault
from tests.harness.commands import harness, last_error, record_of, short_run

PLUGIN = '''
import torch
from harness import Method, Settings


class Broken(Method):
    """Predict the mean."""

    name = "broken"

    class Config(Settings):
        pass

    def __init__(self, config, backbone):
        super().__init__(config, backbone)
        self.restore = torch.nn.Conv3d(backbone.width, backbone.in_channels, 1)
{constructor}

    def forward(self, batch):
        image = batch["image"]
        restored = self.restore(self.backbone.decode(self.backbone.encode(image)))
{forward}

    def show(self, batch):
{show}
'''
FINE = {
    "constructor": "",
    "forward": "        return {'mean': (restored - image).square().mean()}",
    "show": "        return {}",
}
FAULTS = {
    "forward raises": (
        {"forward": "        return {'mean': restored.no_such_thing()}"},
        "in forward: AttributeError: ",
    ),
    "forward gives a tensor": (
        {"forward": "        return (restored - image).square().mean()"},
        "Broken: forward must return a dict of named loss terms, it returned Tensor",
    ),
    "forward gives no scalar": (
        {"forward": "        return {'mean': (restored - image).square()}"},
        "term 'mean' is not a scalar tensor but of shape (2, 1, 32, 32, 64): take a mean or a sum",
    ),
    "the constructor raises": ({"constructor": "        [][1]"}, "in __init__: IndexError: list index out of range"),
}


def write(tmp_path, **changes):
    path = tmp_path / "broken.py"
    path.write_text(PLUGIN.format(**FINE | changes))
    return path


def run_words(path, data, runs):
    return [*short_run("broken", data), "--plugin", path, "--runs", runs]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_author_of_a_plugin_gets_one_line(fault, hippocampus_phantom, tmp_path, capsys):
    changes, says = FAULTS[fault]
    path = write(tmp_path, **changes)
    harness(*run_words(path, hippocampus_phantom, tmp_path / "runs"), status=2)
    message = last_error(capsys)
    assert says in message
    if "raises" in fault:
        assert f"plugin {path}, line " in message
        assert "(forward(batch) returns" in message or "call super().__init__" in message
        assert "harness check-method" in message


def test_the_whole_traceback_is_shown_where_it_is_asked_for(hippocampus_phantom, tmp_path, capsys):
    path = write(tmp_path, forward="        return {'mean': restored.no_such_thing()}")
    words = run_words(path, hippocampus_phantom, tmp_path / "runs")
    harness(*words, status=2)
    assert "Traceback" not in capsys.readouterr().err
    harness(*words, "--traceback", status=2)
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert f"plugin {path}, line " in err.splitlines()[-1]


@pytest.mark.parametrize(
    "show",
    ["        return {'a': [][1]}", "        return [1]", "        return {'a': batch['image'][0]}"],
    ids=["raises", "a list", "no batch"],
)
def test_a_picture_that_fails_costs_no_run(show, hippocampus_phantom, tmp_path, capsys):
    harness(*run_words(write(tmp_path, show=show), hippocampus_phantom, tmp_path / "runs"))
    err = capsys.readouterr().err
    assert "no pretraining.png: " in err or "no restoration.png: " in err
    assert "the training does not depend on it" in err
    assert record_of(tmp_path / "runs", "broken")["run_id"]


def test_a_module_that_the_plugin_imports_is_the_plugins_and_the_harness_is_not(tmp_path, monkeypatch):
    path, helper = write(tmp_path), tmp_path / "helper.py"
    path.write_text("from helper import encode\n" + PLUGIN.format(**FINE))
    helper.write_text("def encode(image):\n    return image[1]\n")
    monkeypatch.syspath_prepend(tmp_path)
    space = {}
    exec(compile(helper.read_text(), helper, "exec"), space)
    with pytest.raises(IndexError) as caught:
        space["encode"]([])
    explained = explain_plugin_fault(caught.value, [str(path)])
    assert (
        f"plugin {helper}, line 2, in encode: IndexError: list index out of range (encode(image) returns" in explained
    )
    assert explain_plugin_fault(caught.value, []) is None
    with pytest.raises(TypeError) as caught:
        explain_plugin_fault(IndexError(), 3)
    assert explain_plugin_fault(caught.value, [str(path)]) is None


def test_an_error_in_a_loader_process_names_the_plugins_line(tmp_path):
    path = write(tmp_path)
    text = (
        f'Caught ValueError in DataLoader worker process 0.\nOriginal Traceback:\n  File "{path}", line 7, '
        'in transform\n    x\n  File "/usr/lib/numpy/x.py", line 1, in draw\nValueError: no such draw'
    )
    explained = explain_plugin_fault(ValueError(text), [str(path)])
    assert (
        f"plugin {path}, line 7, in transform: ValueError: no such draw (transform(config) is a classmethod"
        in explained
    )
