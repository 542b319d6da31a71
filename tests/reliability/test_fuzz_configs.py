"""Every leaf of every shipped config, changed: a clear error, or a config that can be built."""

import os
import random

import fuzz_configs
import pytest
from config_harness import CONFIGS, config_id
from fuzz_sandbox import Sandbox

for library in ('mmdet', 'mmpretrain', 'mmseg'):
    pytest.importorskip(library)

NAMES = [config_id(path) + '.py' for path in CONFIGS]


@pytest.fixture(scope='module')
def sandbox(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        # Made once, however often the child has to be started again.
        patch.setenv('MMVIM_FUZZ_DATA', str(tmp_path_factory.mktemp('miniature')))
        box = Sandbox('fuzz_configs', seconds=120)
        yield box
        box.close()


def leaves(sandbox, names):
    """One leaf of each kind: parts that configs have in common are tried once."""
    found = {}
    for name in names:
        outcome = sandbox.run({'config': name})
        assert outcome.kind == 'ok', outcome.detail
        for path, same in outcome.detail:
            found.setdefault(same, (name, path))
    return list(found.values())


def check(sandbox, cases, count):
    bad, noted = [], 0
    for case in cases:
        outcome = sandbox.run(case)
        noted += outcome.kind == 'noted'
        count('cases')
        count('crashed', outcome.kind == 'crashed')
        count('hung', outcome.kind == 'hung')
        count('unnamed', outcome.kind == 'failed')
        count('refused', outcome.kind in ('refused', 'noted'))
        count('noted', outcome.kind == 'noted')
        if outcome.kind not in ('ok', 'refused', 'noted'):
            bad.append(f'{case}: {outcome.kind}: {outcome.detail[-300:]}')
    wrong = [line for line in bad if ': failed: ' not in line] or bad[len(cases) // 20 :]
    assert not wrong, f'{len(bad)} of {len(cases)}:\n' + '\n'.join(bad[:20])
    # A traceback with the key below it is for what may be a bug.
    assert noted * 10 <= len(cases)


def changes(places, each, seed):
    draw = random.Random(seed)
    return [
        {'config': name, 'path': path, 'change': change}
        for name, path in places
        for change in draw.sample(fuzz_configs.CHANGES, each)
    ]


def test_sample(sandbox, count):
    names = ['quickstart/vim_digits_cls.py']
    check(sandbox, random.Random(0).sample(changes(leaves(sandbox, names), 1, 0), 60), count)


@pytest.mark.parametrize('path', ['model.backbone.arch', 'train_cfg.max_epochs'])
def test_unchanged_is_valid(path, sandbox):
    top = path.split('.')
    case = {'config': 'quickstart/vim_digits_cls.py', 'path': tuple(top), 'change': 'unchanged'}
    assert sandbox.run(case).kind == 'ok'


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_every_leaf(sandbox, count):
    """MMVIM_FUZZ_CHANGES sets how many of the changes each leaf goes through, drawn anew."""
    each = int(os.environ.get('MMVIM_FUZZ_CHANGES', '3'))
    check(
        sandbox,
        changes(leaves(sandbox, NAMES), each, random.SystemRandom().randrange(2**32)),
        count,
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_config_is_valid_unchanged(sandbox):
    for name in NAMES:
        for top in ('model', 'train_dataloader', 'optim_wrapper', 'train_cfg'):
            outcome = sandbox.run({'config': name, 'path': (top,), 'change': 'unchanged'})
            assert outcome.kind == 'ok', f'{name}: {top}: {outcome.detail}'
