# ImageNet-1K as MambaVision sees it: crops resized with a random filter, no repeated augmentation,
# evaluation at 224 without a margin; everything else as in imagenet_deit_224.py.
_base_ = ['./imagenet_deit_224.py']

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='RandomChoice',
        transforms=[
            [dict(type='mmvim.RandomResizedCrop', scale=224, interpolation=name)]
            for name in ('bilinear', 'bicubic')
        ],
    ),
    *_base_.train_pipeline[2:],
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=224, edge='short', backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=224),
    dict(type='PackInputs'),
]

train_dataloader = dict(
    sampler=dict(_delete_=True, type='DefaultSampler', shuffle=True),
    dataset=dict(pipeline=train_pipeline),
)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
