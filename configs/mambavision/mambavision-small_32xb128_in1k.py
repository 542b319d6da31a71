_base_ = './mambavision-tiny_32xb128_in1k.py'

model = dict(
    backbone=dict(arch='small'),
    head=dict(in_channels=768),
    mesa_weight=1.0 * 50,
)

# The released weights are evaluated with a margin of 7 %.
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=240, edge='short', backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=224),
    dict(type='PackInputs'),
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
