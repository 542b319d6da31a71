_base_ = './mambavision-tiny_32xb128_in1k.py'

model = dict(
    backbone=dict(arch='base'),
    head=dict(in_channels=1024),
    mesa_weight=1.0 * 50,
)

optim_wrapper = dict(optimizer=dict(weight_decay=0.075))
param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=2e-4,
        by_epoch=True,
        begin=0,
        end=35,
        convert_to_iter_based=True,
    ),
    dict(
        type='CosineAnnealingLR',
        eta_min=5e-6,
        by_epoch=True,
        begin=0,
        end=310,
        convert_to_iter_based=True,
    ),
    dict(type='ConstantLR', factor=1.0, by_epoch=True, begin=310, end=320),
]
custom_hooks = [*_base_.custom_hooks[:2], dict(type='mmvim.MesaHook', start=0.3 * 310 / 320)]
