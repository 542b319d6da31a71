_base_ = [
    '../_base_/models/mambavision_classifier.py',
    '../_base_/datasets/imagenet_mambavision_256.py',
    '../_base_/schedules/imagenet_bs1024_adamw_30e.py',
    '../_base_/default_runtime_mmpretrain.py',
]

model = dict(
    backbone=dict(arch='large3'),
    head=dict(in_channels=2048),
    # The released weights, fine-tuned already: the authors published none of ImageNet-21K alone.
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://huggingface.co/nvidia/MambaVision-L3-256-21K/resolve/main/'
        'mambavision_L3_21k_740m_256.pth.tar',
    ),
)
train_dataloader = dict(batch_size=32)
