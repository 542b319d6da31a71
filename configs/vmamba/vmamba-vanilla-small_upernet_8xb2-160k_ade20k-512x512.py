_base_ = './vmamba-tiny_upernet_8xb2-160k_ade20k-512x512.py'

model = dict(
    backbone=dict(
        arch='vanilla-small',
        drop_path_rate=0.1,
        init_cfg=dict(
            checkpoint='https://github.com/MzeroMiko/VMamba/releases/download/%23'
            'v0cls/vssmsmall_dp03_ckpt_epoch_238.pth',
        ),
    ),
)
