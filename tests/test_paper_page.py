"""`docs/paper.md` has the tables that the presets give.

`HARNESS_WRITE_DOCS=1 pytest tests/test_paper_page.py` rewrites them.
"""

import os
from pathlib import Path

import pytest

from harness.config.request import Request
from harness.config.resolve import resolve

PAGE = Path(__file__).parents[1] / "docs" / "paper.md"
TASKS = ("brats", "btcv", "msd_liver", "msd_spleen")
PRESETS = ("demo", "small", "paper")

# Setting -> what the paper says, what the released code does ("-": no difference is known), and why ours is as it is.
ROWS = {
    "pretrain.steps": ("100,000 (IV-C)", "-", ""),
    "pretrain.crop": ("128^3 BraTS, 96^3 others (IV-C)", "96^3", ""),
    "pretrain.batch_size": (
        "2 BraTS, 4 others, per GPU (IV-C)",
        "-",
        "global here; the paper does not say how many GPUs share a run",
    ),
    "pretrain.lr": ("1e-4 (IV-C)", "UNet 1e-4, Swin 6e-6", "the paper's, for both"),
    "pretrain.weight_decay": ("1e-5 (IV-C)", "UNet 1e-3, Swin 0.1", "the paper's, for both"),
    "pretrain.warmup_epochs": ("50 (IV-C)", "500 steps", ""),
    "pretrain.clip_norm": ("not mentioned", "-", "0: no clipping"),
    "finetune.epochs": ("300 BraTS, 2000 BTCV, 600 Liver and Spleen (IV-C)", "-", ""),
    "finetune.crop": ("as in pre-training (IV-C)", "-", ""),
    "finetune.batch_size": ("as in pre-training (IV-C)", "-", "global here"),
    "finetune.lr": ("1e-4 (IV-C)", "-", ""),
    "finetune.weight_decay": ("1e-5 (IV-C)", "-", ""),
    "finetune.warmup_epochs": ("50 (IV-C)", "-", ""),
    "finetune.foreground": ("random crops (IV-C)", "-", "0: no crop is centred on a label"),
    "finetune.flip": ("0.2 (IV-C)", "-", "per axis"),
    "finetune.rotate": ("0.2 (IV-C)", "-", "by 90 degrees"),
    "finetune.scale": ("0.1 (IV-C)", "-", "by 0.9 to 1.1, which the paper leaves open"),
    "finetune.shift": ("0.1 (IV-C)", "-", "by -0.1 to 0.1, which the paper leaves open"),
    "evaluate.overlap": ("not mentioned", "-", "0.5, a common value"),
    "prepared.spacing": ("1 mm BraTS, 1.5 x 1.5 x 2 mm others (IV-A)", "-", ""),
    "method.mask_ratio": ("0.4 (IV-C)", "-", ""),
    "method.sub_volume": ("32^3 (IV-C)", "-", ""),
    "method.patch": ("16^3 (IV-C)", "-", ""),
    "method.region": (
        "96 of 128, 64 of 96, around the centre (III-B, IV-C)",
        "a corner",
        "none: 3/4 of the crop in whole strides, which gives these",
    ),
    "method.reconstruction": ("1 (equation 7)", "-", ""),
    "method.number": ("0.1 (equation 7)", "-", ""),
    "method.location": ("0.1 (equation 7)", "-", "sums over bits, as equation 4; the code averages"),
    "method.consistency": ("0.01 (equation 7)", "-", ""),
    "method.contrastive": ("0.1 (equation 7)", "-", ""),
    "method.distance": (
        "norm (equation 1)",
        "mse",
        "mse: the weights of equation 7 belong to it, see docs/methods/hybridmim.md",
    ),
    "method.consistency_on": ("probabilities (equation 5)", "bits", "the paper's, which trains both heads"),
    "method.temperature": ("not mentioned", "0.5", ""),
    "method.projection": ("not mentioned", "384", ""),
    "method.dropout": ("not mentioned", "inside the networks", "0.1 (SimCSE), in pre-training only"),
    "backbone.features": ("not mentioned", "64,64,128,256,512", ""),
}


