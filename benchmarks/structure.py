"""Measures the structure of a source tree: sizes, import cycles, duplicate class names, mirrored tests.

    python benchmarks/structure.py [PATH]

PATH is the root of a checkout (default: this one), so that two revisions can be compared:

    mkdir /tmp/old && git archive f519160 | tar -x -C /tmp/old && python benchmarks/structure.py /tmp/old

Only the standard library is needed, and nothing of the tree is imported.
"""

from __future__ import annotations

import argparse
import ast
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = 'xtuner'
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Module:
    """A source file.

    Attributes:
        name: Dotted, without `__init__`.
        path: The file.
        tree: Its syntax tree.
        num_lines: Lines, blank ones and comments included.
    """

    name: str
    path: Path
    tree: ast.Module
    num_lines: int

    @property
    def package(self) -> str:
        """The package directly below the top one; '.' for the modules beside the packages."""
        parts = self.path.relative_to(_top(self.path)).parts
        return parts[0] if len(parts) > 1 else '.'


def _top(path: Path) -> Path:
    return next(folder for folder in path.parents if folder.name == PACKAGE and folder.parent.name != PACKAGE)


def read_modules(root: Path) -> dict[str, Module]:
    """Every module of the package by its name; shipped configs are not modules."""
    found = {}
    for path in sorted((root / PACKAGE).rglob('*.py')):
        parts = path.relative_to(root).with_suffix('').parts
        if 'configs' in parts:
            continue
        name = '.'.join(parts).removesuffix('.__init__')
        text = path.read_text(encoding='utf-8')
        found[name] = Module(name, path, ast.parse(text), text.count('\n'))
    return found


def functions(modules: dict[str, Module]) -> Iterator[tuple[int, str]]:
    """Length in lines, decorators left out, and dotted name of each function and method."""
    for module in modules.values():
        for node in ast.walk(module.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield (node.end_lineno or node.lineno) - node.lineno + 1, f'{module.name}.{node.name}'


def import_graph(modules: dict[str, Module]) -> dict[str, set[str]]:
    """For each module the modules of the package that it imports, at its top or inside a function."""
    graph = {}
    for module in modules.values():
        found = set()
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                members = {f'{node.module}.{alias.name}' for alias in node.names}
                found |= {member if member in modules else node.module for member in members}
        graph[module.name] = {name for name in found if name in modules and name != module.name}
    return graph


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others (strongly connected components)."""
    reach = {name: _reachable(graph, name) for name in graph}
    groups = {frozenset(other for other in reach[name] if name in reach[other]) for name in graph}
    return sorted(sorted(group) for group in groups if group)


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    todo = list(graph[start])
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += graph[name]
    return found


def duplicate_classes(modules: dict[str, Module]) -> dict[str, list[str]]:
    """Names that more than one class at a module's top level has, a leading underscore left out, with the modules."""
    places = defaultdict(list)
    for module in modules.values():
        for node in module.tree.body:
            if isinstance(node, ast.ClassDef):
                places[node.name.lstrip('_')].append(module.name)
    return {name: found for name, found in sorted(places.items()) if len(found) > 1}


def mirrored(root: Path, modules: dict[str, Module]) -> tuple[list[str], list[str]]:
    """Modules with and without a test of their own: `tests/a/test_b.py` for `a/b.py`.

    A private module `_b.py` has `test_b.py`; `__init__.py` files do not count.
    """
    with_test, without = [], []
    for module in modules.values():
        if module.path.name == '__init__.py':
            continue
        own = module.path.relative_to(root / PACKAGE)
        test = root / 'tests' / own.with_name(f'test_{own.stem.lstrip("_")}.py')
        (with_test if test.is_file() else without).append(module.name)
    return with_test, without


def main() -> None:
    """Prints the measures."""
    parser = argparse.ArgumentParser(description='Measures the structure of a source tree.')
    parser.add_argument('root', nargs='?', type=Path, default=ROOT, help='root of a checkout (this one)')
    parser.add_argument('--list', action='store_true', help='also name the modules without a mirrored test')
    args = parser.parse_args()
    root = args.root.resolve()
    modules = read_modules(root)
    _print_sizes(modules)
    groups = cycles(import_graph(modules))
    print(f'import cycles, late imports included: {len(groups)}')
    for group in groups:
        print(f'    {", ".join(group)}')
    doubles = duplicate_classes(modules)
    print(f'class names used more than once: {len(doubles)}')
    for name, places in doubles.items():
        print(f'    {name}: {", ".join(places)}')
    with_test, without = mirrored(root, modules)
    print(f'modules with a mirrored test: {len(with_test)} of {len(with_test) + len(without)}')
    for name in without if args.list else ():
        print(f'    {name}')


def _print_sizes(modules: dict[str, Module]) -> None:
    files, lines = Counter(m.package for m in modules.values()), Counter[str]()
    for module in modules.values():
        lines[module.package] += module.num_lines
    print(f'{"package":14}{"files":>7}{"lines":>8}')
    for package, count in lines.most_common():
        print(f'{package:14}{files[package]:7}{count:8,}')
    total = sum(lines.values())
    print(f'{"all":14}{len(modules):7}{total:8,}')
    largest, count = lines.most_common(1)[0]
    print(f'largest package: {largest}, {count / total:.0%} of the lines')
    folder, count = Counter(m.path.parent for m in modules.values()).most_common(1)[0]
    print(f'largest folder: {folder.relative_to(_top(folder / "x"))}, {count} files')
    longest = max(modules.values(), key=lambda m: m.num_lines)
    print(f'longest file: {longest.name}, {longest.num_lines} lines')
    length, name = max(functions(modules))
    print(f'longest function: {name}, {length} lines')


if __name__ == '__main__':
    main()
