# Trained without mixed precision: it is unstable, say the authors.
_base_ = [
    '../_base_/models/upernet_mambavision.py',
    '../_base_/datasets/ade20k_640x640.py',
    '../_base_/schedules/ade20k_160k_adamw.py',
    '../_base_/default_runtime_mmseg.py',
]

model = dict(
    data_preprocessor=dict(size=(640, 640)),
    backbone=dict(
        arch='large3',
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://huggingface.co/nvidia/MambaVision-L3-512-21K/resolve/main/'
            'mambavision_L3_21k_740m_512.pth.tar',
        ),
    ),
    decode_head=dict(in_channels=[256, 512, 1024, 2048]),
    auxiliary_head=dict(in_channels=1024),
)
train_dataloader = dict(batch_size=1)

optim_wrapper = dict(optimizer=dict(lr=8e-5, weight_decay=0.05))
