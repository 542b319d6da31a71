"""Consistency of the data with the model's classes."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.registry import DefaultScope
from torch import nn

from mmvim._configs import is_local, type_name
from mmvim.checkpoints.loading import unwrapped
from mmvim.datasets.skip_failures import SkipFailures
from mmvim.engine.batches import check_length
from mmvim.engine.class_names import (
    categories_of,
    check_categories,
    check_distinct,
    check_names,
    difference,
    displacement,
    listed,
    names_in_xml,
)
from mmvim.engine.tasks import TASKS, check_packed
from mmvim.errors import UserError, did_you_mean, from_where
from mmvim.registry import HOOKS

#: Transforms that open the file of a sample by its path.
_FILE_LOADERS = ('LoadImageFromFile', 'LoadVideo')
#: Folders that hold parts of a data set, and not the images of a class.
_SPLITS = {'train', 'training', 'val', 'valid', 'validation', 'test', 'testing'}


@HOOKS.register_module()
class DataCheckHook(Hook):
    """Stop a run whose data set is empty or does not match the classes of the model's heads.

    Before the run, names and numbers of classes are compared: those of the data sets of all loops,
    their annotation files and folders, heads, data preprocessor, metrics and, in a test, the
    checkpoint; and files are looked for. In the first pass over the data of a loop, each label is
    compared with the number of classes: in training, one that is too large would fail an assertion
    in a GPU's kernel, and metrics count it as wrong or leave it out.
    Only the task libraries of :data:`mmvim.engine.tasks.TASKS` are known; others are left alone.

    Args:
        loops: The loops whose data to check before the run: ``'train'``, ``'val'``, ``'test'``.
    """

    priority = 'VERY_HIGH'

    def __init__(self, loops: tuple[str, ...] = ('train', 'val')):
        self.loops = loops
        self._unseen: dict[str, int] = {}
        self._outputs: dict[str, int] = {}
        self._task = None

    def before_run(self, runner) -> None:
        """Compare classes of data, model and metrics.

        Raises:
            UserError: A data set is empty, or two of them do not agree on the classes.
        """
        scope = runner.default_scope
        self._task = TASKS.get(scope.scope_name if isinstance(scope, DefaultScope) else scope)
        model = unwrapped(runner.model)
        if self._task is not None:
            self._outputs = self._task.class_outputs(model)
            _check_model(model, self._outputs, self._ignored_label(runner))
            _check_binary(model)
            _check_losses(model, self._outputs)
        first = None
        for loop in self.loops:
            if getattr(runner, f'_{loop}_loop') is None:
                continue
            dataset = getattr(runner, f'{loop}_dataloader').dataset
            where = f'{loop}_dataloader.dataset ({type(dataset).__name__})'
            self._check_dataset(dataset, where)
            if self._outputs and hasattr(dataset, '__len__'):
                self._unseen[loop] = len(dataset)
            check_length(getattr(runner, f'{loop}_dataloader'), f'{loop}_dataloader')
            if loop == 'train':
                self._check_boxes(dataset, where)
            classes = _classes(dataset)
            if classes and first and (unlike := difference(first[1], classes)):
                raise UserError(f'{first[0]} and {where} have different classes: {unlike}')
            first = first or (classes and (where, classes))
            evaluator = getattr(getattr(runner, f'{loop}_loop'), 'evaluator', None)
            metrics = getattr(evaluator, 'metrics', ()) if self._task else ()
            if loop != 'train':
                self._check_sample(dataset, f'{loop}_dataloader.dataset', metrics)
            for metric in metrics:
                name = f'{loop}_evaluator ({type(metric).__name__})'
                self._check_metric(metric, name, dataset, where, runner)

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Compare the classes that a checkpoint was trained on with those of the data.

        Raises:
            UserError: A class has another number.
        """
        loop = self.loops[0]
        if loop == 'train' and not getattr(runner, '_resume', False):
            return
        meta = (checkpoint.get('meta') or {}).get('dataset_meta') or {}
        trained = meta.get('classes') or meta.get('CLASSES')
        classes = _classes(getattr(runner, f'{loop}_dataloader').dataset)
        if not classes or not isinstance(trained, (list, tuple)):
            return
        moved = displacement(trained, classes)
        if moved:
            raise UserError(
                f'the checkpoint was trained on {listed(trained)}, and {loop}_dataloader.dataset '
                f'has {listed(classes)}: {moved}'
            )

    def _check_dataset(self, dataset: Any, where: str) -> None:
        if hasattr(dataset, '__len__') and len(dataset) == 0:
            raise UserError(
                f'{where} is empty: no sample was found, or filter_cfg removed all of them'
            )
        for part in _parts(dataset, skip=SkipFailures):
            _check_files(part, where)
        classes = (getattr(dataset, 'metainfo', None) or {}).get('classes')
        check_names(classes, f'{where}: metainfo.classes')
        if classes is None:
            return
        for part in _parts(dataset):
            folders = list(getattr(part, 'folder_to_idx', None) or ())
            if folders and {name.lower() for name in folders} <= _SPLITS:
                example = next((n for n in folders if n.startswith(where[:3])), folders[0])
                raise UserError(
                    f'{where} would take the folders {listed(folders)} of {part.img_prefix!r} for '
                    "classes: give the one that holds the classes' folders as data_prefix, such as "
                    f'data_prefix={example!r}'
                )
            moved = displacement(classes, folders)
            if moved:
                raise UserError(
                    f'{where} has the classes {listed(classes)} and the folders {listed(folders)}, '
                    f'which number the classes: {moved}'
                )
        for name, count in self._outputs.items():
            if count != len(classes):
                raise UserError(
                    f'{name} is {count}, but {where} has {len(classes)} classes '
                    f'{listed(classes)}; both must agree'
                )

    def _check_boxes(self, dataset: Any, where: str) -> None:
        """Compare the boxes of a detector's training set with its classes."""
        if self._task is not TASKS['mmdet'] or not self._outputs:
            return
        classes = _classes(dataset)
        seen: set[int] = set()
        for sample in _samples(dataset):
            if 'instances' not in sample:
                return
            seen.update(box.get('bbox_label', -1) for box in sample['instances'])
            if not classes or len(seen) >= len(classes):
                break
        if not seen:
            raise UserError(
                f'{where} has no box: its annotations name none of its images, or none of its '
                'classes'
            )
        for part in _parts(dataset):
            if type(part).__name__ == 'XMLDataset':
                check_distinct(classes or (), f'{where}: metainfo.classes has')
        for part in _parts(dataset) if len(seen) < len(classes or ()) else ():
            found = names_in_xml(part)
            for name in set(classes) - found if found else ():
                raise UserError(
                    f'{where}: the class {name!r} of metainfo.classes is in no annotation, whose '
                    f'names are {listed(sorted(found))}{did_you_mean(name, found)}'
                )

    def _check_sample(self, dataset: Any, where: str, metrics: Any) -> None:
        """Compare the first sample of an evaluation with what model and metrics need."""
        if self._task is None or not self._outputs:
            return
        try:
            sample = dataset[0]['data_samples']
        except Exception:  # the loop says what cannot be loaded, or of what kind it is
            return
        sample = sample[0] if isinstance(sample, list) else sample
        check_packed(self._task, sample, f'{where}.pipeline')
        measures = [type_name(type(m)) for m in metrics if 'Dump' not in type_name(type(m))]
        labelled = self._task is TASKS['mmdet'] or any(
            key in sample for key in ('gt_label', 'gt_score', 'gt_sem_seg', 'gt_depth_map')
        )
        if measures and not labelled:
            raise UserError(
                f'{where} has no labels, with which {measures[0]} compares: tools/test.py --out '
                'PATH writes predictions without them'
            )

    def _check_metric(self, metric: Any, name: str, dataset: Any, where: str, runner: Any) -> None:
        _check_counts(metric, name, self._outputs)
        ignored = getattr(metric, 'ignore_index', None)
        label = self._ignored_label(runner)
        if isinstance(ignored, int) and label is not None and ignored != label:
            raise UserError(
                f'{name} has ignore_index={ignored}, but model.decode_head.ignore_index is {label}'
            )
        coco = getattr(metric, '_coco_api', None)
        if coco is None or not hasattr(coco, 'imgs'):
            return
        categories, file = categories_of(coco)
        model = unwrapped(runner.model)
        if 'segm' in getattr(metric, 'metrics', ()) and not any(
            'mask' in part for part, _ in model.named_modules()
        ):
            raise UserError(
                f"{name} has metric='segm', and model ({type(model).__name__}) predicts no masks"
            )
        if 0 in coco.anns:
            runner.logger.warning(
                f'{file} has an annotation of the id 0, which {name} counts as missed whatever the '
                'model finds: number annotations from 1'
            )
        for annotation in coco.dataset.get('annotations', ()):
            lacking = [key for key in ('area', 'iscrowd') if key not in annotation]
            if lacking and 'bbox' in annotation:
                raise UserError(
                    f'{name} needs {" and ".join(lacking)} of each annotation, and annotation '
                    f'{annotation.get("id")} of {file} has none (0 for iscrowd is the usual value)'
                )
        classes = _classes(dataset)
        if classes and categories:
            check_categories(classes, categories, file)
        theirs = {number: image.get('file_name', '') for number, image in coco.imgs.items()}
        ours = {s.get('img_id'): str(s.get('img_path', '')) for s in _samples(dataset)}
        strange = next(
            (n for n, path in ours.items() if not path.endswith(theirs.get(n, '?'))), None
        )
        if strange is not None:
            raise UserError(
                f'{name} and {where} read different annotation files: {file} has image {strange} '
                f'as {theirs.get(strange)!r}, the data set as {ours[strange]!r}'
            )
        if ours and len(ours) < len(theirs):
            runner.logger.warning(
                f'{where} has {len(ours)} of the {len(theirs)} images of {file}, with which {name} '
                'compares: all objects of the others count as missed'
            )

    def before_train(self, runner) -> None:
        """Look at some label maps, and count the samples of the first pass.

        Raises:
            UserError: The label maps hold class 0 and the ignored label alone.
        """
        self._compare_strides(runner)
        _check_averages(runner)
        _check_repeats(runner)
        dataset = runner.train_dataloader.dataset
        ignored = self._ignored_label(runner)
        if self._outputs and ignored is not None and min(self._outputs.values()) > 1:
            _check_maps(dataset, ignored)

    def before_test(self, runner) -> None:
        """Compare strides with the first batch."""
        self._compare_strides(runner)

    def _compare_strides(self, runner: Any) -> None:
        """Compare the maps of the first step with the strides that heads are made for."""
        if self._task is not TASKS['mmdet']:
            return
        model = unwrapped(runner.model)
        preprocessor, sizes = getattr(model, 'data_preprocessor', None), {}
        if preprocessor is None:
            return

        def remember(module: nn.Module, args: tuple, output: Any) -> None:
            inputs = output.get('inputs') if isinstance(output, dict) else None
            if isinstance(inputs, torch.Tensor):
                sizes['image'] = tuple(inputs.shape[-2:])
                first.remove()

        first = preprocessor.register_forward_hook(remember)
        for name, module in model.named_modules():
            strides = getattr(getattr(module, 'prior_generator', None), 'strides', None)
            strides = getattr(module, 'featmap_strides', None) if strides is None else strides
            if strides:
                _compare_once(module, f'model.{name}', strides, sizes)

    def before_train_iter(self, runner, batch_idx: int, data_batch: Any = None) -> None:
        """Check the labels of a batch."""
        self._check_labels(runner, 'train', data_batch)

    def before_val_iter(self, runner, batch_idx: int, data_batch: Any = None) -> None:
        """Check the labels of a batch."""
        self._check_labels(runner, 'val', data_batch)

    def before_test_iter(self, runner, batch_idx: int, data_batch: Any = None) -> None:
        """Check the labels of a batch."""
        self._check_labels(runner, 'test', data_batch)

    def _check_labels(self, runner: Any, loop: str, data_batch: Any) -> None:
        """Refuse labels that are negative or not below the number of classes.

        Raises:
            UserError: There is such a label in the first pass over a data set.
        """
        if self._unseen.get(loop, 0) <= 0:
            return
        samples = data_batch.get('data_samples') if isinstance(data_batch, dict) else None
        if not isinstance(samples, list | tuple):
            return
        self._unseen[loop] -= len(samples) * runner.world_size
        name, count = min(self._outputs.items(), key=lambda item: item[1])
        ignored = self._ignored_label(runner)
        found = [self._task.labels(sample) for sample in samples if hasattr(sample, 'get')]
        found = [
            labels.reshape(-1)
            for labels in found
            if labels is not None and labels.numel() and not labels.is_floating_point()
        ]
        # One look at the batch; which sample it is matters when there is something wrong.
        if not found or not self._bad(torch.cat(found), count, ignored).any():
            return
        for sample in samples:
            labels = self._task.labels(sample) if hasattr(sample, 'get') else None
            if labels is None or not labels.numel() or labels.is_floating_point():
                continue
            bad = self._bad(labels, count, ignored)
            if bad.any():
                where = sample.get('img_path')
                raise UserError(
                    f'label {int(labels[bad][0])} of {where!r} does not fit {name} = {count}; '
                    f'allowed: 0 to {count - 1}'
                    + (f' and {ignored} (ignored)' if ignored is not None else '')
                )

    @staticmethod
    def _bad(labels: torch.Tensor, count: int, ignored: int | None) -> torch.Tensor:
        bad = (labels < 0) | (labels >= count)
        return bad if ignored is None else bad & (labels != ignored)

    def _ignored_label(self, runner) -> int | None:
        head = getattr(unwrapped(runner.model), 'decode_head', None)
        head = head[-1] if isinstance(head, nn.ModuleList) else head
        return getattr(head, 'ignore_index', None)


