"""Validated, frozen settings: the base of every configuration class, the plugins' `Config` included."""

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, PositiveInt, ValidationError, model_validator

from harness.system.errors import UserError, unknown

S = TypeVar("S", bound="Settings")

Triple = tuple[int, int, int]
"""Three whole numbers, one per array axis: an extent, a stride or an index in voxels."""


def _cube(value: Any) -> Any:
    """One edge length stands for a cube: 96, "96" and "96,96,96" are the same size."""
    parts = value.split(",") if isinstance(value, str) else value
    if isinstance(parts, int):
        parts = (parts,)
    return tuple(parts) * 3 if isinstance(parts, list | tuple) and len(parts) == 1 else parts


Size3 = Annotated[tuple[PositiveInt, PositiveInt, PositiveInt], BeforeValidator(_cube)]
"""An extent in voxels along the three array axes; a single number stands for a cube."""


class Settings(BaseModel):
    """Frozen settings that refuse unknown fields. Every field states its source in `Field(description=...)`.

    On the command line a tuple is written with commas and a missing value as `none`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _read_text(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        read = dict(values)
        for name, value in values.items():
            if not isinstance(value, str) or name not in cls.model_fields:
                continue
            annotation = cls.model_fields[name].annotation
            kinds = {get_origin(kind) or kind for kind in (annotation, *get_args(annotation))}
            if value.lower() == "none" and type(None) in kinds:
                read[name] = None
            elif tuple in kinds and "," in value:
                read[name] = tuple(value.split(","))
        return read


def build(cls: type[S], values: Mapping[str, Any], section: str) -> S:
    """Validate `values` as `cls`; `section` is the prefix that the user writes before a field.

    Raises:
        UserError: an unknown field (near matches are offered), or a value of the wrong type or out of range.
    """
    for name in values:
        if name not in cls.model_fields:
            raise unknown(f"setting in section {section!r},", name, cls.model_fields)
    try:
        return cls(**values)
    except ValidationError as error:
        problem = error.errors()[0]
        field = str(problem["loc"][0]) if problem["loc"] else ""
        known = cls.model_fields.get(field)
        about = f" ({known.description})" if known is not None and known.description else ""
        where = f"{section}.{field}={problem['input']}" if field else section
        raise UserError(f"{where} cannot be used: {problem['msg']}{about}") from None
    except OSError as error:  # from where a file is looked for
        raise UserError(
            f"{section}: {error.filename!r:.80} cannot be used: {error.strerror}: give another path"
        ) from None
