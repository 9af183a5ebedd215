"""Profiles of training steps: the CSV, the table in the terminal, the figure."""

import csv
import re

import pytest

from leaderboards import profiles


def row(**changes):
    """A measured step, as `harness profile` gives it."""
    made = {
        "machine": "M",
        "device": "cpu",
        "threads": 2,
        "torch": "2.9",
        "stage": "pretrain",
        "method": "m",
        "variant": "",
        "backbone": "unet",
        "crop": "32x32x32",
        "batch_size": 2,
        "precision": "fp32",
        "settings": "",
        "step_ms_p50": 60.0,
        "step_ms_p95": 80.0,
        "forward_ms_p50": 20.0,
        "backward_ms_p50": 30.0,
        "optimizer_ms_p50": 10.0,
        "data_wait_ms_p50": 1.5,
        "data_wait_share": 0.01,
        "sample_ms": 30.0,
        "workers": 2,
        "workers_needed": 1,
        "samples_per_s": 33.333,
        "first_over_this": 1.0,
        "first_over_this_low": 0.9,
        "first_over_this_high": 1.1,
        "gflop": 12.34,
        "of_gemm": 0.5,
        "of_convolution": 0.75,
        "of_bandwidth": None,
        "device_busy": None,
        "bound": "",
        "gemm_tflop_per_s": 1.5,
        "convolution_tflop_per_s": 0.7,
        "copy_gb_per_s": 10.0,
        "host_peak_gib": 1.25,
        "device_peak_gib": None,
        "spread": 0.01,
        "ceiling_spread": 0.02,
        "noisy": False,
        "problem": "",
    }
    assert set(changes) <= set(made)
    return made | changes


def cells(line):
    return [cell for cell in re.split(r"\s{2,}", line) if cell]


def test_the_csv_has_every_column_and_six_digits_and_nothing_where_nothing_was_measured(tmp_path):
    path = tmp_path / "new" / "steps.csv"
    profiles.write([row(step_ms_p50=1234.56789, settings="a=1, b=2"), row(problem="out of memory")], path)
    with path.open(newline="") as file:
        first, second = csv.DictReader(file)
    assert tuple(first) == profiles.COLUMNS
    assert (first["step_ms_p50"], first["settings"], first["of_bandwidth"], first["rounds"]) == (
        "1234.57",
        "a=1, b=2",
        "",
        "",
    )
    assert (first["problem"], second["problem"]) == ("", "out of memory")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "m, unet, 32x32x32 x 2, fp32"),
        ({"variant": "whole", "settings": "method.region=whole"}, "m, whole, unet, 32x32x32 x 2, fp32"),
        (
            {"settings": "pretrain.crop=96, method.ratio=0.6, backbone.first=4"},
            "m, ratio=0.6, first=4, unet, 32x32x32 x 2, fp32",
        ),
        ({"stage": "finetune", "precision": "bf16"}, "m, finetune, unet, 32x32x32 x 2, bf16"),
        ({"method": "a\x1b[2Jb"}, "a [2Jb, unet, 32x32x32 x 2, fp32"),
    ],
)
def test_a_row_is_named_by_what_tells_it_from_others(changes, words):
    assert profiles.label(row(**changes)) == words


def test_the_table_shows_each_number_below_its_heading():
    made = row(device_busy=0.4, of_bandwidth=0.3, bound="compute", device_peak_gib=2.5, first_over_this=1.25)
    heading, first, second, *_ = profiles.render([made, row(data_wait_share=None)]).splitlines()
    shown = dict(zip(cells(heading), cells(first)[1:], strict=True))
    assert shown == {
        "step ms (p95)": "60.0 (80.0)",
        "forward": "20.0",
        "backward": "30.0",
        "update": "10.0",
        "data wait": "1.5 (1.0%)",
        "samples/s": "33.33",
        "first/this": "1.25 (0.90 to 1.10)",
        "GFLOP": "12.3",
        "of GEMM": "50%",
        "of conv": "75%",
        "of copy": "30%",
        "busy": "40%",
        "bound": "compute",
        "GiB": "2.50",
    }
    # Where nothing waits for data, and without a device: dashes, and the host's memory.
    other = dict(zip(cells(heading), cells(second)[1:], strict=True))
    assert [other[name] for name in ("data wait", "of copy", "busy", "bound", "GiB")] == ["-", "-", "-", "-", "1.25"]


