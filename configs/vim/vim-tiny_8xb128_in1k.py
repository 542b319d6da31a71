_base_ = [
    '../_base_/models/vim_classifier.py',
    '../_base_/datasets/imagenet_deit_224.py',
    '../_base_/schedules/imagenet_bs1024_adamw_300e.py',
    '../_base_/default_runtime_mmpretrain.py',
]
