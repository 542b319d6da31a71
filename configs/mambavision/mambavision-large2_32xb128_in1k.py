_base_ = './mambavision-tiny_32xb128_in1k.py'

model = dict(
    backbone=dict(arch='large2'),
    head=dict(in_channels=1568),
    mesa_weight=6.0 * 50,
)

optim_wrapper = dict(optimizer=dict(weight_decay=0.12))
