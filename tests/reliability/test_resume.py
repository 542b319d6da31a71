"""Trainings that are killed, terminated or run out of disk, and continue as if nothing happened.

What "as if nothing happened" means: the same bits in the weights, their average, the optimizer, the
schedules, the random states and the loss history, the same data in the same order, and the same
validations, as in a run that was left alone.
"""

import os
import pickle
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip('mmpretrain')

from runs import LIMIT, VARIANTS, Runs, write_config, write_images

from mmvim.checkpoints.training import BrokenCheckpoint, candidates, inspect

# Where a run spends time: importing is done, so this is building, training and validating.
LASTS = 4.0


@pytest.fixture(scope='module')
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp('images')
    write_images(root)
    return root


@pytest.fixture(scope='module')
def undisturbed(runs, images, tmp_path_factory):
    """Directories of runs that were left alone, by variant."""
    done: dict[str, Path] = {}

    def get(variant: str) -> Path:
        if variant not in done:
            path = tmp_path_factory.mktemp('undisturbed')
            write_config(path / 'config.py', images, variant)
            assert runs.wait(start(runs, path)) == 0, log(path)
            done[variant] = path
        return done[variant]

    return get


def start(runs: Runs, path: Path, *argv: str, **kwargs) -> int:
    return runs.start(path, 'config.py', '--work-dir', 'work', *argv, **kwargs)


def log(path: Path) -> str:
    return (path / 'log').read_text()[-3000:]


def load(path: str | Path) -> dict:
    # Written by the test itself.
    return torch.load(path, weights_only=False)


def assert_same(ours, theirs, where: str = '') -> None:
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f'{where}.{key}')
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(a, b, f'{where}.{i}')
    elif isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype, where
        assert torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where


def assert_as_if_undisturbed(path: Path, reference: Path) -> None:
    last = [Path(p / 'work' / 'last_checkpoint').read_text() for p in (path, reference)]
    assert Path(last[0]).name == Path(last[1]).name
    ours, theirs = (load(p / name) for p, name in zip((path, reference), last, strict=True))
    for key in (
        'state_dict',
        'ema_state_dict',
        'optimizer',
        'param_schedulers',
        'mmvim_random_states',
    ):
        assert_same(ours[key], theirs[key], key)
    assert ours['meta']['iter'] == theirs['meta']['iter'] == 24
    hubs = [
        checkpoint['message_hub']['log_scalars']['train/loss']._log_history.tolist()
        for checkpoint in (ours, theirs)
    ]
    assert len(hubs[0]) == 24
    assert hubs[0] == hubs[1]
    # A line each time that an iteration is begun: more than once for those that were lost.
    lines = [set((p / 'batches').read_text().splitlines()) for p in (path, reference)]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 24
    validated = [set((p / 'validations').read_text().split()) for p in (path, reference)]
    assert validated[0] == validated[1]
    assert sorted(p.name for p in (path / 'work').glob('*.pth*')) == sorted(
        p.name for p in (reference / 'work').glob('*.pth*')
    )


class Run:
    """A run that is disturbed, and what must hold after each disturbance."""

    def __init__(self, runs: Runs, path: Path, images: Path, variant: str, pause: float = 0.01):
        self.runs, self.path = runs, path
        path.mkdir(exist_ok=True)
        write_config(path / 'config.py', images, variant, pause)
        self.iteration = 0

    def go(self, fault: dict | None = None, kill_after: float | None = None) -> int:
        pid = start(self.runs, self.path, '--resume', fault=fault)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)
        code = self.runs.wait(pid)
        self.check()
        return code

    def check(self) -> None:
        """Every existing checkpoint loads, and the newest never gets older."""
        work = self.path / 'work'
        found = candidates(str(work))
        if not found:
            assert self.iteration == 0
            return
        newest = inspect(found[0])
        assert newest.iteration >= self.iteration
        self.iteration = newest.iteration
        assert load(newest.path)['optimizer']['state']


def faults(rng: random.Random) -> dict[str, dict]:
    """One fault of each kind, at a random one of the first three checkpoints."""
    points = ('write', 'before rename', 'after rename', 'pointer', 'remove')
    return {at: {'at': at, 'nth': rng.randint(1, 3), 'fraction': rng.random()} for at in points}


