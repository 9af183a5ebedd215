"""The registry of plugins: entry points, and files or modules that the user names with `--plugin`.

To list plugins, their source is read instead of imported, because importing them imports torch.
"""

import ast
import importlib.util
import inspect
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.machinery import PathFinder
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from harness.api.plugin_code import code_digest
from harness.api.published import PublishedWeights
from harness.api.task import ImageSet, Task, ZScore
from harness.system.errors import UserError, unknown
from harness.system.files import digest, digest_chunks, digest_file, digest_tree, expand, is_folder

PLURAL = {"method": "methods", "backbone": "backbones", "task": "tasks", "corpus": "corpora", "weights": "weights"}
KINDS = tuple(PLURAL)
ENTRY = re.compile(r"^(?=@\w+\{([^,\s]+),)(.*?^\})", re.MULTILINE | re.DOTALL)
"""An entry of BibTeX: its key, and its text, which ends with a brace at the beginning of a line."""
STATED = ("version", "reference", "trains", "needs", "abilities", "variants", "presets")


@dataclass(frozen=True)
class Plugin:
    """A named plugin and its origin: an entry point, or an object from a `--plugin` file or module.

    Attributes:
        kind: "method", "backbone", "task", "corpus" or "weights".
        name: name under which the user selects it.
        origin: where it comes from, in words, for messages.
        entry_point: its entry point; None for a `--plugin`.
        definition: the class or object from a `--plugin`; None for an entry point, which is imported on `Registry.load`.
    """

    kind: str
    name: str
    origin: str
    entry_point: EntryPoint | None = None
    definition: Any = None

    @property
    def source(self) -> Path | None:
        """The file that defines the plugin, located without importing it; None if there is no such file."""
        if self.entry_point is None:
            is_object = isinstance(self.definition, ImageSet | PublishedWeights)
            module = inspect.getmodule(type(self.definition) if is_object else self.definition)
            return Path(module.__file__) if module is not None and module.__file__ else None
        return _locate(self.entry_point.module)


