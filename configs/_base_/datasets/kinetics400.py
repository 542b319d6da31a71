# Kinetics-400 in clips of 8 frames of 224x224, spread over the whole video, with VideoMamba's
# augmentations; each decoded clip is augmented twice. Tested on four clips and three crops.
#
# From the official lists and videos in class folders; where only plain lists ("path label") are
# there, name them in `ann_file`.
dataset_type = 'mmvim.VideoDataset'
data_root = 'data/kinetics400'
num_classes = 400
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
    dict(type='mmvim.VideoTransform', name='RandomHorizontalFlip'),
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
    dict(type='mmvim.LoadVideo', num_frames=num_frames, num_clips=4),
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
        ann_file='annotations/kinetics_train.csv',
        data_prefix='videos_train',
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
        ann_file='annotations/kinetics_val.csv',
        data_prefix='videos_val',
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
        ann_file='annotations/kinetics_val.csv',
        data_prefix='videos_val',
        num_classes=num_classes,
        pipeline=test_pipeline,
        test_mode=True,
    ),
)
val_evaluator = dict(type='Accuracy', topk=(1, 5))
test_evaluator = val_evaluator