def survive(runs, undisturbed, images, tmp_path, variant, kills: int, rng) -> dict[str, int]:
    """Kill a run ``kills`` times, then let it finish and compare; return the kills by place."""
    counts = {'kills': 0, 'kills while saving': 0}
    number = 0
    while counts['kills'] < kills:
        number += 1
        run = Run(runs, tmp_path / str(number), images, variant)
        for _ in range(rng.randint(1, 5)):
            if counts['kills'] == kills:
                break
            if rng.random() < 0.5:
                code = run.go(kill_after=rng.uniform(0.2, LASTS))
            else:
                code = run.go(rng.choice(list(faults(rng).values())))
                counts['kills while saving'] += code == -signal.SIGKILL
            assert code in (0, -signal.SIGKILL), log(run.path)
            counts['kills'] += code == -signal.SIGKILL
            if code == 0:
                break
        else:
            code = None
        if code != 0:
            assert run.go() == 0, log(run.path)
        assert_as_if_undisturbed(run.path, undisturbed(variant))
    return counts


def test_survives_a_kill_while_saving(runs, undisturbed, images, tmp_path, count):
    variant = 'epochs'
    run = Run(runs, tmp_path / 'run', images, variant)
    assert run.go({'at': 'write', 'nth': 2, 'fraction': 0.6}) == -signal.SIGKILL
    assert list((run.path / 'work').glob('*.mmvim-tmp'))
    assert run.go() == 0, log(run.path)
    assert_as_if_undisturbed(run.path, undisturbed(variant))
    count('kills')


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    ('variant', 'kills'), list(zip(VARIANTS, (18, 16, 16), strict=True)), ids=list(VARIANTS)
)
def test_survives_kills_at_random_moments(
    runs, undisturbed, images, tmp_path, variant, kills, count
):
    rng = random.Random(f'{variant}')
    for kind, n in survive(runs, undisturbed, images, tmp_path, variant, kills, rng).items():
        count(kind, n)


def line_count(path: Path, name: str) -> int:
    """Number of lines in the file of a run."""
    return len((path / name).read_text().splitlines()) if (path / name).exists() else 0


def terminate(runs, path: Path, after: float | None, when: str | None = None, at: int = 0) -> float:
    """Send SIGTERM to a run and its workers, after some seconds or when a file has ``at`` lines.

    Returns how long the run takes to end.
    """
    pid = start(runs, path, '--resume')
    if when is None:
        time.sleep(after)
    else:
        end = time.monotonic() + LIMIT
        while line_count(path, when) < at:
            assert time.monotonic() < end, log(path)
            time.sleep(0.005)
    os.killpg(pid, signal.SIGTERM)
    since, begun = time.monotonic(), line_count(path, 'batches')
    code = runs.wait(pid)
    taken = time.monotonic() - since
    # The iteration that runs is finished, and one more if the signal came at its very end.
    assert line_count(path, 'batches') <= begun + 1
    # Before training begins there is nothing to save, and the signal has its usual effect.
    assert code in (0, 143, -signal.SIGTERM), log(path)
    if code == 143:
        assert 'terminated' in log(path)
        assert 'Traceback' not in log(path)
    return taken


# 21: what is saved between the last two regular checkpoints takes the place of neither.
@pytest.mark.parametrize(('variant', 'at'), [('epochs', 9), ('iterations', 21)])
def test_sigterm_saves_and_exits(runs, undisturbed, images, tmp_path, variant, at, count):
    run = Run(runs, tmp_path / 'run', images, variant, pause=0.05)
    taken = terminate(runs, run.path, None, 'batches', at)
    run.check()
    saved = run.iteration
    assert at <= saved == line_count(run.path, 'batches')
    assert taken < 10
    assert (run.path / 'work' / f'iter_{saved}.pth').exists()
    assert run.go() == 0, log(run.path)
    text = (run.path / 'log').read_text()
    if variant == 'iterations':
        assert f'resumed at epoch 0, iteration {saved}' in text
    elif saved % 6:
        assert f'Epoch {saved // 6 + 1} continues after {saved % 6} of 6 batches' in text
    assert_as_if_undisturbed(run.path, undisturbed(variant))
    count('SIGTERMs')


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize('variant', VARIANTS)
def test_survives_sigterm_at_random_moments(runs, undisturbed, images, tmp_path, variant, count):
    rng = random.Random(f'term {variant}')
    sent = 0
    for number in range(3):
        run = Run(runs, tmp_path / str(number), images, variant, pause=0.03)
        for _ in range(3):
            assert terminate(runs, run.path, rng.uniform(0.5, LASTS)) < 20
            run.check()
            sent += 1
        assert run.go() == 0, log(run.path)
        assert_as_if_undisturbed(run.path, undisturbed(variant))
    count('SIGTERMs', sent)


