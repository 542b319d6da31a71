# A small VideoMamba on moving handwritten digits (tools/quickstart/make_data.py video): which digit
# it is and which way it moves, 40 classes. No frame shows which of two opposite ways it is.
_base_ = ['../_base_/default_runtime_mmpretrain.py']

data_root = 'data/quickstart/video'
num_frames = 8

model = dict(
    type='mmvim.VideoClassifier',
    data_preprocessor=dict(
        type='mmvim.VideoDataPreprocessor', num_classes=40, mean=[127.5] * 3, std=[127.5] * 3
    ),
    backbone=dict(
        type='mmvim.VideoMamba',
        arch=dict(embed_dims=96, depth=4, d_state=8),
        img_size=32,
        patch_size=8,
        num_frames=num_frames,
        tubelet_size=2,
        pool='cls+avg',
    ),
    head=dict(
        type='LinearClsHead',
        num_classes=40,
        in_channels=96,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
    ),
)

# Never mirrored nor turned by much: digits and directions would become others.
train_pipeline = [
    dict(type='mmvim.LoadVideo', num_frames=num_frames),
    dict(
        type='mmvim.VideoTransform',
        name='RandomAffine',
        degrees=10,
        scale=(0.9, 1.1),
        shear=6,
        interpolation='bilinear',
    ),
    dict(type='mmvim.PackVideo'),
]
test_pipeline = [
    dict(type='mmvim.LoadVideo', num_frames=num_frames, num_clips=1),
    dict(type='mmvim.PackVideo'),
]

dataset = dict(
    type='mmvim.VideoDataset', data_root=data_root, label_file='classes.txt', num_classes=40
)
train_dataloader = dict(
    batch_size=32,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(ann_file='train.txt', data_prefix='train', pipeline=train_pipeline, **dataset),
)
val_dataloader = dict(
    batch_size=90,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        ann_file='val.txt', data_prefix='val', pipeline=test_pipeline, test_mode=True, **dataset
    ),
)
test_dataloader = dict(
    batch_size=90,
    num_workers=1,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        ann_file='test.txt', data_prefix='test', pipeline=test_pipeline, test_mode=True, **dataset
    ),
)
val_evaluator = dict(type='Accuracy', topk=(1, 5))
test_evaluator = val_evaluator

max_epochs = 11
warmup_epochs = 1
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=1)
val_cfg = dict()
test_cfg = dict()

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=3e-3, weight_decay=0.05, betas=(0.9, 0.99)),
    clip_grad=dict(max_norm=1.0),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        flat_decay_mult=0.0,
        custom_keys={
            'A_log': dict(decay_mult=0.0),
            'A_b_log': dict(decay_mult=0.0),
            'cls_token': dict(decay_mult=0.0),
            'pos_embed': dict(decay_mult=0.0),
            'temporal_pos_embedding': dict(decay_mult=0.0),
        },
    ),
)
param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=0.01,
        by_epoch=True,
        begin=0,
        end=warmup_epochs,
        convert_to_iter_based=True,
    ),
    dict(
        type='CosineAnnealingLR',
        eta_min=1e-5,
        by_epoch=True,
        begin=warmup_epochs,
        end=max_epochs,
        convert_to_iter_based=True,
    ),
]

default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(interval=max_epochs, max_keep_ckpts=1, save_last=True),
)
log_processor = dict(window_size=20)
randomness = dict(seed=0)
