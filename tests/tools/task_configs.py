"""Tiny data and configs for the three task libraries, laid out as their data sets are."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

BACKBONE = """
backbone = dict(
    type='mmvim.Vim', arch=dict(embed_dims=8, depth=1, d_state=2), img_size=32, patch_size=16,
    {more})
loop = dict(num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False))
optim_wrapper = dict(optimizer=dict(type='SGD', lr=1e-3))
train_cfg = dict(type='IterBasedTrainLoop', max_iters=1, val_interval=1)
val_cfg = dict()
test_cfg = dict()
default_hooks = dict(
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1),
    visualization=dict(type={hook!r}))
visualizer = dict(type={visualizer!r}, vis_backends=[dict(type='LocalVisBackend')])
"""

CLASSIFICATION = """
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier', backbone=backbone,
    head=dict(type='LinearClsHead', num_classes=2, in_channels=8, topk=(1, )),
    data_preprocessor=dict(mean=[127.0] * 3, std=[127.0] * 3))
dataset = dict(
    type='CustomDataset', data_root={root!r}, ann_file='train.txt', data_prefix='images',
    metainfo=dict(classes=('a', 'b')),
    pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')])
train_dataloader = dict(batch_size=4, dataset=dataset, **loop)
val_dataloader = train_dataloader
test_dataloader = train_dataloader
val_evaluator = dict(type='Accuracy', topk=(1, ))
test_evaluator = val_evaluator
"""

DETECTION = """
default_scope = 'mmdet'
model = dict(
    type='SingleStageDetector', backbone=backbone,
    data_preprocessor=dict(type='DetDataPreprocessor', pad_size_divisor=32),
    bbox_head=dict(
        type='RetinaHead', num_classes=2, in_channels=8, stacked_convs=1, feat_channels=8,
        anchor_generator=dict(
            type='AnchorGenerator', scales=[1.0], ratios=[1.0], strides=[16]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
        loss_cls=dict(type='FocalLoss', use_sigmoid=True),
        loss_bbox=dict(type='L1Loss')),
    train_cfg=dict(
        assigner=dict(
            type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0.0,
            ignore_iof_thr=-1),
        sampler=dict(type='PseudoSampler'), allowed_border=-1, pos_weight=-1),
    test_cfg=dict(
        nms_pre=100, min_bbox_size=0, score_thr=0.0, max_per_img=10,
        nms=dict(type='nms', iou_threshold=0.5)))
pack = dict(
    type='PackDetInputs',
    meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))
pipeline = [
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=(32, 32), keep_ratio=True), pack]
dataset = dict(
    type='CocoDataset', data_root={root!r}, ann_file='train.json', data_prefix=dict(img='images'),
    metainfo=dict(classes=('a', 'b')), pipeline=pipeline)
train_dataloader = dict(batch_size=4, dataset=dict(type='RepeatDataset', times=2, dataset=dataset),
                        **loop)
val_dataloader = dict(batch_size=1, dataset=dict(dataset, test_mode=True), **loop)
test_dataloader = val_dataloader
val_evaluator = dict(type='CocoMetric', ann_file={root!r} + '/train.json', metric='bbox')
test_evaluator = val_evaluator
"""

SEGMENTATION = """
default_scope = 'mmseg'
model = dict(
    type='EncoderDecoder', backbone=backbone,
    data_preprocessor=dict(type='SegDataPreProcessor', size=(32, 32), seg_pad_val=255),
    decode_head=dict(
        type='FCNHead', in_channels=8, channels=4, num_convs=1, num_classes=2,
        norm_cfg=dict(type='SyncBN'), loss_decode=dict(type='CrossEntropyLoss')),
    train_cfg=dict(), test_cfg=dict(mode='whole'))
dataset = dict(
    type='BaseSegDataset', data_root={root!r}, img_suffix='.png', reduce_zero_label=False,
    data_prefix=dict(img_path='images', seg_map_path='maps'), metainfo=dict(
        classes=('a', 'b'), palette=[[0, 0, 0], [255, 0, 0]]),
    pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'),
              dict(type='PackSegInputs')])
train_dataloader = dict(batch_size=4, dataset=dataset, **loop)
val_dataloader = dict(batch_size=1, dataset=dataset, **loop)
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
"""

FEATMAP = "out_type='featmap', out_indices=(0, )"
TASKS = {
    'mmpretrain': (CLASSIFICATION, '', 'VisualizationHook', 'UniversalVisualizer'),
    'mmdet': (DETECTION, FEATMAP, 'DetVisualizationHook', 'DetLocalVisualizer'),
    'mmseg': (SEGMENTATION, FEATMAP, 'SegVisualizationHook', 'SegLocalVisualizer'),
}


def write(directory: Path, scope: str) -> Path:
    """Write four images with annotations and the config of a task; return the data's root."""
    root = directory / 'data'
    rng = np.random.default_rng(0)
    coco = {'images': [], 'annotations': [], 'categories': [{'id': 1, 'name': 'a'}]}
    coco['categories'].append({'id': 2, 'name': 'b'})
    listing = []
    for folder in ('images', 'maps'):
        (root / folder).mkdir(parents=True)
    for i in range(4):
        pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / 'images' / f'{i}.png')
        label_map = np.zeros((32, 32), np.uint8)
        label_map[8:24, 8:24] = i % 2
        Image.fromarray(label_map).save(root / 'maps' / f'{i}.png')
        listing.append(f'{i}.png {i % 2}')
        coco['images'].append({'id': i, 'file_name': f'{i}.png', 'width': 32, 'height': 32})
        coco['annotations'].append(
            {
                'id': i + 1,
                'image_id': i,
                'category_id': i % 2 + 1,
                'bbox': [8, 8, 16, 16],
                'area': 256,
                'iscrowd': 0,
                'segmentation': [[8, 8, 24, 8, 24, 24, 8, 24]],
            }
        )
    (root / 'train.json').write_text(json.dumps(coco))
    (root / 'train.txt').write_text('\n'.join(listing))
    template, more, hook, visualizer = TASKS[scope]
    text = BACKBONE.format(more=more, hook=hook, visualizer=visualizer)
    (directory / 'config.py').write_text(text + template.format(root=str(root)))
    return root
