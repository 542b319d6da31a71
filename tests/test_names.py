"""Every public name works when it is the first thing that a process asks of mmvim."""

import os
import subprocess
import sys
from pathlib import Path

import forks
import pytest

from mmvim import _names

REPO = Path(__file__).parents[1]

IMAGES = {'arch': {'embed_dims': 16, 'depth': 1}, 'img_size': 32}
VIDEOS = {**IMAGES, 'num_frames': 2}
HEAD = {'type': 'mmpretrain.LinearClsHead', 'num_classes': 2, 'in_channels': 16}
CLIPS = {'type': 'mmvim.VideoMamba', **VIDEOS}
TOKENS = {'type': 'mmvim.VideoMamba', **IMAGES, 'num_frames': 1, 'out_type': 'raw'}
CLASSIFIER = {'backbone': TOKENS, 'head': HEAD}
# Of models that cannot be built without, or are large; the others are built as they are.
ARGUMENTS = {
    'VideoMamba': VIDEOS,
    'Vim': IMAGES,
    'VisionMamba': IMAGES,
    'SimpleFPN': {'in_channels': 16, 'out_channels': 8},
    'StreamingVideoMamba': VIDEOS,
    'MesaClassifier': {**CLASSIFIER, 'mesa_weight': 1.0},
    'SelfDistillClassifier': {**CLASSIFIER, 'teacher': TOKENS},
    'VideoClassifier': {'backbone': CLIPS, 'head': HEAD},
}

# Each request is answered by a fork of a process that has not imported mmvim.
SERVER = """
import importlib, os, sys, traceback
import mmengine.runner, torch, torchvision
from mmengine.registry import MODELS, DefaultScope

assert not any(name.startswith('mmvim') for name in sys.modules)
for kind, name, module, scope, arguments in {requests!r}:
    child = os.fork()
    if child == 0:
        try:
            if scope:
                DefaultScope.get_instance('first', scope_name=scope)
            if kind == 'import':
                scratch = {{}}
                exec(f'from {{module}} import {{name}}', scratch)
                found = scratch[name]
            elif kind == 'get':
                import mmvim
                found = MODELS.get(name)
            else:
                if '.' not in name:
                    import mmvim
                found = type(MODELS.build(dict(type=name, **arguments)))
            print(found.__module__, found.__qualname__, flush=True)
            os._exit(0)
        except BaseException:
            print(repr(traceback.format_exc()), flush=True)
            os._exit(1)
    os.waitpid(child, 0)
"""


def ask(*requests):
    done = forks.run_code(SERVER.format(requests=requests), cwd=Path('/'))
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if 'mmvim' in line or 'Error' in line]


def defined(name):
    qualified = 'Vim' if name == 'VisionMamba' else name
    return f'{_names.NAMES[name]} {qualified}'


def test_each_name_is_imported_first():
    pytest.importorskip('mmpretrain')
    requests = [('import', name, 'mmvim', None, None) for name in _names.NAMES]
    assert ask(*requests) == [defined(name) for _, name, *_ in requests]


def test_each_model_is_built_first_with_its_scope():
    pytest.importorskip('mmpretrain')
    names = [*_names.MODELS, *_names.CLASSIFIERS]
    assert set(ARGUMENTS) <= set(names)
    requests = [('build', f'mmvim.{name}', None, None, ARGUMENTS.get(name, {})) for name in names]
    assert ask(*requests) == [defined(name) for name in names]


def test_each_plain_name_is_built_first():
    requests = [
        (kind, name, None, scope, ARGUMENTS.get(name, {}))
        for name in _names.PLAIN_NAMES
        for kind, scope in (('get', None), ('build', None), ('build', 'mmvim'))
    ]
    assert ask(*requests) == [defined(name) for _, name, *_ in requests]


def test_listings():
    import mmvim
    from mmvim.registry import MODELS

    assert set(_names.NAMES) <= set(dir(mmvim))
    assert {'layers', 'models', 'ops'} <= set(mmvim.__all__) <= set(dir(mmvim))
    assert not set(_names.CLASSIFIERS) & set(mmvim.__all__)
    assert {*_names.MODELS, *_names.CLASSIFIERS} <= set(MODELS.module_dict)
    with pytest.raises(AttributeError, match="'mmvim' has no attribute 'Vmi'"):
        _ = mmvim.Vmi
    with pytest.raises(AttributeError, match=r"'mmvim\.models\.necks' has no attribute 'Vim'"):
        _ = mmvim.models.necks.Vim


def test_hooks_are_registered():
    """Each under its name, and nothing besides."""
    from mmvim.engine import hooks
    from mmvim.registry import HOOKS

    own = [name for name in hooks.__all__ if name.endswith('Hook')]
    assert {name: getattr(hooks, name) for name in own} == HOOKS.module_dict


def test_star_import_needs_no_task_library():
    program = """
from mmvim import *
import sys
assert Vim is VisionMamba and callable(get_model) and 'mmpretrain' not in sys.modules
"""
    environment = {**os.environ, 'PYTHONPATH': str(REPO)}
    subprocess.run([sys.executable, '-c', program], check=True, env=environment)


def test_mmengine_counts_what_is_registered():
    from mmengine.registry import MODELS, traverse_registry_tree

    counted = traverse_registry_tree(MODELS, verbose=False)
    (own,) = [c for c in counted if c['scope'] == 'mmvim' and 'mmvim/models/necks' in c]
    assert own['num_modules'] >= len(ARGUMENTS)
