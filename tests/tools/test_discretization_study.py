"""The scripts of the study of discretizations."""

import csv
import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import set_random_seed

from mmvim.ops import DISCRETIZATIONS, intercept_ops, selective_scan

ROOT = Path(__file__).parents[2]
FOLDER = 'studies/discretization'


@pytest.fixture(scope='module')
def run(load_script):
    return load_script(f'{FOLDER}/run.py')


@pytest.fixture(scope='module')
def report(load_script):
    return load_script(f'{FOLDER}/report.py')


@pytest.fixture(scope='module')
def earlier_code(load_script):
    return load_script(f'{FOLDER}/earlier_code.py')


def scan_inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = dict(u=(2, 9, 4), delta=(2, 9, 4), A=(4, 3), B=(2, 9, 3), C=(2, 9, 3))
    found = {k: torch.randn(s, generator=generator) for k, s in shapes.items()}
    found['A'] = -found['A'].exp()
    return {k: v.requires_grad_() for k, v in found.items()}


def value_and_gradients(inputs, method, scale=1.0):
    A = inputs['A'] * scale
    out = selective_scan(**{**inputs, 'A': A}, delta_softplus=True, discretization=method)
    return out, torch.autograd.grad(out.square().sum(), list(inputs.values()))


def test_zoh_gradients_with_the_value_of_a_method(earlier_code):
    inputs = scan_inputs()
    right, gradients = value_and_gradients(inputs, 'bilinear')
    scan = earlier_code.faulty_scan('zoh-gradients')
    with intercept_ops(selective_scan=scan):
        out, faulty = value_and_gradients(inputs, 'bilinear')
    torch.testing.assert_close(out, right)
    zoh = selective_scan(**inputs, delta_softplus=True)
    expected = torch.autograd.grad(zoh, list(inputs.values()), 2 * right.detach())
    for found, wanted, other in zip(faulty, expected, gradients, strict=True):
        torch.testing.assert_close(found, wanted)
        assert not torch.allclose(found, other, rtol=1e-3)


def test_scaled_twice(earlier_code):
    inputs = scan_inputs()
    shown, _ = value_and_gradients(inputs, 'zoh', scale=1 / np.log(2))
    scan = earlier_code.faulty_scan('scaled-twice')
    with intercept_ops(selective_scan=scan):
        out, faulty = value_and_gradients(inputs, 'zoh')
    torch.testing.assert_close(out, shown)
    zoh = selective_scan(**inputs, delta_softplus=True)
    expected = torch.autograd.grad(zoh, list(inputs.values()), 2 * shown.detach())
    torch.testing.assert_close(faulty, expected)


def test_unknown_fault(earlier_code):
    with pytest.raises(ValueError, match=r"fault must be one of .*, got 'none'"):
        earlier_code.EarlierCode('none')


def test_grid(run):
    runs = run.grid(7)
    assert len(runs) == len(set(runs)) == len({r.name for r in runs})
    main = [(r.method, r.seed) for r in runs if r.part == 'main']
    assert main == [(m, s) for s in range(7) for m in DISCRETIZATIONS]
    assert [r.seed for r in runs[-18:]] == [5] * 9 + [6] * 9
    assert {(r.method, r.rate) for r in runs if r.part == 'rate'} == {
        (m, rate) for m in DISCRETIZATIONS for rate in (0.5, 2)
    }
    for fine in (r for r in runs if r.part == 'fine-tune'):
        assert 'zoh' in (fine.method, fine.origin)
        assert runs.index(fine.source) < runs.index(fine)


def rows_for(run, tmp_path, top1):
    """Rows of the first seeds of `main`, with an accuracy by method."""
    table = run.Tables(tmp_path)
    runs = [r for r in run.grid() if r.part == 'main']
    table.add('runs', [asdict(r) | dict(status='finished', top1=top1(r)) for r in runs])


def test_runs_wait_for_what_they_build_on(run, tmp_path):
    arguments = run.parse_args(['--out', str(tmp_path), '--parts', 'main', 'fine-tune'])
    jobs = run.Jobs(arguments)
    first = [jobs.next() for _ in range(9)]
    assert {r.part for r in first} == {'main'}
    assert {r.seed for r in first} == {0}
    assert jobs.next() == run.Run('main', 'vim_cifar10', 'zoh', 1)
    jobs.end(first[0])
    freed = [jobs.next() for _ in range(9)]
    assert {(r.origin, r.part) for r in freed} == {('zoh', 'fine-tune')}


