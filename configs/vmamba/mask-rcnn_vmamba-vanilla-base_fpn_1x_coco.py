_base_ = './mask-rcnn_vmamba-tiny_fpn_1x_coco.py'

model = dict(
    backbone=dict(
        arch='vanilla-base',
        drop_path_rate=0.1,
        init_cfg=dict(
            checkpoint='https://github.com/MzeroMiko/VMamba/releases/download/%23'
            'v0cls/vssmbase_dp06_ckpt_epoch_241.pth',
        ),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
