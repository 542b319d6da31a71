"""The quickstart's scripts as modules."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def load_script(name: str) -> ModuleType:
    path = REPOSITORY / 'tools' / 'quickstart' / f'{name}.py'
    spec = importlib.util.spec_from_file_location(f'quickstart_{name}', path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='session')
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope='session')
def report_script() -> ModuleType:
    pytest.importorskip('matplotlib')
    return load_script('report')


@pytest.fixture(scope='session')
def run_script() -> ModuleType:
    return load_script('run')
