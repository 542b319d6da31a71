# VMamba with a linear head on the mean of its last map, label smoothing, Mixup and CutMix.
model = dict(
    type='ImageClassifier',
    backbone=dict(type='mmvim.VMamba', arch='tiny'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=768,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02),
    ),
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]),
)