@pytest.mark.slow
@pytest.mark.parametrize('variant', VARIANTS)
def test_sigterm_in_validation(runs, undisturbed, images, tmp_path, variant, count):
    run = Run(runs, tmp_path / 'run', images, variant, pause=0.05)
    lines = (undisturbed(variant) / 'validations').read_text().split()
    in_second = lines.index(lines[6]) + 3
    terminate(runs, run.path, None, 'validations', in_second)
    run.check()
    assert run.iteration == int(lines[6])
    assert run.go() == 0, log(run.path)
    assert_as_if_undisturbed(run.path, undisturbed(variant))
    count('SIGTERMs')


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['full', 'limit'])
@pytest.mark.parametrize('variant', VARIANTS)
def test_full_disk(runs, undisturbed, images, tmp_path, variant, kind, count):
    reference = undisturbed(variant)
    size = Path(reference / (reference / 'work/last_checkpoint').read_text()).stat().st_size
    run = Run(runs, tmp_path / 'run', images, variant)
    if kind == 'full':
        assert run.go({'at': 'full', 'nth': 2, 'fraction': 0.7}) == 2
        assert 'error: No space left on device' in log(run.path)
    else:
        assert run.go({'at': 'write', 'nth': 2, 'fraction': 0.5}) == -signal.SIGKILL
        assert run.go({'at': 'limit', 'bytes': size // 2}) == 2
        assert 'error: File too large' in log(run.path)
    assert not list((run.path / 'work').glob('*.pth.*')) or kind == 'limit'
    assert run.iteration > 0
    assert run.go() == 0, log(run.path)
    assert_as_if_undisturbed(run.path, reference)
    count('faults')


class Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def damage(path: Path, kind: str, tmp_path: Path) -> str:
    """Damage a checkpoint; return what the warning says."""
    content = path.read_bytes()
    if kind == 'truncated':
        path.write_bytes(content[: int(0.7 * len(content))])
        return 'cannot be read'
    if kind == 'empty':
        path.write_bytes(b'')
        return 'it is empty'
    if kind == 'bit flipped':
        # In the middle of the largest tensor.
        at = len(content) // 2
        path.write_bytes(content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :])
        return 'checksum of'
    if kind == 'text':
        path.write_text('hello\n' * 1000)
        return 'cannot be read'
    if kind == 'weights only':
        torch.save({'state_dict': load(path)['state_dict']}, path)
        return "has no 'optimizer'"
    if kind == 'another model':
        checkpoint = load(path)
        name = 'backbone.pos_embed'
        checkpoint['state_dict'][name] = checkpoint['state_dict'][name].repeat(1, 2, 1)
        torch.save(checkpoint, path)
        return f'another model, {name} has shape'
    if kind == 'code':
        torch.save(dict(load(path), extra=Bomb(str(tmp_path / 'executed'))), path)
        return 'refused'
    if kind == 'a list':
        torch.save([1, 2, 3], path)
        return 'holds a list'
    assert kind == 'a pickle'
    path.write_bytes(pickle.dumps({'state_dict': 1}))
    return 'cannot be read'


DAMAGES = (
    'truncated',
    'empty',
    'bit flipped',
    'text',
    'weights only',
    'code',
    'a list',
    'a pickle',
)


def test_damaged_checkpoints_are_recognized(undisturbed, tmp_path, count):
    """For all kinds, without training on."""
    source = undisturbed('epochs') / 'work' / 'epoch_4.pth'
    assert inspect(str(source)).iteration == 24
    assert inspect(str(source)).seed == 0
    for kind in DAMAGES:
        path = tmp_path / 'epoch_4.pth'
        shutil.copy(source, path)
        reason = damage(path, kind, tmp_path)
        with pytest.raises(BrokenCheckpoint, match=reason):
            inspect(str(path))
        assert not (tmp_path / 'executed').exists()
    # Cut anywhere.
    content = source.read_bytes()
    rng = random.Random(0)
    for _ in range(40):
        path.write_bytes(content[: rng.randrange(len(content))])
        with pytest.raises(BrokenCheckpoint):
            inspect(str(path))
    # Overwritten anywhere, by what a disk returns that lost a block.
    for _ in range(40):
        at = rng.randrange(len(content) - 512)
        if content[at : at + 512] == bytes(512):
            continue
        path.write_bytes(content[:at] + bytes(512) + content[at + 512 :])
        try:
            inspect(str(path))
        except BrokenCheckpoint:
            continue
        # Only what the format leaves unused: what is loaded is what was saved.
        assert_same(load(path)['state_dict'], load(source)['state_dict'])
    count('cases', 80 + len(DAMAGES))
    count('faults', 80 + len(DAMAGES))


def continue_after(kind, runs, undisturbed, images, tmp_path) -> Path:
    reference = undisturbed('epochs')
    run = Run(runs, tmp_path / 'run', images, 'epochs')
    # As it was when the last checkpoint had just been written.
    shutil.copytree(reference / 'work', run.path / 'work')
    for name in ('batches', 'validations'):
        shutil.copy(reference / name, run.path)
    last = run.path / 'work' / 'epoch_4.pth'
    reason = damage(last, kind, tmp_path)
    pid = start(runs, run.path, '--resume')
    assert runs.wait(pid) == 0, log(run.path)
    text = (run.path / 'log').read_text()
    line = next(line for line in text.splitlines() if 'is left out' in line)
    assert 'WARNING' in line
    assert 'work/epoch_4.pth' in line
    assert reason in line
    assert 'resumed at epoch 3, iteration 18' in text
    assert not (tmp_path / 'executed').exists()
    assert_as_if_undisturbed(run.path, reference)


def test_continues_before_a_checkpoint_of_another_model(runs, undisturbed, images, tmp_path, count):
    continue_after('another model', runs, undisturbed, images, tmp_path)
    count('faults')


@pytest.mark.slow
@pytest.mark.parametrize('kind', DAMAGES)
def test_continues_before_a_damaged_checkpoint(runs, undisturbed, images, tmp_path, kind, count):
    continue_after(kind, runs, undisturbed, images, tmp_path)
    count('faults')


def test_nothing_to_continue_from(runs, undisturbed, images, tmp_path, count):
    """A run with broken checkpoints alone is not begun anew over them."""
    run = Run(runs, tmp_path / 'run', images, 'epochs')
    (run.path / 'work').mkdir()
    for name in ('epoch_1.pth', 'epoch_2.pth'):
        (run.path / 'work' / name).write_bytes(b'PK')
    assert runs.wait(start(runs, run.path, '--resume')) == 2
    line = next(x for x in log(run.path).splitlines() if x.startswith('error: '))
    for part in ('none of the checkpoints', 'epoch_1.pth', 'epoch_2.pth', 'start over'):
        assert part in line
    count('faults', 2)


@pytest.mark.slow
def test_a_random_seed_is_kept(runs, images, tmp_path, count):
    """Without a seed in the config, the resumed run takes that of the interrupted one."""
    first = Run(runs, tmp_path / 'first', images, 'epochs', pause=0.05)
    write_config(first.path / 'config.py', images, 'epochs', pause=0.05, seed=None)
    terminate(runs, first.path, None, 'batches', 8)
    shutil.copytree(first.path, tmp_path / 'second')
    for name in ('first', 'second'):
        path = tmp_path / name
        assert runs.wait(start(runs, path, '--resume')) == 0, log(path)
    assert_as_if_undisturbed(tmp_path / 'second', first.path)
    count('SIGTERMs')
