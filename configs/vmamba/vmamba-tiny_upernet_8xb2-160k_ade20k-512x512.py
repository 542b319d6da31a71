_base_ = [
    '../_base_/models/upernet_vmamba.py',
    '../_base_/datasets/ade20k_512x512.py',
    '../_base_/schedules/ade20k_160k_adamw.py',
    '../_base_/default_runtime_mmseg.py',
]

model = dict(
    backbone=dict(
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://github.com/MzeroMiko/VMamba/releases/download/%23'
            'v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth',
        ),
    )
)

optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={'dt_projs_bias': dict(decay_mult=0.0)}),
)
