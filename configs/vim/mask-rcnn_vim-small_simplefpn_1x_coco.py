_base_ = './mask-rcnn_vim-tiny_simplefpn_1x_coco.py'

model = dict(
    backbone=dict(
        arch='small',
        init_cfg=dict(
            checkpoint='https://huggingface.co/hustvl/Vim-small-midclstok/resolve/main/'
            'vim_s_midclstok_80p5acc.pth',
        ),
    ),
    neck=dict(in_channels=384),
)
