# Something-Something V2 in clips of 8 frames of 224x224, spread over the whole video, with
# VideoMamba's augmentations; each decoded clip is augmented twice. Nothing is mirrored: classes
# tell left from right. Tested on two clips and three crops.
dataset_type = 'mmvim.VideoDataset'
data_root = 'data/sthv2'
label_file = 'annotations/something-something-v2-labels.json'
num_classes = 174
num_frames = 8
mean = (123.675, 116.28, 103.53)
std = (58.395, 57.12, 57.375)

augmentations = [
    dict(
        type='mmvim.VideoTransform',
        name='RandAugment',
        num_ops=4,
        magnitude=7,
        num_magnitude_bins=11,
        interpolation='bilinear',
        fill=[round(value) for value in mean],
    ),
    dict(
        type='mmvim.VideoTransform',
        name='RandomResizedCrop',
        size=224,
        scale=(0.08, 1.0),
        interpolation='bicubic',
    ),
    dict(type='mmvim.RandomErasingVideo', prob=0.25, mean=mean, std=std),
]
train_pipeline = [
    dict(type='mmvim.LoadVideo', num_frames=num_frames),
    dict(type='mmvim.RepeatAugment', times=2, transforms=augmentations),
    dict(type='mmvim.PackVideo'),
]
val_pipeline = [
    dict(type='mmvim.LoadVideo', num_frames=num_frames, num_clips=1),
    dict(type='mmvim.VideoTransform', name='Resize', size=224, interpolation='bilinear'),
    dict(type='mmvim.VideoTransform', name='CenterCrop', size=224),
    dict(type='mmvim.PackVideo'),
]
test_pipeline = [
    dict(type='mmvim.LoadVideo', num_frames=num_frames, num_clips=2),
    dict(type='mmvim.VideoTransform', name='Resize', size=224, interpolation='bilinear'),
    dict(type='mmvim.ThreeCrop', size=224),
    dict(type='mmvim.PackVideo'),
]

train_dataloader = dict(
    batch_size=64,
    num_workers=12,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        ann_file='annotations/something-something-v2-train.json',
        data_prefix='videos',
        label_file=label_file,
        num_classes=num_classes,
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=64,
    num_workers=12,
    persistent_workers=True,
    pin_memory=True,
    drop_last=False,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        ann_file='annotations/something-something-v2-validation.json',
        data_prefix='videos',
        label_file=label_file,
        num_classes=num_classes,
        pipeline=val_pipeline,
        test_mode=True,
    ),
)
test_dataloader = dict(
    batch_size=8,
    num_workers=12,
    persistent_workers=True,
    pin_memory=True,
    drop_last=False,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        ann_file='annotations/something-something-v2-validation.json',
        data_prefix='videos',
        label_file=label_file,
        num_classes=num_classes,
        pipeline=test_pipeline,
        test_mode=True,
    ),
)
val_evaluator = dict(type='Accuracy', topk=(1, 5))
test_evaluator = val_evaluator
