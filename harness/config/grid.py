"""The grid of `harness tune --grid` and `harness run --tune`: fine-tuning settings that are tried, the same for every method."""

from itertools import product

from harness.system.errors import UserError, unknown

TUNABLE = ("finetune.lr", "finetune.warmup_steps", "finetune.layer_decay", "finetune.weight_decay")
"""Settings that may be tuned. Others change what is compared, for instance the number of steps or of labelled cases."""

MOST_TRIALS = 100


def parse_grid(text: str) -> list[dict[str, str]]:
    """The trials of a grid: `"finetune.lr=1e-3,3e-3 finetune.layer_decay=1,0.5"` gives four, each as {setting: value}.

    The first setting varies most slowly. An empty text gives no trial.

    Raises:
        UserError: text of another form, a setting that cannot be tuned, or the same value or setting twice.
    """
    axes: dict[str, list[str]] = {}
    for word in text.split():
        key, sign, values = word.partition("=")
        axis = [value.strip() for value in values.split(",")]
        if not sign or not all(axis):
            raise UserError(
                f"the grid's {word!r} is not of the form setting=value,value, for instance finetune.lr=1e-3,3e-3"
            )
        if key not in TUNABLE:
            raise unknown("setting of the grid", key, TUNABLE)
        if key in axes or len({_value(text) for text in axis}) < len(axis):
            raise UserError(f"the grid {text!r} names a setting or a value twice: give each once")
        axes[key] = axis
    trials = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())] if axes else []
    if len(trials) > MOST_TRIALS:
        raise UserError(
            f"the grid describes {len(trials)} trials, at most {MOST_TRIALS} are allowed: give fewer values"
        )
    return trials


def _value(text: str) -> float | str:
    """The number that a text states, so that 1e-3 and 0.001 are one; the text itself if it states none."""
    try:
        return float(text)
    except ValueError:
        return text


def canonical_grid(text: str) -> str:
    """The text of a grid with single spaces. Raises UserError as `parse_grid`."""
    parse_grid(text)
    return " ".join(text.split())
