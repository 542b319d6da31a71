# Mask R-CNN on MambaVision's four maps. Heads and training as in mask-rcnn_vim_simplefpn.py.
_base_ = ['./mask-rcnn_vim_simplefpn.py']

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
    neck=dict(
        _delete_=True, type='FPN', in_channels=[80, 160, 320, 640], out_channels=256, num_outs=5
    ),
)
