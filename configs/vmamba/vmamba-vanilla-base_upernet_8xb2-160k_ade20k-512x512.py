_base_ = './vmamba-tiny_upernet_8xb2-160k_ade20k-512x512.py'

model = dict(
    backbone=dict(
        arch='vanilla-base',
        drop_path_rate=0.1,
        init_cfg=dict(
            checkpoint='https://github.com/MzeroMiko/VMamba/releases/download/%23'
            'v0cls/vssmbase_dp06_ckpt_epoch_241.pth',
        ),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