def test_what_could_not_be_measured_says_why_and_has_no_numbers():
    text = profiles.render([row(), row(method="big", problem="out of memory")])
    assert cells(text.splitlines()[2]) == ["big, unet, 32x32x32 x 2, fp32", "out of memory"]
    assert profiles.remarks([row(problem="out of memory")]) == []


def test_ceilings_are_said_once_per_precision():
    found = profiles.remarks([row(), row(), row(precision="bf16", gemm_tflop_per_s=3.0)])
    assert len(found) == 3
    assert found[0].startswith("M, 2 threads, torch 2.9")
    assert found[1].startswith("fp32: a matrix product reaches 1.50 TFLOP/s")
    assert found[2].startswith("bf16: a matrix product reaches 3.00 TFLOP/s")


@pytest.mark.parametrize(("share", "said"), [(None, False), (0.02, False), (0.021, True)])
def test_more_than_two_percent_of_waiting_is_worth_a_worker(share, said):
    text = " ".join(profiles.remarks([row(data_wait_share=share, workers=2, workers_needed=4)]))
    assert ("set pretrain.workers=5 (it is 2)" in text) == said


def test_noise_is_said_with_its_worst_row():
    rows = [row(), row(noisy=True, spread=0.3, ceiling_spread=0.1), row(noisy=True, spread=0.1, ceiling_spread=0.45)]
    assert "by up to 45% in 2 of 3 rows" in " ".join(profiles.remarks(rows))
    assert "NOISY" not in " ".join(profiles.remarks(rows[:1]))


def test_the_figure_says_once_what_all_bars_share(tmp_path):
    rows = [row(), row(variant="half", step_ms_p50=30.0, first_over_this=2.0), row(method="x", problem="out of memory")]
    profiles.draw(rows, tmp_path / "steps.csv")
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")
    words = re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "steps.svg").read_text())
    assert {"m", "half", "60 ms, 1.00x", "30 ms, 2.00x"} <= {word.strip() for word in words}
    assert "m, unet, 32x32x32 x 2, fp32; M, 2 threads" in words
    assert not any("NOISY" in word or word.strip() == "x" for word in words)
    profiles.draw([row(noisy=True)], tmp_path / "noisy.csv")
    assert "M, 2 threads - NOISY" in (tmp_path / "noisy.svg").read_text()


def test_nothing_measured_nothing_drawn(tmp_path):
    profiles.draw([row(problem="out of memory")], tmp_path / "steps.csv")
    assert list(tmp_path.iterdir()) == []


def test_noise_is_named():
    row = {"noisy": True, "spread": 0.5, "ceiling_spread": 0.1, "problem": "", "precision": "fp32", "machine": "m"}
    row |= {"threads": 2, "torch": "2", "gemm_tflop_per_s": 1.0, "convolution_tflop_per_s": 1.0, "copy_gb_per_s": 1.0}
    row |= {"data_wait_share": 0.2, "workers": 0, "workers_needed": 3, "sample_ms": 30.0, "stage": "pretrain"}
    row |= {"settings": "", "variant": "", "method": "m", "backbone": "b", "crop": "8x8x8", "batch_size": 2}
    remarks = " ".join(profiles.remarks([row]))
    assert "NOISY: from round to round medians differ by up to 50% in 1 of 1 rows" in remarks
    assert "20% of the loop waits for data" in remarks
    assert "set pretrain.workers=4" in remarks


def test_text_of_settings_is_no_formula(tmp_path):
    profiles.write([{"method": "=cmd()", "settings": "@x", "problem": ""}], tmp_path / "p.csv")
    text = (tmp_path / "p.csv").read_text()
    assert "'=cmd()" in text
    assert "'@x" in text