class Registry:
    """All plugins that the user can select by name.

    Args:
        extra: the values of `--plugin`: paths of Python files, or names of modules.

    Raises:
        UserError: two plugins of one kind share a name, or a `--plugin` cannot be loaded.
    """

    def __init__(self, extra: Sequence[str] = ()) -> None:
        self._plugins: dict[str, dict[str, Plugin]] = {kind: {} for kind in KINDS}
        # Each call of entry_points, and each name of a distribution, reads files: once is enough.
        entries = entry_points()
        package_of = cache(lambda package: f"{package.name} {package.version}" if package else "an unknown package")
        for kind in KINDS:
            # A distribution may appear twice on sys.path (an editable install, seen from its own folder).
            for entry in {(e.name, e.value): e for e in entries.select(group=f"harness.{PLURAL[kind]}")}.values():
                origin = f"entry point {entry.value} of {package_of(entry.dist)}"
                self._add(Plugin(kind, entry.name, origin, entry_point=entry))
        for name in extra:
            for kind, plugin in _objects(_import(name)):
                self._add(Plugin(kind, plugin.name, f"--plugin {name}", definition=plugin))

    def _add(self, plugin: Plugin) -> None:
        """Add a plugin. Raises UserError if its kind has another one of the same name."""
        other = self._plugins[plugin.kind].setdefault(plugin.name, plugin)
        if other is not plugin:
            raise UserError(
                f"two plugins are named {plugin.kind} {plugin.name!r}: {other.origin} and {plugin.origin}: "
                "rename one or uninstall its package"
            )

    def names(self, kind: str) -> list[str]:
        """The sorted names of all plugins of one kind."""
        return sorted(self._plugins[kind])

    def plugin(self, kind: str, name: str) -> Plugin:
        """The plugin with this kind and name.

        Raises:
            UserError: there is none; the message offers near matches.
        """
        if name not in self._plugins[kind]:
            raise UserError(f"{unknown(kind, name, self.names(kind))}; one that a file defines needs --plugin FILE")
        return self._plugins[kind][name]

    def load(self, kind: str, name: str) -> Any:
        """Import a plugin: the class of a method or backbone, or the object of a task or corpus.

        Raises:
            UserError: the name is unknown, or the plugin fails to load; the message then states the file of its package.
        """
        plugin = self.plugin(kind, name)
        if plugin.entry_point is None:
            return plugin.definition
        try:
            return plugin.entry_point.load()
        # Importing a plugin runs foreign code, so any exception is reported, together with the plugin's file.
        except Exception as error:
            file = _locate(plugin.entry_point.module) or _locate(plugin.entry_point.module.split(".")[0])
            raise UserError(
                f"{kind} {name!r} ({plugin.origin}) cannot be loaded, {type(error).__name__}: {error}; its package was "
                f"found at {file or 'no place on sys.path'}: mend, reinstall or remove what lies there"
            ) from error

    def task(self, name: str) -> Task:
        """A task by its name, or by the path of a folder that describes itself (a Decathlon or nnU-Net folder).

        Raises:
            UserError: as `load`; the name is empty; the folder does not exist; or no class of tasks recognises it.
        """
        folder = self.task_folder(name)
        if folder is None:
            task = self.load("task", name)
            assert isinstance(task, Task), f"task {name!r} is a {type(task).__name__}, not a harness.Task"
            return task
        if not is_folder(folder):
            raise UserError(
                f"task folder {folder} does not exist: give a folder or one of {', '.join(self.names('task'))}"
            )
        for task_class in dict.fromkeys(type(self.load("task", task_name)) for task_name in self.names("task")):
            folder_task: Task | None = task_class.from_folder(folder)
            if folder_task is not None:
                return folder_task
        raise UserError(
            f"no task family recognises {folder}: a folder that is a task has a dataset.json, as the Medical Segmentation "
            "Decathlon ('modality', 'labels', 'training') or nnU-Net v2 ('channel_names', 'labels', 'file_ending') write it"
        )

    def task_folder(self, name: str) -> Path | None:
        """The folder that `name` stands for; None if it is the name of a task, or of no folder.

        Text with a slash counts as a folder, even if the folder does not exist.

        Raises:
            UserError: the name is empty, or a path that begins with `~` names an unknown user.
        """
        if not name:
            raise UserError("the task's name is empty: give a name (`harness list tasks`) or a folder")
        folder = expand(name)
        return folder if name not in self._plugins["task"] and (is_folder(folder) or "/" in name) else None

    def describe(self, kind: str) -> list[dict[str, Any]]:
        """One row per plugin of a kind: its name, origin and description, and the attributes that it states about itself."""
        rows = []
        for name in self.names(kind):
            plugin = self.plugin(kind, name)
            row = {"name": name, "origin": plugin.origin}
            if kind in ("task", "corpus"):
                row |= _describe_images(self.load(kind, name))
            elif kind == "weights":
                row |= asdict(self.load(kind, name))
            else:
                row |= _describe_class(plugin)
            rows.append(row)
        return rows

    def citation(self, kind: str, name: str) -> str:
        """The BibTeX entry of a plugin: the one with its name as key, or with a beginning of it (`msd` for `msd_liver`).

        It is in the file `citations.bib` beside the plugin's module. Empty if there is no such file or entry.
        """
        source = self.plugin(kind, name).source if name in self._plugins[kind] else None
        file = None if source is None else source.with_name("citations.bib")
        if file is None or not file.is_file():
            return ""
        entries = dict(ENTRY.findall(file.read_text(encoding="utf-8")))
        keys = [key for key in entries if name == key or name.startswith(f"{key}_")]
        return entries[max(keys, key=len)].strip() if keys else ""

    def sources(self) -> set[Path]:
        """The files that define the plugins."""
        sources = {plugin.source for plugins in self._plugins.values() for plugin in plugins.values()}
        return {source for source in sources if source is not None}

    def digest_sources(self) -> str:
        """Digest of the source files of all plugins.

        For an installed plugin it covers the folder of its package, because plugins may share modules and lists there.
        """
        sources = self.sources()
        installed = {
            plugin.source.parent
            for plugins in self._plugins.values()
            for plugin in plugins.values()
            if plugin.entry_point is not None and plugin.source is not None
        }
        loose = [digest_file(source) for source in sources if source.parent not in installed]
        return digest([sorted(loose), sorted(digest_tree(folder) for folder in installed)])

    def digest(self, kind: str, name: str) -> str:
        """Digest of the plugin's code (`harness.api.plugin_code`), which shows whether it has changed without importing it."""
        source = self.plugin(kind, name).source
        return code_digest(source) if source else ""


def _describe_images(images: ImageSet) -> dict[str, Any]:
    """Attributes of a task or corpus, for `Registry.describe`."""
    how = images.normalisation
    kind = type(how).__name__.lower()
    return {
        "description": images.description,
        "targets": list(images.targets),
        "channels": list(images.channels),
        "spacing": list(images.spacing or ()),
        "intensities": kind if isinstance(how, ZScore) else f"{kind} {how.low:g}..{how.high:g}",
        "version": images.version,
        "licence": images.licence,
        "reference": images.reference,
        "registration": images.registration,
        "layout": images.layout,
        "presets": dict(images.presets) if isinstance(images, Task) else {},
    }


