_base_ = [
    '../_base_/models/upernet_vim.py',
    '../_base_/datasets/ade20k_512x512.py',
    '../_base_/schedules/ade20k_160k_adamw.py',
    '../_base_/default_runtime_mmseg.py',
]

model = dict(
    backbone=dict(
        type='mmvim.VideoMamba',
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://huggingface.co/OpenGVLab/VideoMamba/resolve/main/'
            'videomamba_t16_in1k_res224.pth',
        ),
    )
)
