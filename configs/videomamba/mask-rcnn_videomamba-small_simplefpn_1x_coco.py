_base_ = './mask-rcnn_videomamba-tiny_simplefpn_1x_coco.py'

model = dict(
    backbone=dict(
        arch='small',
        init_cfg=dict(
            checkpoint='https://huggingface.co/OpenGVLab/VideoMamba/resolve/main/'
            'videomamba_s16_in1k_res224.pth',
        ),
    ),
    neck=dict(in_channels=384),
)
