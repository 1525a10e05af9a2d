"""Hash of a user's function: its code, the modules that it imports, and every value that it refers to.

Included: the source of the function's module and, transitively, of all user modules that it imports; versions of
installed packages; default arguments, closures, attributes, and the globals that the code names, with their content.
Not included: files, environment variables and services that are read while the function runs.
"""

from __future__ import annotations

import ast
import copyreg
import functools
import hashlib
import importlib.util
import site
import sys
import sysconfig
import types
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from xtuner.dataset.cache.fingerprint import fingerprint_tokenizer

_SCALARS = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis))
_PLAIN = (list, tuple, dict, set, frozenset)
# Attributes that Python adds to a class.
_ADDED = frozenset(('__dict__', '__weakref__', '__module__', '__qualname__', '__firstlineno__', '__static_attributes__',
                    '__abstractmethods__', '_abc_impl', '__annotations_cache__', '__annotate_func__'))  # fmt: skip


def fingerprint_function(function: Any) -> str:
    """Returns a hash, 32 hexadecimal digits, that changes when a user's function, class or object changes behaviour.

    It is the same in every process: addresses, hash seeds and set order do not enter it.
    """
    return _ObjectHasher({}, set()).digest(function)


class _ObjectHasher:
    """Hashes everything that is reachable from a value, each object once.

    Args:
        seen: Objects visited so far, by address; each is kept alive so that its address is not reused.
        modules: Modules visited so far.
    """

    def __init__(self, seen: dict[int, tuple[int, Any]], modules: set[str]) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._seen, self._modules = seen, modules
        self._pending: list[Any] = []

    def digest(self, value: Any) -> str:
        """Returns the hash of `value` and of everything reachable from it."""
        self._pending.append(value)
        while self._pending:
            self._add(self._pending.pop())
        return self._hash.hexdigest()

    def _update(self, *facts: Any) -> None:
        self._hash.update(repr(facts).encode('utf-8', 'surrogatepass') + b'\0')

    def _follow(self, *values: Any) -> None:
        self._pending.extend(reversed(values))

    def _add(self, value: Any) -> None:
        if type(value) in (str, bytes):  # may be large: hashed without repr
            content = value if isinstance(value, bytes) else value.encode('utf-8', 'surrogatepass')
            self._update(type(value).__name__, len(content))
            return self._hash.update(content)
        if type(value) in _SCALARS:
            return self._update(type(value).__name__, value)
        if id(value) in self._seen:
            return self._update('again', self._seen[id(value)][0])
        if type(value) not in (tuple, frozenset):  # Python may share equal ones
            self._seen[id(value)] = len(self._seen), value
        if type(value) in _PLAIN:
            return self._add_plain(value)
        if isinstance(value, types.ModuleType):
            return self._add_module(value.__name__)
        if isinstance(value, types.CodeType):
            self._update('code', value.co_code, value.co_names, value.co_varnames, value.co_freevars, value.co_flags)
            return self._follow(*value.co_consts)
        if isinstance(value, (types.FunctionType, type)):
            module = str(value.__module__)
            self._add_module(module)
            self._update(type(value).__name__, value.__qualname__)
            if not _is_user_module(module):
                return self._update(module)
            return self._add_class(value) if isinstance(value, type) else self._add_function(value)
        return self._add_object(value)

    def _add_plain(self, value: Any) -> None:
        self._update(type(value).__name__, len(value))
        if isinstance(value, dict):
            self._follow(*(part for item in value.items() for part in item))
        elif isinstance(value, (set, frozenset)):
            self._update(*sorted(map(self._digest_item, value)))
        else:
            self._follow(*value)

    def _digest_item(self, item: Any) -> str:
        """Returns the hash of one item of a set, independent of the other items."""
        if type(item) in _SCALARS:
            return f'{type(item).__name__} {item!r}'
        num_seen = len(self._seen)
        digest = _ObjectHasher(self._seen, set(self._modules)).digest(item)
        while len(self._seen) > num_seen:
            self._seen.popitem()
        return digest

    def _add_function(self, function: types.FunctionType) -> None:
        names = sorted(_names(function.__code__))
        scope = function.__globals__
        values = [value for name in names if name in scope for value in (name, scope[name])]
        modules = [value for value in values if isinstance(value, types.ModuleType) and _is_user_module(value.__name__)]
        used = [(name, vars(module)[name]) for module in modules for name in names if name in vars(module)]
        self._follow(function.__code__, function.__defaults__, function.__kwdefaults__, vars(function),
                     [_content(cell) for cell in function.__closure__ or ()], values, used)  # fmt: skip

    def _add_class(self, cls: type) -> None:
        members = sorted((name, value) for name, value in vars(cls).items() if name not in _ADDED)
        self._follow(cls.__bases__, [part for item in members for part in item])

    def _add_object(self, value: Any) -> None:
        """Hashes an object by what `copy` would rebuild it from, or by its class where it cannot be copied."""
        self._update('object')
        if isinstance(_get(value, 'special_tokens_map'), dict):
            return self._update(fingerprint_tokenizer(value))
        library_hash = _get(value, '_fingerprint')  # a data set: the `datasets` library's own content hash
        if isinstance(library_hash, str):
            return self._update(library_hash)
        # Methods, caches around functions, properties.
        parts = [type(value), *(_get(value, name) for name in ('__func__', '__self__', '__wrapped__', 'fget', 'fset'))]
        if isinstance(value, functools.partial):
            parts += [value.func, value.args, value.keywords]
        elif not isinstance(value, (types.BuiltinFunctionType, types.MethodType, staticmethod, classmethod, property)):
            parts += _reduced(value)
        return self._follow(_get(value, '__name__'), *parts)

    def _add_module(self, name: str) -> None:
        """Hashes the source of a user module and of its imports, or the version of an installed package."""
        if name in self._modules:
            return
        self._modules.add(name)
        file = _file_of(name)
        if not _is_user_module(name) or file is None:
            return self._update('package', name.partition('.')[0], _version(name.partition('.')[0]))
        try:
            content = file.read_bytes()
        except OSError:  # unreadable, so it cannot run either
            return self._update('unreadable', file.name)
        self._update('source', file.name)
        self._add(content)
        if file.suffix == '.py':
            package = name if file.stem == '__init__' else name.rpartition('.')[0]
            for imported in _imports(content, package):
                self._add_module(imported)
        return None


