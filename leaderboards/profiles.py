"""Profiles of training steps as a CSV, as a table in the terminal and as a figure, for `harness profile`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from leaderboards import figures
from leaderboards.text import align, escape_cell, printable

# harness/costs/bounds.py describes `device_busy`, `of_bandwidth` and `bound`.
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
"""Columns of the CSV. Times are in ms; `step` is forward, backward and update. `first_over_this` is the step of the first row
divided by the step of this row, paired by round."""

LOST = 0.02  # share of the loop spent waiting for data above which the user is told to add workers


def write(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the CSV: numbers with six digits, empty where nothing was measured."""
    frame = pd.DataFrame(
        [{name: escape_cell(row.get(name)) for name in COLUMNS} for row in rows], columns=list(COLUMNS)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(path, index=False, float_format="%.6g")


def label(row: dict[str, Any]) -> str:
    """A short name of a row."""
    return printable(", ".join(_words(row)))


def _words(row: dict[str, Any]) -> list[str]:
    """The words of a row's name: method, its settings, stage, backbone, crop and batch, precision."""
    own_settings = [
        pair.partition(".")[2] for pair in str(row["settings"]).split(", ") if pair.startswith(("method.", "backbone."))
    ]
    stage = [] if row["stage"] == "pretrain" else [row["stage"]]
    settings = [row["variant"]] if row["variant"] else own_settings
    return [row["method"], *settings, *stage, row["backbone"], f"{row['crop']} x {row['batch_size']}", row["precision"]]


def render(rows: Sequence[dict[str, Any]]) -> str:
    """A table for the terminal, with remarks below it."""
    heading = ["", "step ms (p95)", "forward", "backward", "update", "data wait", "samples/s", "first/this", "GFLOP"]
    heading += ["of GEMM", "of conv", "of copy", "busy", "bound", "GiB"]
    lines = [heading]
    for row in rows:
        if row["problem"]:
            lines.append([label(row), row["problem"], *[""] * (len(heading) - 2)])
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
    """Remarks: the machine, its ceilings, noise in the numbers, and loops that wait for data."""
    timed = [row for row in rows if not row["problem"]]
    if not timed:
        return []
    texts = [
        f"{printable(timed[0]['machine'])}, {timed[0]['threads']} threads, torch {timed[0]['torch']}; a step is forward, "
        "backward and update, without reading, preprocessing and copying"
    ]
    for precision in dict.fromkeys(row["precision"] for row in timed):
        row = next(row for row in timed if row["precision"] == precision)
        texts.append(
            f"{precision}: a matrix product reaches {row['gemm_tflop_per_s']:.2f} TFLOP/s, a convolution of 64 channels "
            f"{row['convolution_tflop_per_s']:.2f}; a copy {row['copy_gb_per_s']:.1f} GB/s"
        )
    noisy = [row for row in timed if row["noisy"]]
    if noisy:
        worst = max(max(row["spread"], row["ceiling_spread"]) for row in noisy)
        texts.append(
            f"NOISY: from round to round medians differ by up to {worst:.0%} in {len(noisy)} of {len(timed)} rows: "
            "something else used the machine, do not believe them; stop it and profile again"
        )
    for row in timed:
        if row["data_wait_share"] is not None and row["data_wait_share"] > LOST:
            needed = row["workers_needed"] + 1
            texts.append(
                f"{label(row)}: {row['data_wait_share']:.0%} of the loop waits for data, a sample takes "
                f"{row['sample_ms']:.0f} ms: set {row['stage']}.workers={needed} (it is {row['workers']}), if there are so "
                "many cores to spare"
            )
    return texts


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the paper's Figure 5: the median step, split into its phases, with the 95th percentile; as PNG and SVG."""
    timed = [row for row in rows if not row["problem"]]
    words = [_words(row) for row in timed]
    # Words that all bars have in common go into the title.
    common = [word for word in words[0] if len(words) > 1 and all(word in others for others in words)] if words else []
    names = [", ".join(word for word in row_words if word not in common) or row_words[0] for row_words in words]

    def bars(axes: Axes) -> None:
        """Draw the bars into the axes."""
        splits = [[row[f"{phase}_ms_p50"] for phase in figures.PHASES] for row in timed]
        ends = figures.stacked(axes, splits, [figures.plain(text, most=80) for text in names])
        median = np.array([row["step_ms_p50"] for row in timed])
        percentile_95 = np.array([row["step_ms_p95"] for row in timed])
        axes.errorbar(
            median,
            range(len(timed)),
            xerr=[np.zeros(len(timed)), percentile_95 - median],
            color="0.2",
            linestyle="",
            capsize=3,
        )
        for index, row in enumerate(timed):
            text = f"  {row['step_ms_p50']:.0f} ms, {row['first_over_this']:.2f}x"
            axes.text(max(percentile_95[index], ends[index]), index, text, va="center", fontsize=8)
        axes.set_xlim(0, 1.3 * max(percentile_95.max(), ends.max()))
        axes.set_xlabel("median step, ms; whisker: 95th percentile; x: first row's step over this one's")
        figures.legend(axes)

    if timed:
        title = "; ".join([", ".join(common), f"{timed[0]['machine']}, {timed[0]['threads']} threads"]).strip("; ")
        noise = " - NOISY" if any(row["noisy"] for row in timed) else ""
        figures.save(path.with_suffix(""), (10.5, 1.8 + 0.38 * len(timed)), f"{title}{noise}", bars)
