"""The report reads what the launcher leaves, draws it, and tells the truth about it."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('sklearn')
pytest.importorskip('skimage')
pytest.importorskip('matplotlib')
pytest.importorskip('av')

from PIL import Image
from script_runner import run_script

from mmvim.datasets.quickstart import prepare

SIZES = {
    'cls': {'train': 1, 'val': 1, 'test': 90},
    'det': {'train': 1, 'val': 1, 'test': 15},
    'seg': {'train': 1, 'val': 1, 'test': 7},
    'video': {'train': 1, 'val': 1, 'test': 12},
}
KEYS = {'cls': 'accuracy/top1', 'det': 'coco/bbox_mAP_50', 'seg': 'mIoU', 'video': 'accuracy/top1'}


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp('data')
    for task, sizes in SIZES.items():
        prepare(task, root, sizes=sizes)
    return root


def fill_work_dir(work_dir: Path, task: str, data: Path, value: float) -> None:
    """The output of training and test: an older run, the newest one, predictions, metrics."""
    key = KEYS[task]
    for time, offset in (('20200101_000000', 0.5), ('20210101_000000', 0.0)):
        log = work_dir / time / 'vis_data'
        log.mkdir(parents=True)
        lines = []
        for step in range(10, 61, 10):
            entry = {'lr': 1e-3, 'loss': 2 / step + offset, 'step': step}
            lines.append({**entry, 'epoch': (step + 19) // 20} if task != 'seg' else entry)
            if step % 20 == 0:
                when = step if task == 'seg' else step // 20
                lines.append({key: value * (0.5 + when / 200), 'step': when})
        (log / 'scalars.json').write_text('\n'.join(json.dumps(line) for line in lines))
        test = work_dir / 'test' / time
        test.mkdir(parents=True)
        (test / f'{time}.json').write_text(json.dumps({key: value - offset, 'other': 1}))
    if task == 'cls':
        dump(work_dir, classification_predictions(data))
    elif task == 'video':
        dump(work_dir, video_predictions(data))
    elif task == 'det':
        dump(work_dir, detection_predictions(data))
    else:
        maps = work_dir / 'test' / 'label_maps'
        maps.mkdir()
        for path in (data / 'seg' / 'annotations' / 'test').iterdir():
            truth = np.asarray(Image.open(path))
            Image.fromarray(np.clip(truth, 1, None)).save(maps / path.name)


def dump(work_dir: Path, samples: list[dict]) -> None:
    with open(work_dir / 'test' / 'predictions.pkl', 'wb') as file:
        pickle.dump(samples, file)


def classification_predictions(data: Path) -> list[dict]:
    import torch

    samples = []
    for i, path in enumerate(sorted((data / 'cls' / 'test').rglob('*.png'))):
        true = int(path.parent.name)
        predicted = (true + 1) % 10 if i % 30 == 0 else true
        samples.append(
            {
                'img_path': str(path),
                'gt_label': torch.tensor([true]),
                'pred_label': torch.tensor([predicted]),
                'pred_score': torch.eye(10)[predicted] * 0.9,
            }
        )
    return samples


def video_predictions(data: Path) -> list[dict]:
    import torch

    samples = []
    for i, line in enumerate((data / 'video' / 'test.txt').read_text().splitlines()):
        name, label = line.split()
        predicted = (int(label) + 1) % 40 if i % 4 == 0 else int(label)
        samples.append(
            {
                'img_path': str(data / 'video' / 'test' / name),
                'gt_label': torch.tensor([int(label)]),
                'pred_label': torch.tensor([predicted]),
                'pred_score': torch.eye(40)[predicted] * 0.9,
            }
        )
    return samples


def detection_predictions(data: Path) -> list[dict]:
    import torch

    content = json.loads((data / 'det' / 'annotations' / 'instances_test.json').read_text())
    samples = []
    for image in content['images']:
        found = [a for a in content['annotations'] if a['image_id'] == image['id']]
        boxes = torch.tensor([a['bbox'] for a in found], dtype=torch.float32)
        boxes[:, 2:] += boxes[:, :2]
        samples.append(
            {
                'img_id': image['id'],
                'img_path': str(data / 'det' / 'test' / image['file_name']),
                'pred_instances': {
                    'bboxes': boxes + 1,
                    'labels': torch.tensor([a['category_id'] - 1 for a in found]),
                    'scores': torch.linspace(0.1, 0.9, len(found)),
                },
            }
        )
    return samples


@pytest.mark.parametrize(
    ('task', 'value'), [('cls', 99.0), ('det', 0.8), ('seg', 80.0), ('video', 95.0)]
)
def test_report(task, value, data, tmp_path, capsys, report_script):
    fill_work_dir(tmp_path, task, data, value)
    run = {'config': 'configs/x.py', 'checkpoint': 'best_1.pth', 'training_seconds': 12.3}
    (tmp_path / 'run.json').write_text(json.dumps(run))
    assert report_script.report(task, tmp_path, data)
    out = capsys.readouterr().out
    assert f'{value * (100 if task == "det" else 1):.2f} %' in out
    assert 'training took 12 s' in out
    assert str(tmp_path / 'best_1.pth') in out
    metrics = json.loads((tmp_path / 'metrics.json').read_text())
    assert metrics['test'][KEYS[task]] == value
    assert metrics['training_seconds'] == 12.3
    for name in ('training_curve.png', 'predictions.png'):
        picture = np.asarray(Image.open(tmp_path / name).convert('RGB'))
        assert min(picture.shape[:2]) > 300
        assert picture.std() > 20
        assert str(tmp_path / name) in out


def test_the_picture_of_all_results(data, tmp_path):
    for task, value in (('det', 0.8), ('seg', 80.0), ('video', 95.0)):
        fill_work_dir(tmp_path / task, task, data, value)
    out = tmp_path / 'pictures' / 'results.png'
    arguments = (f'--work-dir={tmp_path}', f'--data-dir={data}', f'--out={out}')
    done = run_script('misc/results_picture.py', *arguments)
    assert done.returncode == 0, done.stderr
    picture = np.asarray(Image.open(out).convert('RGB'))
    assert picture.std() > 20
    (tmp_path / 'det' / 'test' / 'predictions.pkl').unlink()
    done = run_script('misc/results_picture.py', *arguments)
    assert done.returncode == 1
    assert 'det/test/predictions.pkl: run tools/test.py' in done.stderr


def test_a_result_below_the_recipe_s_is_said(data, tmp_path, capsys, report_script):
    fill_work_dir(tmp_path, 'cls', data, 90.0)
    assert not report_script.report('cls', tmp_path, data)
    assert 'less than the 97 %' in capsys.readouterr().err
    (tmp_path / 'run.json').write_text(json.dumps({'options': ['train_cfg.max_epochs=1']}))
    assert report_script.report('cls', tmp_path, data)


@pytest.mark.parametrize(
    'missing', ['test/predictions.pkl', '2*/vis_data/scalars.json', 'test/2*/2*.json']
)
def test_a_missing_file_is_named(data, tmp_path, capsys, monkeypatch, report_script, missing):
    fill_work_dir(tmp_path, 'cls', data, 99.0)
    for path in list(tmp_path.glob(missing)):
        path.unlink()
    monkeypatch.setattr('sys.argv', ['report.py', 'cls', str(tmp_path), '--data-dir', str(data)])
    assert report_script.main() == 1
    error = capsys.readouterr().err
    assert missing.rpartition('/')[2].replace('2*', '[0-9]*') in error


def test_label_maps_are_drawn_with_their_own_classes(data, tmp_path, monkeypatch, report_script):
    fill_work_dir(tmp_path, 'seg', data, 80.0)
    seen, overlay = [], report_script.overlay
    monkeypatch.setattr(
        report_script,
        'overlay',
        lambda image, labels: seen.append(labels) or overlay(image, labels),
    )
    report_script.draw_segmentation(tmp_path, data)
    folder = data / 'seg' / 'annotations' / 'test'
    names = sorted(path.name for path in folder.iterdir())
    chosen = [names[i] for i in report_script.spread(len(names), len(seen) // 2)]
    for name, true, predicted in zip(chosen, seen[::2], seen[1::2], strict=True):
        # 0 in a file is no class.
        classes = np.asarray(Image.open(folder / name)).astype(int) - 1
        assert np.array_equal(true, classes)
        assert np.array_equal(predicted, np.clip(classes, 0, None))


def test_the_overlay_colours_digits_only(report_script):
    image = np.full((4, 4, 3), 100, np.uint8)
    labels = np.zeros((4, 4), int)
    labels[0, 0], labels[0, 1] = 3, -1
    out = report_script.overlay(image, labels)
    assert len(set(out[0, 0].tolist())) > 1
    assert (out[0, 1] == out[3, 3]).all()
    assert (out[3, 3] == 70).all()
