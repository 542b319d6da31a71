# UPerNet on VMamba's four maps.
_base_ = ['./upernet_vim.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmvim.VMamba',
        arch='tiny',
        drop_path_rate=0.2,
        out_type='featmap',
        out_indices=(0, 1, 2, 3),
        out_norm='separate',
    ),
    neck=None,
    decode_head=dict(in_channels=[96, 192, 384, 768], channels=512),
    auxiliary_head=dict(in_channels=384),
    test_cfg=dict(_delete_=True, mode='whole'),
)
