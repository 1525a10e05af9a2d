"""A hash of a function of the user's: its code, the modules it imports, and every value that it refers to.

Counted: the source of the function's module and of all modules of the user's that it imports, however far; versions of
installed packages; default arguments, closures, attributes, and the globals that the code names, with what they hold.
Not known: files, environment variables and services that are read while the function runs.
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
# Of a class, what Python adds to what the user wrote.
_ADDED = frozenset(('__dict__', '__weakref__', '__module__', '__qualname__', '__firstlineno__', '__static_attributes__',
                    '__abstractmethods__', '_abc_impl', '__annotations_cache__', '__annotate_func__'))  # fmt: skip


def fingerprint_function(function: Any) -> str:
    """Returns a hash, of 32 hexadecimal digits, that changes with what a function, class or object of the user's does.

    It is the same in each process: no address, no hash seed and no order of a set is in it.
    """
    return _Walk({}, set()).digest(function)


class _Walk:
    """Walks over everything that can be reached from a value, each thing once, and hashes it on the way.

    Args:
        met: What was met on the way here, by address; each object is held, so that no other takes its place.
        modules: The modules that were met.
    """

    def __init__(self, met: dict[int, tuple[int, Any]], modules: set[str]) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._met, self._modules = met, modules
        self._ahead: list[Any] = []

    def digest(self, value: Any) -> str:
        """The hash of `value` and of what it leads to."""
        self._ahead.append(value)
        while self._ahead:
            self._add(self._ahead.pop())
        return self._hash.hexdigest()

    def _put(self, *facts: Any) -> None:
        self._hash.update(repr(facts).encode('utf-8', 'surrogatepass') + b'\0')

    def _follow(self, *values: Any) -> None:
        self._ahead.extend(reversed(values))

    def _add(self, value: Any) -> None:
        if type(value) in (str, bytes):  # perhaps large: not as a representation
            content = value if isinstance(value, bytes) else value.encode('utf-8', 'surrogatepass')
            self._put(type(value).__name__, len(content))
            return self._hash.update(content)
        if type(value) in _SCALARS:
            return self._put(type(value).__name__, value)
        if id(value) in self._met:
            return self._put('again', self._met[id(value)][0])
        if type(value) not in (tuple, frozenset):  # Python shares equal ones as it likes
            self._met[id(value)] = len(self._met), value
        if type(value) in _PLAIN:
            return self._add_plain(value)
        if isinstance(value, types.ModuleType):
            return self._add_module(value.__name__)
        if isinstance(value, types.CodeType):
            self._put('code', value.co_code, value.co_names, value.co_varnames, value.co_freevars, value.co_flags)
            return self._follow(*value.co_consts)
        if isinstance(value, (types.FunctionType, type)):
            module = str(value.__module__)
            self._add_module(module)
            self._put(type(value).__name__, value.__qualname__)
            if not _is_own(module):
                return self._put(module)
            return self._add_class(value) if isinstance(value, type) else self._add_function(value)
        return self._add_object(value)

    def _add_plain(self, value: Any) -> None:
        self._put(type(value).__name__, len(value))
        if isinstance(value, dict):
            self._follow(*(part for item in value.items() for part in item))
        elif isinstance(value, (set, frozenset)):
            self._put(*sorted(map(self._digest_apart, value)))
        else:
            self._follow(*value)

    def _digest_apart(self, item: Any) -> str:
        """The hash of one item of a set, which does not depend on the items before it."""
        if type(item) in _SCALARS:
            return f'{type(item).__name__} {item!r}'
        known = len(self._met)
        found = _Walk(self._met, set(self._modules)).digest(item)
        while len(self._met) > known:
            self._met.popitem()
        return found

    def _add_function(self, function: types.FunctionType) -> None:
        names = sorted(_names(function.__code__))
        scope = function.__globals__
        values = [value for name in names if name in scope for value in (name, scope[name])]
        modules = [module for module in values if isinstance(module, types.ModuleType) and _is_own(module.__name__)]
        used = [(name, vars(module)[name]) for module in modules for name in names if name in vars(module)]
        self._follow(function.__code__, function.__defaults__, function.__kwdefaults__, vars(function),
                     [_content(cell) for cell in function.__closure__ or ()], values, used)  # fmt: skip

    def _add_class(self, cls: type) -> None:
        own = sorted((name, value) for name, value in vars(cls).items() if name not in _ADDED)
        self._follow(cls.__bases__, [part for item in own for part in item])

    def _add_object(self, value: Any) -> None:
        """An object by what it would be made of again, as `copy` does it; one that cannot be copied by its class."""
        self._put('object')
        if isinstance(_get(value, 'special_tokens_map'), dict):
            return self._put(fingerprint_tokenizer(value))
        known = _get(value, '_fingerprint')  # of a data set: the library's own hash of its content
        if isinstance(known, str):
            return self._put(known)
        # Methods, caches around functions, properties.
        parts = [type(value), *(_get(value, name) for name in ('__func__', '__self__', '__wrapped__', 'fget', 'fset'))]
        if isinstance(value, functools.partial):
            parts += [value.func, value.args, value.keywords]
        elif not isinstance(value, (types.BuiltinFunctionType, types.MethodType, staticmethod, classmethod, property)):
            parts += _reduced(value)
        return self._follow(_get(value, '__name__'), *parts)

    def _add_module(self, name: str) -> None:
        """The source of a module of the user's and of those that it imports, else the version of its package."""
        if name in self._modules:
            return
        self._modules.add(name)
        file = _file_of(name)
        if not _is_own(name) or file is None:
            return self._put('package', name.partition('.')[0], _version(name.partition('.')[0]))
        try:
            content = file.read_bytes()
        except OSError:  # not ours to read, so not to run either
            return self._put('unreadable', file.name)
        self._put('source', file.name)
        self._add(content)
        if file.suffix == '.py':
            package = name if file.stem == '__init__' else name.rpartition('.')[0]
            for imported in _imports(content, package):
                self._add_module(imported)
        return None


