# UPerNet on MambaVision's four maps.
_base_ = ['./upernet_vim.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmvim.MambaVision',
        arch='tiny',
        drop_path_rate=0.2,
        # The whole map is one window, without padding.
        window_sizes=(None, None),
        out_type='featmap',
        out_indices=(0, 1, 2, 3),
        out_norm='separate',
    ),
    neck=None,
    decode_head=dict(in_channels=[80, 160, 320, 640], channels=512),
    auxiliary_head=dict(in_channels=320),
    test_cfg=dict(_delete_=True, mode='whole'),
)
