_base_ = [
    '../_base_/models/mambavision_classifier.py',
    '../_base_/datasets/imagenet_mambavision_224.py',
    '../_base_/schedules/imagenet_bs1024_adamw_30e.py',
    '../_base_/default_runtime_mmpretrain.py',
]

model = dict(
    backbone=dict(arch='base'),
    head=dict(in_channels=1024),
    # The released weights, fine-tuned already: the authors published none of ImageNet-21K alone.
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://huggingface.co/nvidia/MambaVision-B-21K/resolve/main/'
        'mambavision_base_21k.pth.tar',
    ),
)
