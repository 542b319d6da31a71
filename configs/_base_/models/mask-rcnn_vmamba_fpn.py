# Mask R-CNN on VMamba's four maps. Heads and training as in mask-rcnn_vim_simplefpn.py.
_base_ = ['./mask-rcnn_vim_simplefpn.py']

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
    neck=dict(
        _delete_=True, type='FPN', in_channels=[96, 192, 384, 768], out_channels=256, num_outs=5
    ),
)
