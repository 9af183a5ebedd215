"""Options that several commands share, made from the fields of a request."""

import argparse
import os
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, NoReturn

from harness.config.request import Execution, Option, Request, field_of, options
from harness.system.errors import UserError

EXECUTION = tuple(name for name, _ in options(Execution) if name != "until")
REQUEST = tuple(name for name, _ in options(Request) if name != "save_predictions")


class Parser(argparse.ArgumentParser):
    """One line on stderr instead of the usage, and near matches for a misspelt command."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError, which the command prints."""
        raise UserError(f"{message}; `{self.prog} --help` shows what is allowed")


def add_options(parser: argparse.ArgumentParser, *names: str, text: str = "") -> None:
    """The options of these fields of a request, under their own names; `text` replaces the usual help."""
    for name in names:
        default, option = field_of(name).default, field_of(name).metadata["option"]
        more: dict[str, Any] = {"help": text or option.text, "dest": name}
        if isinstance(default, bool):
            parser.add_argument(option.flag, action="store_true", **more)
            continue
        if option.choices:
            more["choices"] = list(option.choices)
        else:
            more |= {"metavar": option.metavar, "type": argument(option.parse)}
        if isinstance(default, tuple):
            parser.add_argument(option.flag, action="append", default=[], **more)
        else:
            parser.add_argument(option.flag, default=_default(option, default), **more)


def add_request_options(parser: argparse.ArgumentParser, required: bool) -> None:
    """All that determines a run."""
    add_options(parser, *REQUEST)
    if required:
        for action in parser._actions:
            action.required = action.required or action.dest in ("method", "task")


def argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A parser of text whose ValueError argparse prints as it is."""

    def typed(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return typed


def request_of(arguments: argparse.Namespace) -> Request:
    """What the options of a run ask for. Raises UserError for a value that is out of range."""
    return Request(**_given(arguments, Request), execution=execution_of(arguments))


def execution_of(arguments: argparse.Namespace) -> Execution:
    """How the options say that a run is carried out; as usual where the command has none."""
    return Execution(**_given(arguments, Execution))


def _given(arguments: argparse.Namespace, kind: type[Request] | type[Execution]) -> dict[str, Any]:
    names = [each.name for each in fields(kind) if each.default is not MISSING and each.name != "execution"]
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name, None) is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def _default(option: Option, default: Any) -> Any:
    """The field's default, or the value of the environment variable that replaces it."""
    named = os.environ.get(option.environment) if option.environment else None
    return option.parse(named) if named else default
