_base_ = './mambavision-tiny_32xb128_in1k.py'

model = dict(backbone=dict(arch='tiny2'), mesa_weight=0.75 * 50)

# The released weights are evaluated with a margin of 2 %.
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=228, edge='short', backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=224),
    dict(type='PackInputs'),
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
