# VideoMamba-M that also learns the features of a trained VideoMamba-S (self-distillation).
_base_ = [
    '../_base_/models/videomamba_classifier.py',
    '../_base_/datasets/imagenet_deit_224.py',
    '../_base_/schedules/imagenet_bs1024_adamw_300e.py',
    '../_base_/default_runtime_mmpretrain.py',
]

model = dict(
    type='mmvim.SelfDistillClassifier',
    backbone=dict(arch='middle', drop_path_rate=0.5, out_type='raw'),
    head=dict(in_channels=576),
    teacher=dict(
        type='mmvim.VideoMamba',
        arch='small',
        img_size=224,
        out_type='raw',
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://huggingface.co/OpenGVLab/VideoMamba/resolve/main/'
            'videomamba_s16_in1k_res224.pth',
        ),
    ),
)

optim_wrapper = dict(optimizer=dict(lr=2e-3, weight_decay=0.05), clip_grad=dict(max_norm=5.0))
param_scheduler = _base_.param_scheduler
param_scheduler[0].update(start_factor=2.5e-4, end=20)
param_scheduler[1].update(eta_min=5e-6, begin=20)
custom_hooks = []
auto_scale_lr = dict(base_batch_size=2048)
