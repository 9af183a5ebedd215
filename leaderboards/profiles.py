"""Profiles of training steps: the CSV, the table in the terminal, the figure. Written by `harness profile`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from leaderboards import figures
from leaderboards.text import align, escape_cell, printable

# `bound` and the two before it: harness/costs/bounds.py.
COLUMNS = (
    *("machine", "device", "threads", "torch", "harness", "revision"),
    *("stage", "method", "variant", "backbone", "task", "channels", "crop", "batch_size", "precision"),
    *("channels_last", "compile", "settings"),
    *("step_ms_p50", "step_ms_p95", "forward_ms_p50", "forward_ms_p95", "backward_ms_p50", "backward_ms_p95"),
    *("optimizer_ms_p50", "optimizer_ms_p95", "transfer_ms_p50", "transfer_ms_p95"),
    *("data_wait_ms_p50", "data_wait_ms_p95", "data_wait_share", "sample_ms", "workers", "workers_needed"),
    *("samples_per_s", "first_over_this", "first_over_this_low", "first_over_this_high"),
    *("gflop", "tflop_per_s", "of_gemm", "of_convolution", "of_copy"),
    *("device_busy", "of_bandwidth", "bound"),
    *("gemm_tflop_per_s", "convolution_tflop_per_s", "copy_gb_per_s"),
    *("host_peak_gib", "device_peak_gib", "parameters"),
    *("rounds", "steps", "spread", "ceiling_spread", "noisy", "problem"),
)
"""Times in ms; `step` is forward, backward and update. `first_over_this`: of the first row's step, paired by round."""

LOST = 0.02  # share of a loop that waits for data above which something is to be changed


def write(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The CSV; numbers to six digits, empty where nothing was measured."""
    frame = pd.DataFrame(
        [{name: escape_cell(row.get(name)) for name in COLUMNS} for row in rows], columns=list(COLUMNS)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(path, index=False, float_format="%.6g")


def label(row: dict[str, Any]) -> str:
    """A row in a few words."""
    return printable(", ".join(_words(row)))


def _words(row: dict[str, Any]) -> list[str]:
    own = [
        pair.partition(".")[2] for pair in str(row["settings"]).split(", ") if pair.startswith(("method.", "backbone."))
    ]
    stage = [] if row["stage"] == "pretrain" else [row["stage"]]
    named = [row["variant"]] if row["variant"] else own
    return [row["method"], *named, *stage, row["backbone"], f"{row['crop']} x {row['batch_size']}", row["precision"]]


def render(rows: Sequence[dict[str, Any]]) -> str:
    """A table for the terminal, and what to know before believing it."""
    heads = ["", "step ms (p95)", "forward", "backward", "update", "data wait", "samples/s", "first/this", "GFLOP"]
    heads += ["of GEMM", "of conv", "of copy", "busy", "bound", "GiB"]
    lines = [heads]
    for row in rows:
        if row["problem"]:
            lines.append([label(row), row["problem"], *[""] * (len(heads) - 2)])
            continue
        memory = row["device_peak_gib"] if row.get("device_peak_gib") is not None else row["host_peak_gib"]
        low, high = row["first_over_this_low"], row["first_over_this_high"]
        lines.append(
            [
                label(row),
                f"{row['step_ms_p50']:.1f} ({row['step_ms_p95']:.1f})",
                *(f"{row[f'{phase}_ms_p50']:.1f}" for phase in ("forward", "backward", "optimizer")),
                "-"
                if row["data_wait_share"] is None
                else f"{row['data_wait_ms_p50']:.1f} ({row['data_wait_share']:.1%})",
                f"{row['samples_per_s']:.2f}",
                f"{row['first_over_this']:.2f} ({low:.2f} to {high:.2f})",
                f"{row['gflop']:.1f}",
                f"{row['of_gemm']:.0%}",
                f"{row['of_convolution']:.0%}",
                *("-" if row[name] is None else f"{row[name]:.0%}" for name in ("of_bandwidth", "device_busy")),
                row["bound"] or "-",
                f"{memory:.2f}" if memory is not None else "-",
            ]
        )
    return "\n".join([*align(lines), "", *remarks(rows)])


def remarks(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The machine, its ceilings, and what makes the numbers doubtful or the loop slow, in words."""
    timed = [row for row in rows if not row["problem"]]
    if not timed:
        return []
    found = [
        f"{printable(timed[0]['machine'])}, {timed[0]['threads']} threads, torch {timed[0]['torch']}; a step is forward, "
        "backward and update, without reading, preprocessing and copying"
    ]
    for precision in dict.fromkeys(row["precision"] for row in timed):
        row = next(row for row in timed if row["precision"] == precision)
        found.append(
            f"{precision}: a matrix product reaches {row['gemm_tflop_per_s']:.2f} TFLOP/s, a convolution of 64 channels "
            f"{row['convolution_tflop_per_s']:.2f}; a copy {row['copy_gb_per_s']:.1f} GB/s"
        )
    noisy = [row for row in timed if row["noisy"]]
    if noisy:
        worst = max(max(row["spread"], row["ceiling_spread"]) for row in noisy)
        found.append(
            f"NOISY: from round to round medians differ by up to {worst:.0%} in {len(noisy)} of {len(timed)} rows: "
            "something else used the machine, do not believe them; stop it and profile again"
        )
    for row in timed:
        if row["data_wait_share"] is not None and row["data_wait_share"] > LOST:
            needed = row["workers_needed"] + 1
            found.append(
                f"{label(row)}: {row['data_wait_share']:.0%} of the loop waits for data, a sample takes "
                f"{row['sample_ms']:.0f} ms: set {row['stage']}.workers={needed} (it is {row['workers']}), if there are so "
                "many cores to spare"
            )
    return found


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The paper's Figure 5: median step, split in its phases, with the 95th percentile; PNG and SVG beside each other."""
    timed = [row for row in rows if not row["problem"]]
    words = [_words(row) for row in timed]
    # What holds for all bars stands above them, once.
    common = [word for word in words[0] if len(words) > 1 and all(word in others for others in words)] if words else []
    own = [", ".join(word for word in each if word not in common) or each[0] for each in words]

    def bars(axes: Axes) -> None:
        splits = [[row[f"{phase}_ms_p50"] for phase in figures.PHASES] for row in timed]
        left = figures.stacked(axes, splits, [figures.plain(text, most=80) for text in own])
        median = np.array([row["step_ms_p50"] for row in timed])
        late = np.array([row["step_ms_p95"] for row in timed])
        axes.errorbar(
            median, range(len(timed)), xerr=[np.zeros(len(timed)), late - median], color="0.2", linestyle="", capsize=3
        )
        for place, row in enumerate(timed):
            text = f"  {row['step_ms_p50']:.0f} ms, {row['first_over_this']:.2f}x"
            axes.text(max(late[place], left[place]), place, text, va="center", fontsize=8)
        axes.set_xlim(0, 1.3 * max(late.max(), left.max()))
        axes.set_xlabel("median step, ms; whisker: 95th percentile; x: first row's step over this one's")
        figures.legend(axes)

    if timed:
        title = "; ".join([", ".join(common), f"{timed[0]['machine']}, {timed[0]['threads']} threads"]).strip("; ")
        noise = " - NOISY" if any(row["noisy"] for row in timed) else ""
        figures.save(path.with_suffix(""), (10.5, 1.8 + 0.38 * len(timed)), f"{title}{noise}", bars)