def _get(value: Any, name: str) -> Any:
    try:
        return getattr(value, name, None)
    except Exception:  # a user's property may raise anything
        return None


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _names(code: types.CodeType) -> set[str]:
    """Returns the names that code and the functions inside it refer to: globals, modules and attributes."""
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*inner)


def _reduced(value: Any) -> list[Any]:
    """Returns what `copy` would rebuild an object from; nothing for a lock or an open file."""
    try:
        reduce = copyreg.dispatch_table.get(type(value))
        made = reduce(value) if reduce else value.__reduce_ex__(4)
    except Exception:  # it may run any code
        return ['cannot be copied']
    return [made] if isinstance(made, str) else [list(part) if isinstance(part, Iterator) else part for part in made]


def _imports(source: bytes, package: str) -> Iterator[str]:
    """Yields the modules that a source file imports, including imports inside functions."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):  # it cannot run, so it imports nothing
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split('.')[: len(package.split('.')) - node.level + 1] if node.level else []
            base = '.'.join([*parents, *filter(None, [node.module])])
            yield base
            yield from (f'{base}.{alias.name}' for alias in node.names if _file_of(f'{base}.{alias.name}'))


@functools.lru_cache(maxsize=1)
def _installed() -> tuple[Path, ...]:
    """Returns the folders of modules that are not the user's: Python's, installed packages' and xtuner's."""
    paths = sysconfig.get_paths()
    folders: list[str | Path] = [paths[key] for key in ('stdlib', 'platstdlib', 'purelib', 'platlib')]
    folders += [*site.getsitepackages(), site.getusersitepackages()]
    return tuple(Path(folder).resolve() for folder in [*folders, Path(__file__).parents[2]])


def _is_user_module(name: str) -> bool:
    """Whether a module is the user's: neither built in nor installed."""
    if name.partition('.')[0] in sys.stdlib_module_names:
        return name == '__main__'
    paths = _module_paths(name)
    if not paths:  # created at run time, such as a notebook's
        return name in sys.modules
    outside_site_packages = [not {'site-packages', 'dist-packages'} & set(path.parts) for path in paths]
    return any(outside_site_packages) and not any(
        folder in (path, *path.parents) for folder in _installed() for path in paths
    )


def _file_of(name: str) -> Path | None:
    """Returns a module's file."""
    return next((path for path in _module_paths(name) if path.is_file()), None)


def _module_paths(name: str) -> list[Path]:
    """Returns a module's file, or the folders of a namespace package, without importing a user's module."""
    module = sys.modules.get(name)
    spec = getattr(module, '__spec__', None)
    parent = name.rpartition('.')[0]
    if module is None and (not parent or parent in sys.modules or _is_user_module(parent)):
        try:
            spec = importlib.util.find_spec(name)  # imports its parent packages, which are the user's
        except Exception:  # no package, or its import fails
            return []
    origin = getattr(module, '__file__', None) or (spec.origin if spec is not None and spec.has_location else None)
    paths = [origin] if origin else list(spec.submodule_search_locations or ()) if spec is not None else []
    return [Path(path).resolve() for path in paths]


@functools.cache
def _version(package: str) -> str:
    try:
        return '' if package in sys.stdlib_module_names else version(package)
    except PackageNotFoundError:
        return ''
