"""Earlier names of modules, as users' configs and scripts have them."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import pytest

from xtuner import registry
from xtuner.aliases import _WERE_MODULES, MOVED, NAMES

pytestmark = pytest.mark.unit

EVERYWHERE = [name for name in MOVED if not name.startswith('xtuner.model.kernels.fused')]  # those need Triton


@pytest.mark.torch
@pytest.mark.parametrize('name', EVERYWHERE)
def test_an_earlier_name_is_the_same_module(name: str) -> None:
    module = importlib.import_module(name)
    assert module is importlib.import_module(MOVED[name])
    assert module.__name__ == module.__spec__.name == MOVED[name]
    for info in pkgutil.iter_modules(getattr(module, '__path__', ())):  # such as modeling of a family
        if f'{MOVED[name]}.{info.name}' != 'xtuner.kernels.triton':
            submodule = importlib.import_module(f'{MOVED[name]}.{info.name}')
            assert importlib.import_module(f'{name}.{info.name}') is submodule


@pytest.mark.torch
@pytest.mark.parametrize(('package', 'name'), [(package, name) for package in NAMES for name in NAMES[package]])
def test_names_of_classical_configs(package: str, name: str) -> None:
    found = getattr(importlib.import_module(package), name)
    assert found is getattr(importlib.import_module(NAMES[package][name]), name)


@pytest.mark.torch
def test_packages_that_were_modules_still_have_their_names() -> None:
    assert registry.resolve('xtuner.dataset.sources:open_sources').__module__ == 'xtuner.dataset.sources.source'
    assert registry.resolve('xtuner.model.weights:open_weights').__module__ == 'xtuner.model.weights.reader'
    assert set(_WERE_MODULES) & set(MOVED) == set()
    with pytest.raises(AttributeError, match='no attribute'):
        importlib.import_module('xtuner.dataset.cache').nothing  # noqa: B018


def test_a_config_may_name_an_earlier_path() -> None:
    found = registry.resolve('xtuner.dataset.template:get_template')
    assert found is importlib.import_module('xtuner.dataset.templates.builtin').get_template


def test_a_missing_module_is_still_missing() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module('xtuner.dataset.nothing')
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module('xtuner.model.kernels.nothing')


def test_importing_the_package_imports_no_library() -> None:
    code = 'import sys, xtuner; print([m for m in ("torch", "numpy", "transformers", "mmengine") if m in sys.modules])'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '[]'
