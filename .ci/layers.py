"""Fails on an import cycle within the package, or on an import from a lower layer to a higher one.

A module imports from its own layer and from lower ones. Imports for type checkers only do not count.
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


def imports(file: Path, names: set[str]) -> set[str]:
    """The modules of the package that a file imports, in functions too."""
    tree = ast.parse(file.read_text())
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


def layer(name: str) -> int:
    part = name.split(".")[1] if "." in name else "__init__"
    return next(number for number, parts in enumerate(LAYERS) if part in parts)


def main() -> None:
    files = modules()
    graph = {name: imports(file, set(files)) - {name} for name, file in files.items()}
    upward = [(one, other) for one, used in graph.items() for other in used if layer(other) > layer(one)]
    for one, other in sorted(upward):
        print(f"{files[one]}: imports {other}, which is in a higher layer")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        sys.exit(f"import cycle: {' → '.join(error.args[1])}")
    sys.exit(bool(upward))


if __name__ == "__main__":
    main()
