_base_ = [
    '../_base_/models/mask-rcnn_vmamba_fpn.py',
    '../_base_/datasets/coco_instance_ms_crop.py',
    '../_base_/schedules/coco_3x_adamw.py',
    '../_base_/default_runtime_mmdet.py',
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
