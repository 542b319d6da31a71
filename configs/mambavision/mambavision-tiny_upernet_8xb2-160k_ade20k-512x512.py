_base_ = [
    '../_base_/models/upernet_mambavision.py',
    '../_base_/datasets/ade20k_512x512.py',
    '../_base_/schedules/ade20k_160k_adamw.py',
    '../_base_/default_runtime_mmseg.py',
]

model = dict(
    backbone=dict(
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://huggingface.co/nvidia/MambaVision-T-1K/resolve/main/'
            'mambavision_tiny_1k.pth.tar',
        ),
    )
)

optim_wrapper = dict(optimizer=dict(lr=5e-5))