def test_the_third_method_of_length(run, tmp_path):
    arguments = run.parse_args(['--out', str(tmp_path), '--parts', 'length'])
    assert {r.method for r in run.Jobs(arguments).left} == {'zoh', 'bilinear', run.BEST}
    rows_for(run, tmp_path, lambda r: 90 if r.method == 'bilinear' else 50 + (r.method == 'rk4'))
    assert {r.method for r in run.Jobs(arguments).left} == {'zoh', 'bilinear', 'rk4'}
    assert [run.Jobs(arguments).next().method for _ in range(3)] == ['zoh'] * 3


def test_the_third_method_is_not_chosen_from_a_part_of_main(run, tmp_path, capsys):
    arguments = run.parse_args(['--out', str(tmp_path), '--parts', 'length', '--seeds', '1'])
    run.Tables(tmp_path).add('runs', [asdict(run.grid()[1]) | dict(status='finished', top1=60)])
    jobs = run.Jobs(arguments)
    third = [jobs.next() for _ in range(3)][-1]
    assert run.command(third, arguments) is None
    assert 'needs all runs of the part main' in capsys.readouterr().err


def test_a_row_ends_a_run(run, tmp_path):
    runs = run.grid()
    chosen = [runs[0], next(r for r in runs if r.origin), next(r for r in runs if r.rate == 0.5)]
    table = run.Tables(tmp_path)
    for one in chosen:
        table.add('runs', [asdict(one)])
    assert run.finished(tmp_path / 'runs.csv') == set(chosen)
    assert table.added == 3
    assert run.finished(tmp_path / 'none.csv') == set()


def test_commands(run, tmp_path):
    def command(*args, **kwargs):
        arguments = run.parse_args(['--out', str(tmp_path), '--work-dir', str(tmp_path)])
        return run.command(run.Run(*args, **kwargs), arguments)

    words = command('rate', 'vim_cifar10', 'foh', 3, 0.5)
    assert 'model.backbone.discretization=foh' in words
    assert 'randomness.seed=3' in words
    assert 'optim_wrapper.optimizer.lr=0.001' in words
    assert command('fine-tune', 'vim_cifar10', 'zoh', 0, 0.1, origin='foh') is None
    folder = tmp_path / run.Run('main', 'vim_cifar10', 'foh', 0).name
    folder.mkdir()
    (folder / 'epoch_10.pth').touch()
    (folder / 'last_checkpoint').write_text(str(folder / 'epoch_10.pth'))
    words = command('fine-tune', 'vim_cifar10', 'zoh', 0, 0.1, origin='foh')
    assert f'load_from={folder / "epoch_10.pth"}' in words


@pytest.mark.parametrize(('lines', 'status'), [
    ([{'loss': 1.0, 'epoch': 1, 'time': 0.5, 'memory': 10}, {'accuracy/top1': 50.0}], 'finished'),
    ([{'loss': float('nan'), 'epoch': 1, 'time': 0.5}, {'accuracy/top1': 10.0}], 'nan'),
    ([], 'failed'),
])  # fmt: skip
def test_result(run, tmp_path, lines, status):
    log = tmp_path / '20260101_000000' / 'vis_data' / 'scalars.json'
    log.parent.mkdir(parents=True)
    log.write_text('\n'.join(map(json.dumps, lines)))
    (tmp_path / 'config.py').write_text('train_dataloader = dict(batch_size=128)')
    found = run.result(tmp_path, 0, 1.0, 1)
    assert found.status == status
    if status == 'finished':
        assert (found.top1, found.top1_by_epoch, found.loss) == (50.0, '50.00', 1.0)
        assert (found.images_per_second, found.memory) == (256, 10)


def test_runs_of_a_seed_start_from_the_same_weights():
    cfg = Config.fromfile(ROOT / 'configs' / FOLDER / 'vim_cifar10.py')
    cfg.model.backbone.arch.depth = 1
    states = []
    for method in DISCRETIZATIONS:
        set_random_seed(1)
        backbone = MODELS.build(dict(cfg.model.backbone, discretization=method))
        backbone.init_weights()
        states.append(backbone.state_dict())
    for other in states[1:]:
        assert states[0].keys() == other.keys()
        assert all(torch.equal(states[0][name], other[name]) for name in other)


