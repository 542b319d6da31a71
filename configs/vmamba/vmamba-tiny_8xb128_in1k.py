_base_ = [
    '../_base_/models/vmamba_classifier.py',
    '../_base_/datasets/imagenet_swin_224.py',
    '../_base_/schedules/imagenet_bs1024_adamw_swin_300e.py',
    '../_base_/default_runtime_mmpretrain.py',
]
