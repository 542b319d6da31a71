# A small MambaVision on the digits of vim_digits_cls.py, with what its ImageNet recipe is made of:
# averaged weights, self-distillation from them (MESA; model.mesa_weight=0 turns it off) and a
# cooldown at the lowest learning rate.
_base_ = ['./vim_digits_cls.py']

model = dict(
    type='mmvim.MesaClassifier',
    mesa_weight=1.0,
    backbone=dict(
        _delete_=True,
        type='mmvim.MambaVision',
        arch=dict(depths=(1, 1, 2, 2), embed_dims=24, stem_dims=16, num_heads=(4, 8)),
        # Images of 64 pixels are 4x4 and 2x2 tokens in the last two stages.
        window_sizes=(4, 2),
    ),
    head=dict(in_channels=192),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='NumpyToPIL', to_rgb=True),
    dict(
        type='torchvision/RandomAffine',
        degrees=12,
        translate=(0.08, 0.08),
        scale=(0.85, 1.15),
        shear=8,
        interpolation='bilinear',
    ),
    dict(type='PILToNumpy', to_bgr=True),
    dict(type='Resize', scale=64),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=64),
    dict(type='PackInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))

max_epochs = 14
warmup_epochs = 2
cooldown_epochs = 1
train_cfg = dict(max_epochs=max_epochs)

optim_wrapper = dict(optimizer=dict(lr=3e-3))
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
        end=max_epochs - cooldown_epochs,
        convert_to_iter_based=True,
    ),
    dict(
        type='ConstantLR',
        factor=1.0,
        by_epoch=True,
        begin=max_epochs - cooldown_epochs,
        end=max_epochs,
    ),
]
custom_hooks = [
    dict(type='EMAHook', momentum=0.02, update_buffers=True, priority='ABOVE_NORMAL'),
    dict(type='mmvim.MesaHook', start=0.25),
]

default_hooks = dict(checkpoint=dict(interval=max_epochs))
