_base_ = './vim-tiny-stride8_in1k-pre_8xb128-30e_in1k.py'

model = dict(
    backbone=dict(arch='small'),
    head=dict(in_channels=384),
    init_cfg=dict(
        checkpoint='https://huggingface.co/hustvl/Vim-small-midclstok/resolve/main/'
        'vim_s_midclstok_80p5acc.pth',
    ),
)