def test_predictions_in_one_copy(load_script):
    """The head's predictions, with labels and scores on the CPU."""
    from mmpretrain.models.heads import LinearClsHead
    from mmpretrain.structures import DataSample

    head = LinearClsHead(num_classes=3, in_channels=2)
    scores = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0]], dtype=torch.bfloat16)

    def samples():
        return [DataSample().set_gt_label(label) for label in (2, 0)]

    expected = head._get_predictions(scores.float(), samples())
    runner = SimpleNamespace(model=SimpleNamespace(head=head))
    load_script(f'{FOLDER}/shared_gpu.py').OneCopy().before_run(runner)
    for found, wanted in zip(head._get_predictions(scores, samples()), expected, strict=True):
        for name in ('gt_label', 'pred_label', 'pred_score'):
            assert torch.equal(found.get(name), wanted.get(name)), name


def write(path, rows):
    with path.open('w', newline='') as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_report(report, tmp_path, capsys):
    """A method that is worse by two points in every seed, and one that only differs by chance."""
    rows = []
    noise = [0.3, -0.2, 0.1, -0.3, 0.2]
    for seed in range(5):
        for method, shift in (('zoh', 0), ('foh', -2 + noise[seed] / 5), ('poly', noise[seed])):
            row = dict(part='main', method=method, seed=seed, rate='1.0', origin='', fault='')
            row |= dict(status='finished', top1=70 + seed + shift, top1_by_epoch='50 70')
            rows.append(row)
    rows.append({**rows[0], 'seed': 5, 'status': 'nan', 'top1': 1})
    rows.append({**rows[0], 'method': 'rk4', 'status': 'nan', 'top1': 'nan'})
    write(tmp_path / 'runs.csv', rows)
    assert report.main([str(tmp_path), '--pictures', str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert '| `zoh` | 5 | 1 | 72.00 ± 1.96 | – | – | – |' in table
    assert '| `rk4` | 0 | 1 | – | – | – | – |' in table
    (foh,) = (line for line in table.splitlines() if '`foh`' in line)
    assert '| -2.00 ± ' in foh
    assert foh.endswith('| yes |')
    (poly,) = (line for line in table.splitlines() if '`poly`' in line)
    assert '| +0.02 ± ' in poly
    assert poly.endswith('| no |')
    assert (tmp_path / 'discretization_differences.svg').stat().st_size > 1000


def test_fine_tuning_beside_the_same_seeds(report):
    swaps = [
        dict(trained='zoh', method=method, seed=seed, top1=top1 + seed)
        for method, top1 in (('zoh', 70), ('tustin', 50))
        for seed in range(3)
    ]
    runs = [
        dict(part='fine-tune', method='tustin', seed=seed, origin='zoh', status='finished', top1=69)
        for seed in (1, 2)
    ]
    assert report.fine_tuning_table(runs, swaps).splitlines()[-1] == (
        '| `zoh` | `tustin` | 2 | 71.50 ± 6.35 | 51.50 ± 6.35 | 69.00 ± 0.00 |'
    )
    assert report.swap_table(swaps).splitlines()[-1].startswith('| `zoh` | 3 | 71.0 | – |')


def test_faults_beside_the_right_code(report):
    base = dict(method='poly', origin='', rate='1.0', status='finished')
    runs = [
        row
        for seed in range(2)
        for row in (
            dict(base, part='main', seed=seed, fault='', top1=60 + seed),
            dict(base, part='faults', seed=seed, fault='zoh-gradients', top1=58 + seed),
        )
    ]
    runs.append(dict(runs[-1], seed=2, status='nan', top1='nan'))
    assert report.fault_table(runs).splitlines()[-1] == (
        '| `poly` | zoh-gradients | 2 | 1 | 58.50 ± 6.35 | 60.50 ± 6.35 | -2.00 ± 0.00 |'
    )


def test_holm(report):
    assert report.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_integration_error(load_script):
    script = load_script(f'{FOLDER}/integration_error.py')
    for method, order in (('zoh', 1), ('bilinear', 1), ('foh_hold', 2), ('tustin', 2)):
        coarse, fine = (script.error(method, -4.0, steps) for steps in (128, 256))
        assert np.log2(coarse / fine) == pytest.approx(order, abs=0.1), method
    # Its weight of the input is of second order in the step: the input is nearly lost.
    assert script.error('foh', -4.0, 256) > 0.9


def test_methods_are_those_of_the_package(report):
    assert report.METHODS == DISCRETIZATIONS
    assert str(ROOT / 'tools') not in sys.path
