_base_ = [
    '../_base_/models/videomamba_video.py',
    '../_base_/datasets/sthv2.py',
    '../_base_/schedules/video_bs512_adamw_70e.py',
    '../_base_/default_runtime_mmpretrain.py',
]

model = dict(
    data_preprocessor=dict(num_classes=174),
    backbone=dict(
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://huggingface.co/OpenGVLab/VideoMamba/resolve/main/'
            'videomamba_t16_in1k_res224.pth',
        ),
    ),
    head=dict(num_classes=174),
)

# A small model gets weaker augmentations.
train_pipeline = _base_.train_pipeline
train_pipeline[1]['transforms'][0].update(num_ops=2, magnitude=5)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))

optim_wrapper = dict(optimizer=dict(lr=1.6e-3))
param_scheduler = _base_.param_scheduler
param_scheduler[0]['start_factor'] = 2.5e-3
param_scheduler[1].update(eta_min_ratio=2.5e-3, end=35)
train_cfg = dict(max_epochs=35)
