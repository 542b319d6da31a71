"""Differences between the task libraries, for the one launcher that serves them all."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from mmengine.config import Config, ConfigDict
from torch import Tensor, nn

from mmvim._configs import innermost_dataset, leaf_datasets, type_name
from mmvim.engine.label_maps import image_root
from mmvim.errors import UserError


@dataclass(frozen=True)
class Task:
    """One task library.

    Attributes:
        out_help: Description of the output of ``--out``.
        visualize: ``(hook config, config, show_dir)``: turn on drawing in the test loop.
        dump_predictions: ``(config, path)``: make the test loop write its predictions.
        tta_model: The model that merges test-time augmentations, if the config has none.
        tta_from: First transform of the test pipeline that comes after flipping.
        class_outputs: ``model -> {key path: number of classes}`` of the heads that must match the
            classes of the data set.
        labels: ``data sample -> labels`` of the ground truth, or None if it has none.
        packed: What test samples must say of their image, for predictions in its coordinates.
        show_interval: Whether the visualization hook itself has an interval for the test loop.
        dataloader_defaults: Settings that the library's own launcher adds to dataloaders.
    """

    out_help: str
    visualize: Callable[[dict, Config, str | None], None]
    dump_predictions: Callable[[Config, str], None]
    tta_model: dict
    tta_from: str
    class_outputs: Callable[[nn.Module], dict[str, int]]
    labels: Callable[[Any], Tensor | None]
    show_interval: bool = False
    packed: tuple[str, ...] = ()
    dataloader_defaults: dict = field(default_factory=dict)


def metrics_of(cfg: Config) -> list[dict]:
    """Return the metrics of ``cfg.test_evaluator`` as a list that can be appended to."""
    evaluator = cfg.test_evaluator
    if isinstance(evaluator, dict) and 'metrics' in evaluator:
        if not isinstance(evaluator['metrics'], list):
            evaluator['metrics'] = [evaluator['metrics']]
        return evaluator['metrics']
    if not isinstance(evaluator, list):
        cfg.test_evaluator = list(evaluator) if isinstance(evaluator, tuple) else [evaluator]
    return cfg.test_evaluator


def _check_pickle(path: str) -> None:
    if not path.endswith(('.pkl', '.pickle')):
        raise UserError(f'--out must end with .pkl or .pickle for predictions, not {path!r}')


def _dump_classification(cfg: Config, path: str) -> None:
    _check_pickle(path)
    dataset = innermost_dataset(cfg.get('test_dataloader'))
    if dataset.get('with_label') is False or dataset.get('split') == 'test':
        # Without labels there is nothing to measure.
        cfg.test_evaluator = []
    metrics_of(cfg).append({'type': 'mmengine.DumpResults', 'out_file_path': path})


def _dump_detection(cfg: Config, path: str) -> None:
    _check_pickle(path)
    metrics_of(cfg).append({'type': 'mmdet.DumpDetResults', 'out_file_path': path})


def _dump_segmentation(cfg: Config, path: str) -> None:
    root, dataset = image_root(cfg), innermost_dataset(cfg.get('test_dataloader'))
    pipeline, folders = dataset.get('pipeline') or (), dataset.get('data_prefix')
    if isinstance(folders, dict) and folders.get('seg_map_path') is None:
        pipeline = [step for step in pipeline if 'Annotations' not in type_name(step)]
        dataset['pipeline'] = pipeline
    if not any('Annotations' in str(step) for step in pipeline):
        # Without annotations there is nothing to measure.
        cfg.test_evaluator = []
    metrics_of(cfg).append({'type': 'mmvim.LabelMapDump', 'directory': path, 'root': root})


def _paint_segmentation(hook: dict, cfg: Config, show_dir: str | None) -> None:
    hook.update(draw=True)
    if show_dir is not None:
        visualizer = cfg.get('visualizer') or ConfigDict(type='SegLocalVisualizer')
        if not visualizer.get('vis_backends'):
            visualizer['vis_backends'] = [{'type': 'LocalVisBackend'}]
        cfg.visualizer = ConfigDict(visualizer, save_dir=show_dir)


def _classes(head: Any) -> int | None:
    count = getattr(head, 'num_classes', None)
    return count if isinstance(count, int) and count > 0 else None


def _collect(heads: Iterable[tuple[str, Any]]) -> dict[str, int]:
    """Return the class counts of heads; a list of heads (cascades) counts each."""
    found = {}
    for path, head in heads:
        parts = head if isinstance(head, nn.ModuleList) else [head]
        for i, part in enumerate(parts):
            count = _classes(part)
            # A region proposal network has one class, whatever the data.
            if count is not None and not type(part).__name__.endswith('RPNHead'):
                name = f'{path}.{i}' if isinstance(head, nn.ModuleList) else path
                found[f'{name}.num_classes'] = count
    return found


def _detector_outputs(model: nn.Module) -> dict[str, int]:
    # In open-vocabulary detectors and panoptic segmentors box classes differ from the data's.
    if hasattr(model, 'language_model') or hasattr(model, 'panoptic_fusion_head'):
        return {}
    roi_head = getattr(model, 'roi_head', None)
    return _collect(
        [
            ('model.bbox_head', getattr(model, 'bbox_head', None)),
            ('model.roi_head.bbox_head', getattr(roi_head, 'bbox_head', None)),
        ]
    )


def _segmentor_outputs(model: nn.Module) -> dict[str, int]:
    head = getattr(model, 'decode_head', None)
    head = head[-1] if isinstance(head, nn.ModuleList) else head
    if 'Depth' in type(model).__name__ or 'Depth' in type(head).__name__:
        return {}
    # Auxiliary heads may have a task of their own (STDC's predicts boundaries).
    return _collect([('model.decode_head', head)])


def _detection_labels(sample: Any) -> Tensor | None:
    instances = sample.get('gt_instances')
    return None if instances is None else instances.get('labels')


def _segmentation_labels(sample: Any) -> Tensor | None:
    label_map = sample.get('gt_sem_seg')
    return None if label_map is None else label_map.data


TASKS: dict[str, Task] = {
    'mmpretrain': Task(
        out_help='a pickle of all predictions',
        visualize=lambda hook, _, show_dir: hook.update(enable=True, out_dir=show_dir),
        dump_predictions=_dump_classification,
        tta_model={'type': 'mmpretrain.AverageClsScoreTTA'},
        tta_from='PackInputs',
        class_outputs=lambda model: _collect([('model.head', getattr(model, 'head', None))]),
        labels=lambda sample: sample.get('gt_label'),
        show_interval=True,
        dataloader_defaults={
            'pin_memory': True,
            'persistent_workers': True,
            'collate_fn': {'type': 'default_collate'},
        },
    ),
    'mmdet': Task(
        out_help='a pickle of all predictions',
        visualize=lambda hook, _, show_dir: hook.update(draw=True, test_out_dir=show_dir),
        dump_predictions=_dump_detection,
        tta_model={
            'type': 'DetTTAModel',
            'tta_cfg': {'nms': {'type': 'nms', 'iou_threshold': 0.5}, 'max_per_img': 100},
        },
        tta_from='PackDetInputs',
        class_outputs=_detector_outputs,
        packed=('img_shape', 'ori_shape', 'scale_factor'),
        labels=_detection_labels,
    ),
    'mmseg': Task(
        out_help='a directory of PNG label maps',
        visualize=_paint_segmentation,
        dump_predictions=_dump_segmentation,
        tta_model={'type': 'mmseg.SegTTAModel'},
        tta_from='LoadAnnotations',
        class_outputs=_segmentor_outputs,
        packed=('img_shape', 'ori_shape'),
        labels=_segmentation_labels,
    ),
}


def check_packed(task: Task, sample: Any, where: str) -> None:
    """Check what a packed sample says of its image.

    Args:
        task: The table's entry.
        sample: The data sample.
        where: Name of the pipeline, for the message.

    Raises:
        UserError: Something is missing that the model needs to predict.
    """
    missing = [key for key in task.packed if key not in getattr(sample, 'metainfo', task.packed)]
    if missing == ['scale_factor']:
        raise UserError(
            f'{where} gives no scale_factor, by which boxes are scaled back to the image: give it '
            "a step that resizes, of which dict(type='Resize', scale_factor=1.0, keep_ratio=True) "
            'changes nothing, and meta_keys with scale_factor'
        )
    if missing:
        raise UserError(
            f'{where} gives no {" and no ".join(missing)}, which the model needs: they belong into '
            'meta_keys of the step that packs'
        )


def task_of(cfg: Config, flag: str) -> Task:
    """Return the table's entry for a config.

    Args:
        cfg: The config; its ``default_scope`` decides.
        flag: The command-line flag that needs the entry.

    Raises:
        UserError: The scope is not in the table.
    """
    scope = cfg.get('default_scope')
    if scope not in TASKS:
        raise UserError(
            f'{flag} is known for the default_scope {", ".join(sorted(TASKS))}, not for {scope!r}'
        )
    return TASKS[scope]


def apply_tta(cfg: Config, task: Task) -> None:
    """Wrap the model for test-time augmentation and replace the test pipeline.

    ``tta_model`` and ``tta_pipeline`` of the config are used as they are; without them, each image
    is used as it is and mirrored.

    Raises:
        UserError: There is no pipeline, or it does not end as the library's pipelines do.
    """
    if not cfg.get('tta_model') and 'mask_head' in ((cfg.model.get('roi_head') or {}) | cfg.model):
        raise UserError(
            '--tta merges boxes, and the model predicts masks too: give a tta_model that merges '
            'them in the config, or test without --tta'
        )
    model = cfg.get('tta_model') or ConfigDict(task.tta_model)
    for _, dataset in leaf_datasets(cfg.test_dataloader.dataset, ''):
        given = cfg.get('tta_pipeline')
        dataset['pipeline'] = given or _flip_pipeline(dataset.get('pipeline'), task)
    cfg.model = ConfigDict(deepcopy(dict(model)), module=cfg.model)


def _flip_pipeline(pipeline: list[dict] | None, task: Task) -> list[dict]:
    names = [type_name(step) for step in pipeline or []]
    if task.tta_from not in names:
        raise UserError(
            f'--tta without tta_pipeline in the config needs {task.tta_from} in the test '
            f'pipeline, which has {names}'
        )
    start = names.index(task.tta_from)
    tail = deepcopy(list(pipeline[start:]))
    if task.tta_from == 'PackDetInputs':
        default = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
        keys = tuple(tail[0].get('meta_keys', default))
        tail[0]['meta_keys'] = tuple(dict.fromkeys((*keys, 'flip', 'flip_direction')))
    # The unflipped view comes first: mmseg takes the ground truth from it.
    flips = [{'type': 'RandomFlip', 'prob': 0.0}, {'type': 'RandomFlip', 'prob': 1.0}]
    step = {'type': 'TestTimeAug', 'transforms': [flips, *([transform] for transform in tail)]}
    return [*deepcopy(list(pipeline[:start])), step]
