"""Effects of importing mmvim, each in a fresh interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
TASK_LIBRARIES = ('mmcv', 'mmdet', 'mmseg', 'mmpretrain')

HIDE = """
import importlib.util, sys
hidden = {!r}
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in hidden:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Hide())
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    None if name.partition('.')[0] in hidden else find_spec(name, package)
)
"""


def start(*arguments):
    result = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': str(REPO)},
        cwd='/',
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def evaluate(code, hide=()):
    """Run ``code`` in a new interpreter without the packages ``hide``; return its ``result``."""
    code = (HIDE.format(tuple(hide)) if hide else '') + code
    return json.loads(
        start('-c', code + '\nimport json; print(json.dumps(result))').splitlines()[-1]
    )


def test_import_is_quick_and_pulls_in_no_task_library():
    result = evaluate("""
import time, sys
import torch, mmengine
start = time.process_time()
import mmvim
result = [time.process_time() - start, sorted(sys.modules)]
""")
    seconds, modules = result
    assert not {*TASK_LIBRARIES, 'mmengine.model'} & set(modules)
    assert seconds < 1


def test_models_import_no_task_library_and_no_compiler():
    """torch._dynamo takes longer to import than torch itself."""
    modules = set(evaluate('import sys, mmvim.models; result = sorted(sys.modules)'))
    assert not {*TASK_LIBRARIES, 'torch._dynamo'} & modules


def test_torch_alone_is_enough_for_ops_and_layers():
    shape, messages = evaluate(
        """
import torch, mmvim, mmvim.ops
from mmvim.layers import MambaStack
messages = []
for attempt in ('mmvim.models', 'mmvim.Vim', 'mmvim.registry'):
    try:
        eval(attempt)
    except ImportError as error:
        messages.append(str(error))
result = [MambaStack(8, 2)(torch.randn(1, 5, 8)).shape, messages]
""",
        hide=('mmengine', 'einops', *TASK_LIBRARIES),
    )
    assert shape == [1, 5, 8]
    assert len(messages) == 3
    assert all("pip install 'mmvim[onedl]'" in message for message in messages)


def test_types_resolve_in_every_scope_without_custom_imports():
    for scope in TASK_LIBRARIES[1:]:
        pytest.importorskip(scope)
    names = evaluate("""
from mmengine.registry import MODELS, DefaultScope
cfg = dict(arch=dict(embed_dims=16, depth=1), img_size=32)
result = []
for scope in ('mmengine', 'mmpretrain', 'mmdet', 'mmseg'):
    with DefaultScope.overwrite_default_scope(scope):
        for name in ('mmvim.Vim', 'mmvim.VisionMamba', 'Vim', 'VisionMamba'):
            result.append(type(MODELS.build(dict(type=name, **cfg))).__name__)
        result.append(MODELS.get('mmvim.SimpleFPN').__name__)
""")
    assert names == ['Vim', 'Vim', 'Vim', 'Vim', 'SimpleFPN'] * 4


def test_custom_imports_make_plain_names_known():
    result = evaluate("""
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
Config.fromstring("custom_imports = dict(imports=['mmvim'])", '.py')
result = [type(MODELS.build(dict(type='Vim', arch=dict(embed_dims=16, depth=1)))).__name__]
from mmvim.utils import register_all_modules
register_all_modules(init_default_scope=False)
result.append(DefaultScope.get_current_instance())
register_all_modules()
register_all_modules()
result.append(DefaultScope.get_current_instance().scope_name)
""")
    assert result == ['Vim', None, 'mmvim']


def test_taken_name_is_skipped_with_a_warning():
    result = evaluate("""
import logging
from mmengine.logging import MMLogger
from mmengine.registry import MODELS
messages = []
class Keep(logging.Handler):
    def emit(self, record):
        messages.append((record.levelname, record.getMessage()))
MMLogger.get_current_instance().addHandler(Keep())
@MODELS.register_module()
class Vim:
    pass
import mmvim.models
result = [
    MODELS.get('Vim') is Vim,
    MODELS.get('mmvim.Vim') is MODELS.get('VisionMamba') is mmvim.models.Vim,
    [message for level, message in messages if level == 'WARNING'],
]
""")
    assert result[:2] == [True, True]
    assert len(result[2]) == 1
    assert "type='mmvim.Vim'" in result[2][0]


@pytest.mark.parametrize(
    'name',
    [
        'HOOKS',
        'DATASETS',
        'TRANSFORMS',
        'METRICS',
        'LOOPS',
        'VISUALIZERS',
        'TASK_UTILS',
        'OPTIM_WRAPPER_CONSTRUCTORS',
        'OPTIM_WRAPPERS',
        'PARAM_SCHEDULERS',
        'RUNNERS',
    ],
)
def test_registries_find_their_modules(name):
    import mmengine.registry

    from mmvim import registry

    child = getattr(registry, name)
    assert child.scope == 'mmvim'
    assert child.parent is getattr(mmengine.registry, name)
    assert child.parent.get('mmvim.DoesNotExist') is None
    assert child._imported


def test_main_prints_versions_and_backends():
    out = start('-m', 'mmvim')
    for word in ('mmvim', 'torch:', 'mmengine:', 'CUDA devices:', 'ops:'):
        assert word in out


def test_version_is_that_of_the_package():
    import mmvim

    text = (REPO / 'pyproject.toml').read_text()
    assert f'version = "{mmvim.__version__}"' in text
