_base_ = [
    '../_base_/models/videomamba_video.py',
    '../_base_/datasets/kinetics400.py',
    '../_base_/schedules/video_bs512_adamw_70e.py',
    '../_base_/default_runtime_mmpretrain.py',
]

model = dict(
    backbone=dict(
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://huggingface.co/OpenGVLab/VideoMamba/resolve/main/'
            'videomamba_t16_in1k_res224.pth',
        ),
    ),
)

# A small model gets weaker augmentations.
train_pipeline = _base_.train_pipeline
train_pipeline[1]['transforms'][0].update(num_ops=2, magnitude=5)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
