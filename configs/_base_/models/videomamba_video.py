# VideoMamba for clips of 8 frames, a linear head on its class token, label smoothing, Mixup and
# CutMix. Predictions are averaged over the views of a video.
model = dict(
    type='mmvim.VideoClassifier',
    data_preprocessor=dict(
        type='mmvim.VideoDataPreprocessor',
        num_classes=400,
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
    ),
    backbone=dict(
        type='mmvim.VideoMamba', arch='tiny', img_size=224, num_frames=8, drop_path_rate=0.1
    ),
    head=dict(
        type='LinearClsHead',
        num_classes=400,
        in_channels=192,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02),
    ),
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]),
)
