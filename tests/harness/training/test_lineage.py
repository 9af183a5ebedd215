"""A lineage is written with weights, read again by metadata, sidecar or tensors, and grows with every training."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from harness.data.duplicates import GRID, signature
from harness.training.lineage import (
    Foreign,
    Generation,
    Lineage,
    cache_lineage,
    lineage_of,
    read_lineage,
    say_what_is_lost,
    sidecar,
    tensor_digests,
)
from harness.training.stage_files import write_weights

NAMES = [f"{number:032x}" for number in range(1, 9)]


def scan(seed, channels=1):
    """Signatures of an image of smooth noise, (channels, GRID, GRID, GRID)."""
    coarse = torch.from_numpy(np.random.default_rng(seed).random((channels, 6, 6, 6), np.float32))
    voxels = torch.nn.functional.interpolate(coarse[None], (40, 36, 44), mode="trilinear")[0].numpy()
    return np.stack([signature(channel) for channel in voxels])


def rounded(triples):
    """Triples (scan, case, correlation) with two digits."""
    return [(scan, case, round(value, 2)) for scan, case, value in triples]


def generation(stage="pretrain", **changes):
    values = {"method": "simmim", "method_version": "1", "backbone": "unet", "harness": "0", "data": "a"}
    values |= {"num_scans": 1, "labels": False}
    return Generation(stage=stage, seed=0, settings={"pretrain": {"lr": 0.001}}, **values | changes)


def trained(*numbers, stage="pretrain", channels=1, labels=False):
    scans = {NAMES[number]: scan(number, channels) for number in numbers}
    return Lineage().after(generation(stage, num_scans=len(scans)), scans, scans if labels else ())


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {f"layer.{number}.weight": torch.randn(4, 3, generator=generator) for number in range(3)} | {
        "norm.weight": torch.ones(4),
        "norm.index": torch.arange(4),
    }


def read(path, cache):
    content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    return read_lineage(path, content, "0" * 32, cache)


def test_what_is_written_is_read_again(tmp_path):
    lineage, path = trained(0, 1, channels=2, labels=True), tmp_path / "weights.safetensors"
    write_weights(weights(), path, lineage)
    for again in (read(path, tmp_path / "cache"), lineage_of(path, tmp_path / "cache")):
        assert again.generations == lineage.generations
        assert again.labelled == lineage.labelled
        assert again.is_complete
        for name, signatures in lineage.scans.items():
            assert again.scans[name].shape == (2, GRID, GRID, GRID)
            assert np.array_equal(again.scans[name], signatures)
    assert torch.equal(load_file(path)["layer.0.weight"], weights()["layer.0.weight"])
    assert sidecar(path).name == "weights.lineage.safetensors"


def test_the_bytes_are_the_same_for_the_same_lineage(tmp_path):
    for name, numbers in (("a", (0, 1)), ("b", (1, 0))):
        write_weights(weights(), tmp_path / f"{name}.safetensors", trained(*numbers))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sidecar(tmp_path / "a.safetensors").read_bytes() == sidecar(tmp_path / "b.safetensors").read_bytes()


def test_a_scan_is_seen_by_its_files_or_by_its_voxels():
    lineage = trained(0, 1)
    same_files = {"a": (NAMES[0], scan(5))}
    turned = {"b": ("f" * 32, -scan(1)[:, ::-1].transpose(0, 2, 1, 3))}
    other = {"c": ("e" * 32, scan(7))}
    assert rounded(lineage.seen(same_files | turned | other)) == [(NAMES[0], "a", 1.0), (NAMES[1], "b", 1.0)]
    assert lineage.seen({}) == Lineage().seen(other) == []


def test_two_channels_are_compared_each():
    assert rounded(trained(3, channels=2).seen({"a": ("f" * 32, scan(3, 2)[1:])})) == [(NAMES[3], "a", 1.0)]


@pytest.mark.parametrize("change", ["renamed", "torch", "prefix", "encoder only"])
def test_weights_are_recognised_by_their_tensors(change, tmp_path):
    write_weights(weights(), tmp_path / "weights.safetensors", trained(0))
    cache_lineage(tmp_path / "weights.safetensors", tmp_path / "cache")
    write_weights(weights(1), tmp_path / "other.safetensors", trained(1))
    cache_lineage(tmp_path / "other.safetensors", tmp_path / "cache")
    content = load_file(tmp_path / "weights.safetensors")
    if change == "prefix":
        content = {f"module.{key}": value for key, value in content.items()}
    if change == "encoder only":
        content = {"layer.0.weight": content["layer.0.weight"]}
    path = tmp_path / "elsewhere" / ("a.pt" if change == "torch" else "a.safetensors")
    path.parent.mkdir()
    torch.save(content, path) if change == "torch" else save_file(content, path)
    lineage = read(path, tmp_path / "cache")
    assert set(lineage.scans) == {NAMES[0]}
    assert lineage.is_complete
    assert not read(path, tmp_path / "another cache").is_complete


def test_weights_of_two_files_have_the_lineage_of_both(tmp_path):
    for seed in range(2):
        write_weights(weights(seed), tmp_path / f"{seed}.safetensors", trained(seed))
        cache_lineage(tmp_path / f"{seed}.safetensors", tmp_path / "cache")
    save_file(weights(0) | {"layer.9.weight": weights(1)["layer.1.weight"]}, tmp_path / "merged.safetensors")
    lineage = read(tmp_path / "merged.safetensors", tmp_path / "cache")
    assert set(lineage.scans) == {NAMES[0], NAMES[1]}
    assert lineage.is_complete
    # Without a draw, which the seed of another test might make equal to known weights.
    unknown = torch.arange(12.0).reshape(4, 3)
    save_file(weights(0) | {"layer.9.weight": unknown}, tmp_path / "merged.safetensors")
    lineage = read(tmp_path / "merged.safetensors", tmp_path / "cache")
    assert set(lineage.scans) == {NAMES[0]}
    assert not lineage.is_complete


def test_metadata_of_other_tensors_is_not_believed(tmp_path):
    write_weights(weights(), tmp_path / "a.safetensors", trained(0))
    with safe_open(tmp_path / "a.safetensors", "numpy") as file:
        metadata = file.metadata()
    save_file({key: value + 1 for key, value in weights().items()}, tmp_path / "b.safetensors", metadata)
    lineage = read(tmp_path / "b.safetensors", tmp_path / "cache")
    assert not lineage.scans
    assert lineage.foreign


def test_of_equal_tensors_the_shortest_past_counts(tmp_path):
    """A frozen encoder has the same values before and after fine-tuning: the labels of fine-tuning did not touch it."""
    before = trained(0)
    after = before.after(generation("finetune", labels=True), {NAMES[1]: scan(1)}, [NAMES[1]])
    for name, lineage in (("after", after), ("before", before)):
        write_weights(weights(), tmp_path / f"{name}.safetensors", lineage)
        cache_lineage(tmp_path / f"{name}.safetensors", tmp_path / "cache")
    torch.save(weights(), tmp_path / "copy.pt")
    assert set(read(tmp_path / "copy.pt", tmp_path / "cache").scans) == {NAMES[0]}
    assert set(read(tmp_path / "after.safetensors", tmp_path / "no cache").scans) == {NAMES[0], NAMES[1]}


def test_a_files_own_lineage_is_not_overruled_by_a_shorter_one(tmp_path):
    write_weights(weights(), tmp_path / "own.safetensors", trained(0, 1))
    write_weights(weights(), tmp_path / "other.safetensors", trained(2))
    cache_lineage(tmp_path / "other.safetensors", tmp_path / "cache")
    assert set(read(tmp_path / "own.safetensors", tmp_path / "cache").scans) == {NAMES[0], NAMES[1]}


def test_a_training_says_nothing_about_tensors_that_it_left_alone(tmp_path):
    """Foreign weights under a frozen protocol stay foreign, and are not said to have gone through that training."""
    frozen = weights()
    whole = frozen | {"head.weight": torch.randn(2, 2)}
    write_weights(whole, tmp_path / "run.safetensors", trained(0, labels=True), tensor_digests(frozen))
    cache_lineage(tmp_path / "run.safetensors", tmp_path / "cache")
    torch.save(frozen, tmp_path / "foreign.pt")
    lineage = read(tmp_path / "foreign.pt", tmp_path / "cache")
    assert not lineage.scans
    assert not lineage.is_complete
    torch.save(whole, tmp_path / "copy.pt")
    lineage = read(tmp_path / "copy.pt", tmp_path / "cache")
    assert set(lineage.scans) == {NAMES[0]}
    assert not lineage.is_complete
    assert read(tmp_path / "run.safetensors", tmp_path / "cache").is_complete


def test_a_pipe_in_the_place_of_a_sidecar_is_none(tmp_path):
    save_file(weights(), tmp_path / "weights.safetensors")
    os.mkfifo(sidecar(tmp_path / "weights.safetensors"))
    assert not read(tmp_path / "weights.safetensors", tmp_path / "cache").is_complete


def test_words_of_a_lineage_do_not_act_on_the_terminal():
    assert str(generation(method="a\x1b[2J\nharness: error: b")).count("\n") == 0


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float64])
def test_tensors_of_any_type_tell_weights_apart(kind):
    assert len(tensor_digests({"a": torch.arange(8.0).to(kind)})) == 1
    assert not tensor_digests({"a": torch.ones(8).to(kind)})


def test_without_the_sidecar_scans_are_known_by_their_files_only(tmp_path, capsys):
    path = tmp_path / "weights.safetensors"
    write_weights(weights(), path, trained(0))
    sidecar(path).unlink()
    lineage = read(path, tmp_path / "cache")
    assert lineage.seen({"a": (NAMES[0], scan(5)), "b": ("f" * 32, scan(0))}) == [(NAMES[0], "a", 1.0)]
    assert not lineage.is_complete
    say_what_is_lost(lineage)
    assert "1 scans that the weights were trained on are known by their files only" in capsys.readouterr().err
    # Whoever has the scans gives their signatures back.
    assert (lineage + Lineage(scans={NAMES[0]: scan(0)})).is_complete
    assert not (lineage + Lineage(scans={NAMES[1]: scan(1)})).is_complete
    assert (trained(0) + lineage).is_complete


def test_the_cache_gives_signatures_that_the_sidecar_had(tmp_path):
    path = tmp_path / "weights.safetensors"
    write_weights(weights(), path, trained(0))
    cache_lineage(path, tmp_path / "cache")
    sidecar(path).unlink()
    assert rounded(read(path, tmp_path / "cache").seen({"b": ("f" * 32, scan(0))})) == [(NAMES[0], "b", 1.0)]


def test_generations_add_up(tmp_path):
    first = trained(0)
    path = tmp_path / "weights.safetensors"
    for number in (1, 2):
        step = generation("finetune", data=str(number), labels=True)
        write_weights(weights(number), path, first.after(step, {NAMES[number]: scan(number)}, [NAMES[number]]))
        first = read(path, tmp_path / "cache")
    assert [each.data for each in first.generations] == ["a", "1", "2"]
    assert set(first.scans) == set(NAMES[:3])
    assert first.labelled == {NAMES[1], NAMES[2]}
    both = first + trained(0)
    assert both.generations == first.generations
    record = json.loads(json.dumps(both.as_record()))
    assert (record["num_scans"], record["num_labelled"], len(record["generations"])) == (3, 2, 3)


def test_a_file_of_which_nobody_knows_stays_in_the_lineage(tmp_path):
    torch.save(weights(), tmp_path / "published.pt")
    lineage = read(tmp_path / "published.pt", tmp_path / "cache")
    assert lineage.foreign == (Foreign(file="published.pt", digest="0" * 32),)
    write_weights(
        weights(1), tmp_path / "weights.safetensors", lineage.after(generation("finetune"), {NAMES[0]: scan(0)})
    )
    assert not read(tmp_path / "weights.safetensors", tmp_path / "cache").is_complete


@pytest.mark.parametrize(
    "metadata", ["no JSON", "{}x", '{"version": 2}', '{"version": 1, "scans": ["../x"]}', '{"version": 1, "more": 1}']
)
def test_a_lineage_that_cannot_be_read_is_not_used(metadata, tmp_path, capsys):
    save_file(weights(), tmp_path / "weights.safetensors", {"lineage": metadata})
    assert not read(tmp_path / "weights.safetensors", tmp_path / "cache").is_complete
    assert "its lineage cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cubes", "owners"),
    [
        (torch.zeros(1, 2, 2, 2, dtype=torch.int8), torch.zeros(1, dtype=torch.int32)),
        (torch.zeros(1, *[GRID] * 3, dtype=torch.int8), torch.tensor([5], dtype=torch.int32)),
        (torch.zeros(2, *[GRID] * 3, dtype=torch.int8), torch.tensor([0], dtype=torch.int32)),
        (torch.zeros(1, *[GRID] * 3), torch.tensor([0], dtype=torch.int32)),
        (torch.zeros(1, *[GRID] * 3, dtype=torch.bfloat16), torch.tensor([0], dtype=torch.int32)),
        (torch.zeros(1, *[GRID] * 3, dtype=torch.float8_e4m3fn), torch.tensor([0], dtype=torch.int32)),
        (torch.zeros(1, *[GRID] * 3, dtype=torch.int8), torch.tensor([0.0])),
        (torch.zeros(1, *[GRID] * 3, dtype=torch.int8), torch.tensor([True])),
    ],
)
def test_signatures_of_another_shape_are_lost_ones(cubes, owners, tmp_path):
    path = tmp_path / "weights.safetensors"
    write_weights(weights(), path, trained(0))
    with safe_open(sidecar(path), "numpy") as file:
        metadata = file.metadata()
    save_file({"signatures": cubes, "scan": owners}, sidecar(path), metadata)
    assert not read(path, tmp_path / "cache").is_complete
    save_file({"signatures": cubes}, sidecar(path), metadata)
    assert not read(path, tmp_path / "cache").is_complete


def test_only_tensors_that_tell_weights_apart_count():
    assert len(tensor_digests(weights())) == 3
    assert not tensor_digests({"a": torch.zeros(5), "b": torch.arange(9), "c": torch.randn(1)})
    assert tensor_digests({"a": torch.arange(6.0).view(2, 3)}) != tensor_digests({"a": torch.arange(6.0)})
    assert tensor_digests({"a": torch.arange(6.0).view(2, 3).T}) == tensor_digests(
        {"b": torch.arange(6.0).view(2, 3).T.contiguous()}
    )


def test_weights_without_a_telling_tensor_are_foreign(tmp_path):
    write_weights({"a": torch.zeros(4)}, tmp_path / "weights.safetensors", trained(0))
    assert not read(tmp_path / "weights.safetensors", tmp_path / "cache").is_complete


def test_a_generation_in_words():
    assert str(generation(num_scans=3)) == "pre-training simmim on 3 scans of a, without labels"
    assert str(generation("finetune", labels=True)) == "fine-tuning after simmim on 1 scan of a, with labels"


def test_a_file_with_a_name_as_long_as_can_be_has_no_sidecar(tmp_path):
    path = tmp_path / f"{'n' * 246}.pt"
    torch.save(weights(), path)
    assert lineage_of(path, tmp_path / "cache") is None
    assert not read(path, tmp_path / "cache").is_complete
