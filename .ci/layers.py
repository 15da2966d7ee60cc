"""Fails on an import cycle within the package, or on an import from a lower layer to a higher one.

A module imports from its own layer and from lower ones. Imports for type checkers only do not count. The miniature is
imported where it is used, in a function, and by nothing at module level.
"""

import ast
import graphlib
import os
import sys
from pathlib import Path

LAYERS = (
    {"__init__", "errors"},
    {"config", "branches", "towers", "io", "runtime", "sharding"},
    {"nn", "media", "text"},
    {"checkpoints", "generate"},
    {"model", "chat", "data"},
    {"train", "evaluate", "memory", "convert", "configs"},
    {"aot"},
    {"miniature"},
    {"cli", "__main__"},
)


def modules() -> dict[str, Path]:
    """Files of the package by dotted name; those behind its symbolic links too."""
    found = {}
    for folder, _, names in os.walk("vllama_jax", followlinks=True):
        for file in (Path(folder, name) for name in names if name.endswith(".py")):
            found[".".join(file.with_suffix("").parts).removesuffix(".__init__")] = file
    return found


def imports(tree: ast.Module, names: set[str]) -> set[str]:
    """The modules of the package that a module imports, in functions too."""
    typing_only = {
        statement
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in names else node.module for name in full}
    return found & names


def without_functions(tree: ast.Module) -> ast.Module:
    """What runs when a module is imported."""
    return ast.Module([node for node in tree.body if not isinstance(node, ast.FunctionDef)], [])


def part(name: str) -> str:
    return name.split(".")[1] if "." in name else "__init__"


def layer(name: str) -> int:
    return next(number for number, parts in enumerate(LAYERS) if part(name) in parts)


def main() -> None:
    files = modules()
    trees = {name: ast.parse(file.read_text()) for name, file in files.items()}
    graph = {name: imports(tree, set(files)) - {name} for name, tree in trees.items()}
    upward = [(one, other) for one, used in graph.items() for other in used if layer(other) > layer(one)]
    for one, other in sorted(upward):
        print(f"{files[one]}: imports {other}, which is in a higher layer")
    eager = [
        (one, other)
        for one, tree in trees.items()
        for other in imports(without_functions(tree), set(files))
        if part(other) == "miniature" != part(one)
    ]
    for one, other in sorted(eager):
        print(f"{files[one]}: imports {other} at module level; import it in the function that uses it")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        sys.exit(f"import cycle: {' → '.join(error.args[1])}")
    sys.exit(bool(upward or eager))


if __name__ == "__main__":
    main()
