"""Report the structure of a checkout: `python -m tests.structure [--before CHECKOUT]`, or `make structure`.

For each folder of services/headrace it prints the modules, their lines, the longest file, the longest
function and the folders that it imports from. `__init__` files and the generated stubs are not counted. With
--before it also prints the report of another checkout and compares the totals.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
PACKAGE = "headrace"
GENERATED = f"{PACKAGE}.v1"


@dataclass(frozen=True)
class Module:
    """One source file.

    name       dotted, such as "headrace.batcher.waiting.queue"
    function   name and lines of its longest function
    imports    dotted names of the modules of the package that it imports
    """

    name: str
    lines: int
    function: tuple[str, int]
    imports: frozenset[str]

    @property
    def folder(self) -> str:
        """The package that contains the module."""
        return self.name.rpartition(".")[0]


@dataclass
class Folder:
    """The modules of one package, without those of its sub-packages."""

    name: str
    modules: list[Module] = field(default_factory=list)

    @property
    def lines(self) -> int:
        """Lines of all modules together."""
        return sum(module.lines for module in self.modules)

    @property
    def longest(self) -> Module:
        """The module with the most lines."""
        return max(self.modules, key=lambda module: module.lines)

    @property
    def longest_function(self) -> tuple[str, int]:
        """Name and lines of the longest function, with its module."""
        module = max(self.modules, key=lambda module: module.function[1])
        return f"{module.name.rpartition('.')[2]}.{module.function[0]}", module.function[1]

    @property
    def imports(self) -> list[str]:
        """The other folders that its modules import from."""
        found = {name.rpartition(".")[0] for module in self.modules for name in module.imports}
        return sorted(found - {self.name})


def folders(checkout: Path) -> list[Folder]:
    """Read the folders of a checkout."""
    source = checkout / "services"
    files = {
        ".".join(path.relative_to(source).with_suffix("").parts): path
        for path in sorted((source / PACKAGE).rglob("*.py"))
    }
    found: dict[str, Folder] = {}
    for name, path in files.items():
        if name.endswith(".__init__") or name.startswith(GENERATED):
            continue
        module = _read(name, path, frozenset(files))
        found.setdefault(module.folder, Folder(module.folder)).modules.append(module)
    return list(found.values())


def _read(name: str, path: Path, known: frozenset[str]) -> Module:
    text = path.read_text()
    tree = ast.parse(text)
    longest = max(
        (
            ((node.end_lineno or node.lineno) - node.lineno + 1, node.name)
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ),
        default=(0, "-"),
    )
    imports = frozenset(_imports(tree, known) - {name})
    return Module(name, len(text.splitlines()), (longest[1], longest[0]), imports)


def _imports(tree: ast.Module, known: frozenset[str]) -> set[str]:
    """Return the modules of the package that are imported anywhere in *tree*, in functions too."""

    def candidates() -> Iterator[str]:
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    yield inner if {inner, f"{inner}.__init__"} & known else node.module

    return {
        name if name in known else f"{name}.__init__"
        for name in candidates()
        if name.split(".")[0] == PACKAGE
    }


def report(read: list[Folder]) -> Iterator[str]:
    """Yield the lines of the report."""
    yield f"{'folder':34} {'modules':>7} {'lines':>6}  longest file, longest function; imports"
    for folder in read:
        name, lines = folder.longest_function
        yield (
            f"{_short(folder.name):34} {len(folder.modules):7} {folder.lines:6}  "
            f"{folder.longest.name.rpartition('.')[2]} {folder.longest.lines}, {name} {lines}"
        )
        if folder.imports:
            yield f"{'':34} {'':7} {'':6}  -> {' '.join(map(_short, folder.imports))}"
    if rooms := cycle(read):
        yield f"import cycle: {' <- '.join(map(_short, rooms))}"


def cycle(read: list[Folder]) -> list[str]:
    """Return the rooms of an import cycle; empty if there is none.

    A room is a folder without sub-folders, or a module beside sub-folders: a service's own modules, such as
    `__main__` and `job`, are above and below its folders.
    """
    names = {folder.name for folder in read}
    parents = {name.rpartition(".")[0] for name in names}

    def room(module: str) -> str:
        folder = module.rpartition(".")[0]
        return module if folder in parents else folder

    arrows: dict[str, set[str]] = {}
    for folder in read:
        for module in folder.modules:
            targets = {room(name) for name in module.imports if not name.endswith(".__init__")}
            arrows.setdefault(room(module.name), set()).update(targets - {room(module.name)})
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def totals(read: list[Folder]) -> dict[str, int]:
    """Return the figures of a checkout that `make structure` compares."""
    return {
        "folders": len(read),
        "modules": sum(len(folder.modules) for folder in read),
        "lines": sum(folder.lines for folder in read),
        "imports between folders": sum(len(folder.imports) for folder in read),
        "rooms in an import cycle": len(cycle(read)),
        "modules in the largest folder": max(len(folder.modules) for folder in read),
        "lines of the longest file": max(folder.longest.lines for folder in read),
        "lines of the longest function": max(folder.longest_function[1] for folder in read),
    }


def _short(folder: str) -> str:
    return folder.removeprefix(f"{PACKAGE}.")


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(prog="python -m tests.structure", description=__doc__)
    parser.add_argument("--before", type=Path, help="another checkout to compare with")
    before = parser.parse_args().before
    now = folders(HERE)
    if before is None:
        print(*report(now), sep="\n")
        print()
        print(*(f"{figure}: {value}" for figure, value in totals(now).items()), sep="\n")
        return
    earlier = folders(before)
    print(f"before, {before}", *report(earlier), "", "now", *report(now), "", sep="\n")
    was = totals(earlier)
    print(*(f"{figure}: {was[figure]} -> {value}" for figure, value in totals(now).items()), sep="\n")


if __name__ == "__main__":
    main()
