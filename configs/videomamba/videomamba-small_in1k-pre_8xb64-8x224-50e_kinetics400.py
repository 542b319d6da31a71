_base_ = [
    '../_base_/models/videomamba_video.py',
    '../_base_/datasets/kinetics400.py',
    '../_base_/schedules/video_bs512_adamw_70e.py',
    '../_base_/default_runtime_mmpretrain.py',
]

model = dict(
    backbone=dict(
        arch='small',
        drop_path_rate=0.35,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://huggingface.co/OpenGVLab/VideoMamba/resolve/main/'
            'videomamba_s16_in1k_res224.pth',
        ),
    ),
    head=dict(in_channels=384),
)

optim_wrapper = dict(
    optimizer=dict(weight_decay=0.05),
)
param_scheduler = _base_.param_scheduler
param_scheduler[1]['end'] = 50
train_cfg = dict(max_epochs=50)