def _describe_class(plugin: Plugin) -> dict[str, Any]:
    """First line of the docstring, and literal class attributes, read from the source without importing it."""
    source = plugin.source
    class_name = plugin.entry_point.attr if plugin.entry_point else plugin.definition.__name__
    tree = ast.parse(source.read_text()) if source and source.is_file() else ast.Module([], [])
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            row: dict[str, Any] = {"description": (ast.get_docstring(node) or "").partition("\n")[0]}
            for statement in node.body:
                if not isinstance(statement, ast.Assign | ast.AnnAssign) or statement.value is None:
                    continue
                target = statement.target if isinstance(statement, ast.AnnAssign) else statement.targets[0]
                if isinstance(target, ast.Name) and target.id in STATED:
                    row[target.id] = _literal(statement.value)
            # An attribute that the class does not state has the value of the base class.
            inherited = (
                {"trains": ["encoder", "decoder"], "needs": []} if plugin.kind == "method" else {"abilities": []}
            )
            return {"version": "1", "reference": "", **inherited} | row
    return {"description": f"cannot be read: {class_name} is not defined in {source}", "version": "", "reference": ""}


def _literal(node: ast.expr) -> Any:
    """The value of a literal expression, or of `frozenset` of one. Tuples and frozensets become lists."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "frozenset":
        return sorted(ast.literal_eval(node.args[0])) if node.args else []
    value = ast.literal_eval(node)
    return list(value) if isinstance(value, tuple) else value


def _locate(module: str) -> Path | None:
    """The file of a dotted module, located on sys.path without importing anything; None if there is none."""
    path: list[str] | None = None
    spec = None
    for index, _ in enumerate(names := module.split(".")):
        spec = PathFinder.find_spec(".".join(names[: index + 1]), path)
        if spec is None:
            # Editable installs may use their own finders, which know top-level names only.
            spec = importlib.util.find_spec(names[0]) if index == 0 else None
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or [])
    return Path(spec.origin) if spec is not None and spec.origin else None


def _import(name: str) -> ModuleType:
    """Import the file or module that `--plugin` names. Raises UserError."""
    path, module_name = expand(name), ""
    try:
        if not name.endswith(".py"):
            return importlib.import_module(name)
        if not path.is_file():
            raise UserError(f"--plugin {name}: there is no such file")
        module_name = f"harness_plugin_{path.stem}_{digest_chunks([bytes(path.resolve())])[:8]}"
        if module_name in sys.modules:
            return sys.modules[module_name]
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None, f"{path} ends in .py"
        assert spec.loader is not None, f"{path} ends in .py"
        module = importlib.util.module_from_spec(spec)
        # The module is registered, so that its transforms can be pickled into loader workers.
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
        return module
    except UserError:
        raise
    # Importing a plugin runs foreign code, so any exception is reported to the user.
    except Exception as error:
        sys.modules.pop(module_name, None)
        raise UserError(f"--plugin {name} cannot be loaded, {type(error).__name__}: {error}") from error


def _objects(module: ModuleType) -> list[tuple[str, Any]]:
    """The plugins of a module as pairs (kind, plugin): Method and Backbone classes, and Task and Corpus objects.

    Raises:
        UserError: there are none, or the `name` of a class is not a string.
    """
    objects: list[tuple[str, Any]] = []
    for value in vars(module).values():
        if isinstance(value, PublishedWeights):
            objects.append(("weights", value))
            continue
        if isinstance(value, ImageSet):
            objects.append(("task" if isinstance(value, Task) else "corpus", value))
            continue
        # Their class attribute `plugin_kind` shows methods and backbones: importing the base classes here would import torch.
        kind = getattr(value, "plugin_kind", None) if inspect.isclass(value) else None
        if kind in KINDS and value.__module__ == module.__name__ and "name" in vars(value):
            if not isinstance(value.name, str) or not value.name:
                raise UserError(
                    f"--plugin {module.__name__}: {value.__name__}.name = {value.name!r} is no name: give a string"
                )
            objects.append((str(kind), value))
    if not objects:
        raise UserError(
            f"--plugin {module.__name__} defines no plugin: it needs a subclass of harness.Method or harness.Backbone "
            "with a `name`, or a harness.Task, harness.Corpus or harness.PublishedWeights object"
        )
    return objects
