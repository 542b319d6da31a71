_base_ = './mask-rcnn_vmamba-tiny_fpn_1x_coco.py'

model = dict(
    backbone=dict(
        arch='vanilla-small',
        drop_path_rate=0.1,
        init_cfg=dict(
            checkpoint='https://github.com/MzeroMiko/VMamba/releases/download/%23'
            'v0cls/vssmsmall_dp03_ckpt_epoch_238.pth',
        ),
    ),
)
