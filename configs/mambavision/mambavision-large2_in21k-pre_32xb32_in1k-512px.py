_base_ = [
    '../_base_/models/mambavision_classifier.py',
    '../_base_/datasets/imagenet_mambavision_512.py',
    '../_base_/schedules/imagenet_bs1024_adamw_30e.py',
    '../_base_/default_runtime_mmpretrain.py',
]

model = dict(
    backbone=dict(arch='large2', window_sizes=(32, 16)),
    head=dict(in_channels=1568),
    # The released weights, fine-tuned already: the authors published none of ImageNet-21K alone.
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://huggingface.co/nvidia/MambaVision-L2-512-21K/resolve/main/'
        'mambavision_L2_21k_240m_512.pth.tar',
    ),
)
train_dataloader = dict(batch_size=32)
