"""Weights are read without executing anything, and a file that holds none is named."""

import pickle
import zipfile
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import save_file

from harness import UserError, read_state_dict

DISGUISED = [
    ("pt", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
    ("safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
    ("pt", b"\n<!DOCTYPE html><html><title>Sign in</title></html>", "web page"),
    ("safetensors", b"<html>", "web page"),
]


def test_nothing_in_a_file_is_executed(tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    path = tmp_path / "attack.pt"
    torch.save({"state_dict": Attack()}, path)
    with pytest.raises(UserError, match=r"cannot be read as weights: it holds an object of \S*open; give"):
        read_state_dict(path)
    path.write_bytes(pickle.dumps(Attack()))
    with pytest.raises(UserError, match="cannot be read as weights"):
        read_state_dict(path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.pt", b"nonsense"), ("a.pt", b""), ("a.safetensors", b"nonsense"), ("a.safetensors", b"\xff" * 64)],
)
def test_broken_files_are_named(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        read_state_dict(tmp_path / name)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"state_dict": {"a": 1}}, torch.zeros(2)])
def test_a_checkpoint_without_tensors_says_so(content, tmp_path):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match="holds no state dict"):
        read_state_dict(tmp_path / "a.pt")


def test_a_checkpoint_that_contains_itself_ends(tmp_path):
    content = {}
    content["state_dict"] = content
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match="holds no state dict"):
        read_state_dict(tmp_path / "a.pt")


def test_a_checkpoint_that_unpacks_to_more_than_the_memory_is_refused(tmp_path, monkeypatch):
    torch.save({"a": torch.zeros(1_000_000)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "a.pt", "w", 8) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert (tmp_path / "a.pt").stat().st_size < 100_000
    assert len(read_state_dict(tmp_path / "a.pt")["a"]) == 1_000_000
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2_000_000))
    with pytest.raises(UserError, match=r"a\.pt unpacks to 0\.0 GiB"):
        read_state_dict(tmp_path / "a.pt")


def test_a_few_bytes_that_stand_for_a_huge_tensor_are_refused(tmp_path, monkeypatch):
    torch.save({"a": torch.arange(2.0).unsqueeze(1).expand(2, 10**9)}, tmp_path / "a.pt")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**9))
    with pytest.raises(UserError, match=r"holds tensors of 7\.5 GiB"):
        read_state_dict(tmp_path / "a.pt")


NETWORK = {f"layer{number}.weight": torch.full((2,), float(number)) for number in range(3)}


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": NETWORK, "best": torch.tensor(0.8), "step": torch.tensor(3)},  # Lightning and others
        {"ema_decay": torch.tensor(0.9), "model": {"state_dict": NETWORK}},
        {"teacher": NETWORK},
        {"student": NETWORK, "epoch": 3},
        {"state_dict_ema": NETWORK},
        {"model_ema": NETWORK},
        {f"_orig_mod.{name}": value for name, value in NETWORK.items()},
        {"state_dict": {name.replace(".", "._orig_mod."): value for name, value in NETWORK.items()}},
    ],
)
def test_the_network_is_read_from_whatever_training_code_put_around_it(content, tmp_path):
    torch.save(content, tmp_path / "a.pt")
    found = read_state_dict(tmp_path / "a.pt")
    assert found.keys() == NETWORK.keys()
    assert all(torch.equal(found[name], NETWORK[name]) for name in NETWORK)


def test_of_several_networks_the_first_is_read_and_named(tmp_path, capsys):
    other = {name: value + 10 for name, value in NETWORK.items()}
    torch.save({"student": other, "teacher": NETWORK}, tmp_path / "a.pt")
    assert torch.equal(read_state_dict(tmp_path / "a.pt")["layer0.weight"], NETWORK["layer0.weight"])
    assert "holds teacher, student: teacher is read" in capsys.readouterr().err


def test_what_a_checkpoint_holds_is_listed_where_it_holds_no_network(tmp_path):
    torch.save({"optimizer": {"lr": 1}, "epoch": 3, "\x1b[31mred": 1}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"it holds 'optimizer', 'epoch', '\\x1b\[31mred': save"):
        read_state_dict(tmp_path / "a.pt")


@pytest.mark.parametrize(("name", "content", "said"), DISGUISED, ids=["LFS", "LFS safe", "page", "page safe"])
def test_a_file_that_is_something_else_is_called_what_it_is(name, content, said, tmp_path):
    path = tmp_path / f"weights{'.safetensors' if name == 'safetensors' else '.pt'}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"is a .*{said}"):
        read_state_dict(path)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_names_of_a_compiled_network_are_plain_in_every_format(name, tmp_path):
    content = {"_orig_mod.conv.weight": torch.ones(2), "block._orig_mod.bias": torch.zeros(2)}
    (save_file if name.endswith("safetensors") else torch.save)(content, tmp_path / name)
    assert set(read_state_dict(tmp_path / name)) == {"conv.weight", "block.bias"}
