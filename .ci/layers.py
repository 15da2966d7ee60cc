"""Check the imports between the layers of the package; fail on an upward import or an import cycle.

A module may import from its own layer and from lower ones. Imports under TYPE_CHECKING are ignored. The miniature may
only be imported in the functions that use it, not at module level.
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
    {"model", "chat", "data", "segments", "media_tokens", "answering"},
    {"train", "evaluate", "embed", "memory", "convert", "configs", "publish"},
    {"aot", "serve"},
    {"miniature"},
    {"cli", "__main__"},
)


def list_modules() -> dict[str, Path]:
    """Return the files of the package by dotted name, including those behind symbolic links."""
    found = {}
    for folder, _, names in os.walk("vllama_jax", followlinks=True):
        for file in (Path(folder, name) for name in names if name.endswith(".py")):
            found[".".join(file.with_suffix("").parts).removesuffix(".__init__")] = file
    return found


def find_imports(tree: ast.Module, names: set[str]) -> set[str]:
    """Return the modules of the package that a module imports, including imports in functions."""
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


def remove_functions(tree: ast.Module) -> ast.Module:
    """Return a module without its functions: the code that runs when it is imported."""
    return ast.Module([node for node in tree.body if not isinstance(node, ast.FunctionDef)], [])


def get_top_module(name: str) -> str:
    """Return the first part of a module's name below the package, such as `train` of `vllama_jax.train.loop`."""
    return name.split(".")[1] if "." in name else "__init__"


def get_layer(name: str) -> int:
    """Return the number of a module's layer, from 0 for the lowest."""
    return next(number for number, top_modules in enumerate(LAYERS) if get_top_module(name) in top_modules)


def main() -> None:
    """Check all modules, print violations, and exit with 1 if there are any."""
    files = list_modules()
    trees = {name: ast.parse(file.read_text()) for name, file in files.items()}
    graph = {name: find_imports(tree, set(files)) - {name} for name, tree in trees.items()}
    upward = [
        (importer, imported)
        for importer, used in graph.items()
        for imported in used
        if get_layer(imported) > get_layer(importer)
    ]
    for importer, imported in sorted(upward):
        print(f"{files[importer]}: imports {imported}, which is in a higher layer")
    eager = [
        (importer, imported)
        for importer, tree in trees.items()
        for imported in find_imports(remove_functions(tree), set(files))
        if get_top_module(imported) == "miniature" != get_top_module(importer)
    ]
    for importer, imported in sorted(eager):
        print(f"{files[importer]}: imports {imported} at module level; import it in the function that uses it")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        sys.exit(f"import cycle: {' → '.join(error.args[1])}")
    sys.exit(bool(upward or eager))


if __name__ == "__main__":
    main()