def _get(value: Any, name: str) -> Any:
    try:
        return getattr(value, name, None)
    except Exception:  # a property of anybody's
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
    """Returns what an object is made of, as `copy` would ask it; nothing of a lock or an open file."""
    try:
        reduce = copyreg.dispatch_table.get(type(value))
        made = reduce(value) if reduce else value.__reduce_ex__(4)
    except Exception:  # it may be anybody's code
        return ['cannot be copied']
    return [made] if isinstance(made, str) else [list(part) if isinstance(part, Iterator) else part for part in made]


def _imports(source: bytes, package: str) -> Iterator[str]:
    """Yields the modules that a source names in its imports, those inside functions too."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):  # it does not run, and so it imports nothing
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
    """Returns where packages lie that are not the user's: Python's own, installed ones, and ours."""
    paths = sysconfig.get_paths()
    folders: list[str | Path] = [paths[key] for key in ('stdlib', 'platstdlib', 'purelib', 'platlib')]
    folders += [*site.getsitepackages(), site.getusersitepackages()]
    return tuple(Path(folder).resolve() for folder in [*folders, Path(__file__).parents[1]])


def _is_own(name: str) -> bool:
    """Whether a module is the user's: neither built in nor installed."""
    if name.partition('.')[0] in sys.stdlib_module_names:
        return name == '__main__'
    places = _places(name)
    if not places:  # made at run time, such as a notebook's
        return name in sys.modules
    own = [not {'site-packages', 'dist-packages'} & set(place.parts) for place in places]
    return any(own) and not any(folder in (place, *place.parents) for folder in _installed() for place in places)


def _file_of(name: str) -> Path | None:
    """Returns a module's file."""
    return next((place for place in _places(name) if place.is_file()), None)


def _places(name: str) -> list[Path]:
    """Returns a module's file, or the folders of one without; a module of the user's is not run for it."""
    module = sys.modules.get(name)
    spec = getattr(module, '__spec__', None)
    parent = name.rpartition('.')[0]
    if module is None and (not parent or parent in sys.modules or _is_own(parent)):
        try:
            spec = importlib.util.find_spec(name)  # runs packages around it, which are the user's
        except Exception:  # the package is none, or fails
            return []
    origin = getattr(module, '__file__', None) or (spec.origin if spec is not None and spec.has_location else None)
    places = [origin] if origin else list(spec.submodule_search_locations or ()) if spec is not None else []
    return [Path(place).resolve() for place in places]


@functools.cache
def _version(package: str) -> str:
    try:
        return '' if package in sys.stdlib_module_names else version(package)
    except PackageNotFoundError:
        return ''
