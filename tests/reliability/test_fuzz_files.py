"""Images, label maps, annotations, videos and checkpoints that are damaged or made to do harm."""

import os

import fuzz_files
import pytest
from fuzz_sandbox import Sandbox, fuzz

pytest.importorskip('av')
pytest.importorskip('mmdet.datasets')
CASES = {'image': 40, 'label_map': 30, 'annotations': 60, 'video': 30, 'checkpoint': 50}
BOMBS = [(group, name) for group, names in fuzz_files.BOMBS.items() for name in names]


@pytest.fixture(scope='module')
def sandbox():
    box = Sandbox('fuzz_files')
    yield box
    box.close()


@pytest.mark.parametrize('group', CASES)
def test_sample(group, sandbox, count):
    fuzz(fuzz_files.cases(group), sandbox, count, CASES[group], always_the_same=True)


def test_every_bomb(sandbox, count):
    count('cases', len(BOMBS))
    for group, name in BOMBS:
        case = {'group': group, 'kind': fuzz_files.KINDS[group][0], 'seed': 0, 'bomb': name}
        outcome = sandbox.run(case)
        assert outcome.good, f'{case}: {outcome.kind}: {outcome.detail}'


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize('group', CASES)
def test_many(group, sandbox, count):
    """Other cases in every run; MMVIM_FUZZ_CASES sets their number for annotations."""
    cases = int(os.environ.get('MMVIM_FUZZ_CASES', '2400')) * CASES[group] // 60
    fuzz(fuzz_files.cases(group), sandbox, count, cases)