def _classes(dataset: Any) -> list[str] | None:
    """Names of the classes of a data set, if it has any."""
    classes = (getattr(dataset, 'metainfo', None) or {}).get('classes')
    return None if classes is None or isinstance(classes, str) else list(classes)


def _parts(dataset: Any, skip: type | tuple = ()) -> Iterator[Any]:
    """The data sets inside wrappers other than ``skip``, or the data set itself."""
    inner = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    for part in () if isinstance(dataset, skip) else inner:
        if part is None:
            yield dataset
        else:
            yield from _parts(part, skip)


def _check_files(dataset: Any, where: str, most: int = 2000) -> None:
    """Refuse samples of files that do not exist or are empty; of a long list, look at some."""
    steps = list(getattr(getattr(dataset, 'pipeline', None), 'transforms', ()))
    loader = steps[0] if steps else None
    # Other loaders, and other storage, may use paths in their own ways.
    if type(loader).__name__ not in _FILE_LOADERS or getattr(loader, 'backend_args', None):
        return
    if getattr(loader, 'ignore_empty', False) or getattr(loader, 'on_error', 'raise') != 'raise':
        return
    keys = ['img_path']
    if any('Annotations' in type(step).__name__ for step in steps):
        keys.append('seg_map_path')
    step = max(1, len(dataset) // most)
    looked = [dataset.get_data_info(i) for i in range(0, len(dataset), step)]
    paths = [info.get(key) for info in looked for key in keys]
    paths = [path for path in paths if isinstance(path, str) and is_local(path)]
    for state, wrong in (
        ('does not exist', [path for path in paths if not os.path.exists(path)]),
        ('is empty', [p for p in paths if os.path.isfile(p) and not os.path.getsize(p)]),
    ):
        if wrong:
            raise UserError(
                f'{where}: {wrong[0]!r} {state}{from_where(wrong[0])}'
                + (f', like {len(wrong) - 1} other files' if wrong[1:] else '')
                + (f' of {len(paths)} that were looked at' if step > 1 else '')
                + ('; in mmvim.SkipFailures it is left out' if where.startswith('train') else '')
            )


def _samples(dataset: Any) -> Iterator[dict]:
    for part in _parts(dataset):
        if hasattr(part, 'get_data_info'):
            for i in range(len(part)):
                yield part.get_data_info(i)


def _check_maps(dataset: Any, ignored: int, count: int = 16) -> None:
    """Refuse masks of 0 and 255, in which training would see the background alone."""
    values: set[int] = set()
    for part in _parts(dataset):
        steps = getattr(getattr(part, 'pipeline', None), 'transforms', ())
        loader = next((step for step in steps if type(step).__name__ == 'LoadAnnotations'), None)
        if loader is None:
            return
        for i in range(0, len(part), max(1, len(part) // count)):
            try:
                labels = loader(part.get_data_info(i))['gt_seg_map']
            except Exception:  # training says which file cannot be read
                return
            values.update(np.unique(labels).tolist())
    if ignored in values and values <= {0, ignored}:
        raise UserError(
            f'the label maps of train_dataloader.dataset hold {sorted(values)} only (of some that '
            f'were looked at), and {ignored} is ignored: training would see no class but 0. Label '
            'maps hold the numbers of the classes, 0 and 1 for two (reduce_zero_label=True takes '
            'away the 0)'
        )


def _check_model(model: nn.Module, outputs: dict[str, int], ignored: int | None) -> None:
    """Compare a data preprocessor and a classifier's own accuracy with the heads."""
    preprocessor = getattr(model, 'data_preprocessor', None)
    _check_counts(preprocessor, 'model.data_preprocessor', outputs)
    # Several labels an image are vectors already.
    several = any('MultiLabel' in kind.__name__ for kind in type(getattr(model, 'head', 0)).__mro__)
    mixes = getattr(preprocessor, 'batch_augments', None) is not None and not several
    for key, count in outputs.items() if mixes and preprocessor.num_classes is None else ():
        raise UserError(
            f'model.data_preprocessor has no num_classes, which Mixup and CutMix need: {count}, '
            f'as {key}'
        )
    for key, count in outputs.items():
        if ignored is not None and 0 < ignored < count:
            raise UserError(
                f'{key} is {count}, so that model.decode_head.ignore_index, {ignored}, is the '
                'label of a class, which would be ignored; -100 is none'
            )
    padding = getattr(preprocessor, 'seg_pad_val', None)
    if outputs and ignored is not None and padding is not None and padding != ignored:
        raise UserError(
            f'model.data_preprocessor.seg_pad_val is {padding}, but model.decode_head.ignore_index '
            f'is {ignored}: padding would be trained as a class'
        )
    head = getattr(model, 'head', None)
    if getattr(head, 'cal_acc', False):
        _check_counts(head, 'model.head', outputs)


def _check_binary(model: nn.Module) -> None:
    """Refuse one output for two classes with a loss of several outputs."""
    for name, head in model.named_modules():
        losses = getattr(head, 'loss_decode', None)
        if getattr(head, 'out_channels', None) != 1 or not isinstance(losses, nn.Module):
            continue
        for loss in losses if isinstance(losses, nn.ModuleList) else [losses]:
            if getattr(loss, 'use_sigmoid', True) is False:
                raise UserError(
                    f'model.{name} has out_channels=1, for which its loss_decode '
                    f'({type(loss).__name__}) needs use_sigmoid=True'
                )


def _check_losses(model: nn.Module, outputs: dict[str, int]) -> None:
    """Compare numbers of classes and their weights in the losses of classifiers and segmentors."""
    for path, head in (
        ('model.head', getattr(model, 'head', None)),
        ('model.decode_head', getattr(model, 'decode_head', None)),
    ):
        counts = {key: count for key, count in outputs.items() if key.startswith(f'{path}.')}
        for name, loss in head.named_modules() if isinstance(head, nn.Module) and counts else ():
            if not type(loss).__name__.endswith('Loss'):
                continue
            name = name.replace('loss_module', 'loss')  # mmpretrain's key
            _check_counts(loss, f'{path}.{name}', counts)
            weights = getattr(loss, 'class_weight', None)
            weights = len(weights) if hasattr(weights, '__len__') else None
            for key, count in counts.items():
                if weights not in (None, count):
                    raise UserError(
                        f'{path}.{name}.class_weight has {weights} numbers, but {key} is {count}'
                    )


def _check_counts(component: Any, name: str, outputs: dict[str, int]) -> None:
    """Compare the numbers of classes and the ranks of a component with the heads."""
    count, ranks = getattr(component, 'num_classes', None), getattr(component, 'topk', None)
    for key, classes in outputs.items():
        if isinstance(count, int) and count > 0 and count != classes:
            raise UserError(f'{name}.num_classes is {count}, but {key} is {classes}')
        if isinstance(ranks, (list, tuple)) and ranks and max(ranks) > classes:
            raise UserError(
                f'{name} has topk={tuple(ranks)}, but {key} is {classes}: no rank can be above the '
                'number of classes'
            )


def _compare_once(module: nn.Module, name: str, strides: Any, sizes: dict) -> None:
    def compare(module: nn.Module, args: tuple) -> None:
        handle.remove()
        image, maps = sizes.get('image'), args[0] if args else None
        if image is None or not isinstance(maps, (list, tuple)):
            return
        if not all(isinstance(level, torch.Tensor) and level.dim() == 4 for level in maps):
            return
        found = [image[0] / level.shape[-2] for level in maps]
        wanted = [stride[-1] if isinstance(stride, (list, tuple)) else stride for stride in strides]
        # Maps of fewer pixels than the stride have one.
        fits = [
            abs(level.shape[-2] - image[0] / stride) <= 1 or 2 / 3 < at / stride < 1.5
            for level, at, stride in zip(maps, found, wanted, strict=False)
        ]
        if len(found) != len(wanted) or not all(fits):
            given = ', '.join(f'{stride:.3g}' for stride in found)
            raise UserError(
                f'{name} ({type(module).__name__}) is made for maps of the strides '
                f'{", ".join(map(str, wanted))}, and gets maps of the strides {given}: change the '
                'neck (mmvim.SimpleFPN(start_level=1, num_outs=5) gives 8 to 128, start_level=0 '
                '4 to 64), or the strides of the head'
            )

    handle = module.register_forward_pre_hook(compare)


def _check_averages(runner: Any) -> None:
    """Refuse to evaluate two sets of weights with results that cannot be recorded twice."""
    metrics = getattr(getattr(runner.val_loop, 'evaluator', None), 'metrics', ())
    twice = any(getattr(hook, 'evaluate_on_origin', False) for hook in runner.hooks)
    for metric in metrics if twice else ():
        if getattr(metric, 'average', 'macro') is None:
            raise UserError(
                'EMAHook with evaluate_on_origin=True cannot record the results of each class '
                f'that {type(metric).__name__}(average=None) gives: leave one out'
            )


def _check_repeats(runner: Any) -> None:
    """Say that repeated augmentation needs several processes."""
    sampler = getattr(runner.train_dataloader, 'sampler', None)
    repeats, processes = getattr(sampler, 'num_repeats', 1), runner.world_size
    if type(sampler).__name__ == 'RepeatAugSampler' and processes < repeats:
        runner.logger.warning(
            f'train_dataloader.sampler (RepeatAugSampler) repeats each image {repeats} times, for '
            f'as many processes, and there {"is" if processes == 1 else "are"} {processes}: an '
            f'epoch has a random {100 // repeats} % of the images, each up to {repeats} times in '
            "one batch. sampler=dict(type='DefaultSampler', shuffle=True) takes each once"
        )
