"""Which code a plugin consists of, found without importing it: its file, and the modules beside it that it imports."""

import ast
from collections.abc import Iterator
from pathlib import Path

from harness.system.files import digest


def code_digest(source: Path) -> str:
    """Digest of a plugin's code: of its file and, through any number of imports, of the modules of its own package or folder.

    Comments, docstrings and formatting do not count. Other packages are not followed: the record has their versions.
    """
    root, _ = _root(source.resolve())
    digests: dict[str, str] = {}
    for path, tree in code_files(source).items():
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
        if tree is None:
            digests[name] = digest([path.read_bytes().hex()]) if path.is_file() else ""
        else:
            digests[name] = digest(ast.dump(_without_docstrings(tree)))
    return digest(digests)


def code_files(source: Path) -> dict[Path, ast.Module | None]:
    """The files of a plugin's code, as in `code_digest`, each with its syntax tree; None for one that cannot be parsed."""
    trees: dict[Path, ast.Module | None] = {}
    waiting = [source.resolve()]
    root, package = _root(waiting[0])
    while waiting:
        path = waiting.pop()
        if path in trees:
            continue
        try:
            trees[path] = tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, SyntaxError, RecursionError):
            trees[path] = None
            continue
        waiting += [file for file in _imported(tree, path, root, package) if file.is_file()]
    return trees


def _root(source: Path) -> tuple[Path, str]:
    """The folder that imports of a file's own modules start from, and the name of its package; empty for a loose file."""
    folder, package = source.parent, ""
    while (folder / "__init__.py").is_file():
        folder, package = folder.parent, folder.name
    return folder, package


def _imported(tree: ast.AST, path: Path, root: Path, package: str) -> Iterator[Path]:
    """Files that the imports of a module may mean, if they are modules of the same package, or lie beside a loose file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            base = root
        elif isinstance(node, ast.ImportFrom):
            stem = node.module.split(".") if node.module else []
            # `from a import b` may mean a module b of a package a.
            names = [stem, *([*stem, alias.name] for alias in node.names)]
            base = path.parents[node.level - 1] if node.level else root
        else:
            continue
        for parts in filter(None, names):
            absolute = not (isinstance(node, ast.ImportFrom) and node.level)
            if absolute and (parts[0] == "harness" or package not in ("", parts[0])):
                continue
            target = base.joinpath(*parts)
            yield target.with_name(f"{target.name}.py")
            yield target / "__init__.py"


def _without_docstrings(tree: ast.Module) -> ast.Module:
    """The tree without docstrings, which it loses in place."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:]
    return tree
