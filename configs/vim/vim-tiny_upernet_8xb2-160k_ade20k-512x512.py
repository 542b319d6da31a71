_base_ = [
    '../_base_/models/upernet_vim.py',
    '../_base_/datasets/ade20k_512x512.py',
    '../_base_/schedules/ade20k_160k_adamw.py',
    '../_base_/default_runtime_mmseg.py',
]

model = dict(
    backbone=dict(
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://huggingface.co/hustvl/Vim-tiny-midclstok/resolve/main/'
            'vim_t_midclstok_76p1acc.pth',
        )
    )
)
