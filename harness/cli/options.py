"""Options that several commands share, made from the fields of a request."""

import argparse
import difflib
import os
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, NoReturn

from harness.config.request import Execution, Option, Request, field_of, options
from harness.system.errors import UserError, unknown

EXECUTION = tuple(name for name, _ in options(Execution) if name != "until")
REQUEST = tuple(name for name, _ in options(Request) if name != "save_predictions")


class Parser(argparse.ArgumentParser):
    """A parser that raises UserError instead of printing the usage, and offers near matches."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse, but the parser of the verb itself refuses what it does not know, so that its own help is named."""
        parsed, extra = super().parse_known_args(args, namespace)
        if extra and not self._subparsers:
            near = difflib.get_close_matches(extra[0], self._option_string_actions, n=1)
            self.error(f"unrecognized arguments: {' '.join(extra)}" + (f" (did you mean {near[0]}?)" if near else ""))
        return parsed, extra

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Raises UserError for a value that is none of the choices."""
        if action.choices is not None and value not in action.choices:
            names = {"COMMAND": "command", "VERB": f"verb of {self.prog}"}
            what = names.get(str(action.metavar), f"value of {'/'.join(action.option_strings)}")
            raise UserError(f"{unknown(what, str(value), map(str, action.choices))}; `{self.prog} --help` shows more")

    def error(self, message: str) -> NoReturn:
        """Raises UserError, which the command prints as one line on stderr."""
        raise UserError(f"{message}; `{self.prog} --help` shows what is allowed")


def add_options(parser: argparse.ArgumentParser, *names: str, text: str = "") -> None:
    """Add the options of these fields of a request. `text` replaces their help."""
    for name in names:
        default, option = field_of(name).default, field_of(name).metadata["option"]
        keywords: dict[str, Any] = {"help": text or option.text, "dest": name}
        if isinstance(default, bool):
            parser.add_argument(option.flag, action="store_true", **keywords)
            continue
        if option.choices:
            keywords["choices"] = list(option.choices)
        else:
            keywords |= {"metavar": option.metavar, "type": argument(option.parse)}
        if isinstance(default, tuple):
            parser.add_argument(option.flag, action="append", default=[], **keywords)
        else:
            parser.add_argument(option.flag, default=_default(option, default), **keywords)


def add_request_options(parser: argparse.ArgumentParser, required: bool) -> None:
    """Add all options that determine a run. `required`: --method and --task have to be given."""
    add_options(parser, *REQUEST)
    if required:
        for action in parser._actions:
            action.required = action.required or action.dest in ("method", "task")


def argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """The parser `parse` for argparse, which prints the message of its ValueError."""

    def typed(text: str) -> Any:
        """The parsed text."""
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return typed


def request_of(arguments: argparse.Namespace) -> Request:
    """The request that the options of a run describe. Raises UserError for a value that is out of range."""
    return Request(**_field_values(arguments, Request), execution=execution_of(arguments))


def execution_of(arguments: argparse.Namespace) -> Execution:
    """How a run is carried out, from the options; the defaults where the command lacks an option.

    Raises:
        UserError: a tracker's package is not installed.
    """
    execution = Execution(**_field_values(arguments, Execution))
    if execution.trackers:
        from harness.training.trackers import check_trackers

        check_trackers(execution.trackers)
    return execution


def _field_values(arguments: argparse.Namespace, kind: type[Request] | type[Execution]) -> dict[str, Any]:
    """The values of the fields of `kind` that have a default and were given as options."""
    names = [field.name for field in fields(kind) if field.default is not MISSING and field.name != "execution"]
    values = {name: getattr(arguments, name) for name in names if getattr(arguments, name, None) is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _default(option: Option, default: Any) -> Any:
    """The field's default, or the value of the environment variable that replaces it."""
    text = os.environ.get(option.environment) if option.environment else None
    return option.parse(text) if text else default


NAMED = {"method": "method", "methods": "method", "backbone": "backbone", "backbones": "backbone", "task": "task"}
"""Destination of an option -> the kind of plugin whose names it takes."""


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that asks for completions (`register-python-argcomplete harness`), and end the process."""
    import argcomplete

    from harness.api.registry import Registry
    from harness.config.presets import preset_names
    from harness.config.suites import suite_names

    registry = Registry()
    names = {dest: registry.names(kind) for dest, kind in NAMED.items()}
    names |= {"preset": preset_names(), "suite": suite_names()}
    parsers = [parser]
    for each in parsers:  # it grows while it is read
        for action in each._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
            elif action.dest in names:
                action.completer = argcomplete.ChoicesCompleter(dict.fromkeys(names[action.dest], ""))  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser)
