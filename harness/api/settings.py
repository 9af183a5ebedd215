"""Validated, frozen settings: the base class of every configuration class, including the `Config` of plugins."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, PositiveInt, ValidationError, model_validator

from harness.system.errors import UserError, unknown

S = TypeVar("S", bound="Settings")

Triple = tuple[int, int, int]
"""Three whole numbers, one per array axis: an extent, a stride or an index, in voxels."""


def _cube(value: Any) -> Any:
    """Turn a single edge length into the three of a cube: 96, "96" and "96,96,96" are the same size."""
    edges = value.split(",") if isinstance(value, str) else value
    if isinstance(edges, int):
        edges = (edges,)
    return tuple(edges) * 3 if isinstance(edges, list | tuple) and len(edges) == 1 else edges


Size3 = Annotated[tuple[PositiveInt, PositiveInt, PositiveInt], BeforeValidator(_cube)]
"""An extent in voxels along the three array axes. A single number means a cube."""


class Settings(BaseModel):
    """Frozen settings that reject unknown fields, infinities and NaN.

    Every field states in `Field(description=...)` what it is and where its value comes from (paper or repository). On the
    command line, a tuple is written with commas, and a missing value as `none`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _read_text(cls, values: Any) -> Any:
        """Turn the text of the command line into tuples and None, where a field allows them."""
        if not isinstance(values, Mapping):
            return values
        parsed = dict(values)
        for name, value in values.items():
            if not isinstance(value, str) or name not in cls.model_fields:
                continue
            annotation = cls.model_fields[name].annotation
            kinds = {get_origin(kind) or kind for kind in (annotation, *get_args(annotation))}
            if value.lower() == "none" and type(None) in kinds:
                parsed[name] = None
            elif tuple in kinds and "," in value:
                parsed[name] = tuple(value.split(","))
        return parsed


def describe_settings(settings: type[Settings], section: str) -> list[dict[str, str]]:
    """One row per setting, as the user writes it: `setting`, `default`, `allowed`, `description` (what it is, and its source)."""
    fields: Mapping[str, Any] = settings.model_json_schema()["properties"] if settings.model_fields else {}
    return [
        {
            "setting": f"{section}.{name}",
            "default": as_written(fields[name]["default"]) if "default" in fields[name] else "must be given",
            "allowed": " or ".join(dict.fromkeys(map(_allowed, fields[name].get("anyOf", [fields[name]])))),
            "description": fields[name].get("description", ""),
        }
        for name in fields
    ]


def as_written(value: Any) -> str:
    """A value as it is written after `--set`."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return ",".join(map(as_written, value)) if isinstance(value, list | tuple) else f"{value}"


def _allowed(field: Mapping[str, Any]) -> str:
    """The values that a field of a JSON schema allows, in words."""
    if "enum" in field or "const" in field:
        return " or ".join(map(as_written, field.get("enum", [field.get("const")])))
    if field.get("type") == "array":
        inner = field.get("items") or (field.get("prefixItems") or [{}])[0]
        each = " or ".join(map(_allowed, inner.get("anyOf", [inner])))
        number = field.get("minItems") if field.get("minItems") == field.get("maxItems") else None
        return f"{number} values, each {each}" if number else f"values, each {each}"
    kinds = {
        "number": "number",
        "integer": "whole number",
        "boolean": "true or false",
        "null": "none",
        "string": "text",
    }
    ends = [
        f"{sign} {field[key]:g}"
        for key, sign in (("exclusiveMinimum", ">"), ("minimum", ">="), ("exclusiveMaximum", "<"), ("maximum", "<="))
        if key in field
    ]
    return " ".join([kinds.get(str(field.get("type")), "text"), *([f"({', '.join(ends)})"] if ends else [])])


def size_text(size: Sequence[int]) -> str:
    """A size as a setting is written: `32,64,32`."""
    return ",".join(map(str, size))


def build(cls: type[S], values: Mapping[str, Any], section: str) -> S:
    """Validate `values` and make the settings `cls` of them.

    Args:
        values: field name -> value, or its text as written on the command line.
        section: the prefix that the user writes before a field, for instance `pretrain`.

    Raises:
        UserError: an unknown field (the message offers near matches), a value of the wrong type or out of range, or a
            file that cannot be used.
    """
    for name in values:
        if name not in cls.model_fields:
            raise unknown(f"setting in section {section!r},", name, cls.model_fields)
    try:
        return cls(**values)
    except ValidationError as error:
        problem = error.errors()[0]
        field = str(problem["loc"][0]) if problem["loc"] else ""
        info = cls.model_fields.get(field)
        about = f" ({info.description})" if info is not None and info.description else ""
        setting = f"{section}.{field}={problem['input']}" if field else section
        raise UserError(f"{setting} cannot be used: {problem['msg']}{about}") from None
    except OSError as error:  # raised by a validator that looks for a file
        raise UserError(
            f"{section}: {error.filename!r:.80} cannot be used: {error.strerror}: give another path"
        ) from None