def text(value):
    if isinstance(value, tuple | list):
        return "x".join(f"{edge:g}" for edge in value)
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if value is None else str(value)


def config_of(registry, task, preset):
    return resolve(
        Request(method="hybridmim", backbone="unet", task=task, preset=preset), registry, registry.task(task)
    )


def value_of(config, field):
    section, name = field.split(".")
    if section == "prepared":
        return text(config.prepared[name])
    settings = getattr(config, f"{section}_settings" if section in ("method", "backbone") else section)
    value = getattr(settings, name)
    return "-" if value is None and name in ("steps", "epochs") else text(value)


def merged(values):
    """One value if all tasks share it, otherwise one per task."""
    return values[0] if len(set(values)) == 1 else " / ".join(values)


def tables(registry):
    """The text between the marks: the line-by-line table, and the three presets side by side."""
    configs = {preset: [config_of(registry, task, preset) for task in TASKS] for preset in PRESETS}
    lines = ["| setting | paper | released code | ours | why |", "|---|---|---|---|---|"]
    for field, (paper, code, why) in ROWS.items():
        ours = merged([value_of(config, field) for config in configs["paper"]])
        lines.append(f"| `{field}` | {paper} | {code} | {ours} | {why} |")
    lines += [
        "",
        "| setting | " + " | ".join(f"`{preset}`" for preset in PRESETS) + " |",
        "|---|" + "---|" * len(PRESETS),
    ]
    fields = [
        f"{stage}.{name}"
        for stage in ("pretrain", "finetune")
        for name in type(configs["demo"][0].finetune).model_fields
        if hasattr(getattr(configs["demo"][0], stage), name)
    ]
    for field in [*fields, "evaluate.overlap", "backbone.features"]:
        values = [merged([value_of(config, field) for config in configs[preset]]) for preset in PRESETS]
        lines.append(f"| `{field}` | " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"


def test_the_page_shows_the_presets_as_they_are(registry):
    head, mark, rest = PAGE.read_text().partition("<!-- generated -->\n")
    _, end, tail = rest.partition("<!-- end -->\n")
    assert mark
    assert end
    if "HARNESS_WRITE_DOCS" in os.environ:
        PAGE.write_text(head + mark + tables(registry) + end + tail)
    assert PAGE.read_text() == head + mark + tables(registry) + end + tail


@pytest.mark.parametrize("task", TASKS)
def test_paper_is_the_paper(registry, task):
    """Section IV-C, written here once more by hand."""
    config = config_of(registry, task, "paper")
    edge, batch, epochs = {"brats": (128, 2, 300), "btcv": (96, 4, 2000)}.get(task, (96, 4, 600))
    for stage in (config.pretrain, config.finetune):
        assert (stage.crop, stage.batch_size, stage.lr, stage.weight_decay) == ((edge,) * 3, batch, 1e-4, 1e-5)
        assert (stage.warmup_epochs, stage.warmup_steps, stage.clip_norm) == (50, 0, 0)
    assert (config.pretrain.steps, config.pretrain.epochs, config.finetune.epochs) == (100_000, None, epochs)
    tuning = config.finetune
    assert (tuning.foreground, tuning.flip, tuning.rotate, tuning.scale, tuning.shift) == (0, 0.2, 0.2, 0.1, 0.1)
    assert config.prepared["spacing"] == ((1, 1, 1) if task == "brats" else (1.5, 1.5, 2))
    method = config.method_settings
    assert (method.mask_ratio, method.sub_volume, method.patch) == (0.4, (32,) * 3, (16,) * 3)
    weights = (method.reconstruction, method.number, method.location, method.consistency, method.contrastive)
    assert weights == (1, 0.1, 0.1, 0.01, 0.1)


def test_every_setting_of_the_method_is_in_the_table(registry):
    fields = registry.load("method", "hybridmim").Config.model_fields
    assert {f"method.{name}" for name in fields} - set(ROWS) == {"method.contrast_on"}  # ours alone
