# Segmentation from maps of class indices: data/own_segmentation/{images,masks}/{train,val}/
_base_ = [
    '../_base_/models/upernet_vim.py',
    '../_base_/datasets/own_segmentation.py',
    '../_base_/schedules/own_10k.py',
    '../_base_/default_runtime_mmseg.py',
]
classes = ('background', 'cat', 'dog')  # the names of 0, 1, 2
weights = (
    'https://huggingface.co/hustvl/Vim-tiny-midclstok/resolve/main/vim_t_midclstok_76p1acc.pth'
)

model = dict(
    backbone=dict(init_cfg=dict(type='Pretrained', checkpoint=weights)),
    decode_head=dict(num_classes=len(classes)),
    auxiliary_head=dict(num_classes=len(classes)),
)
data = dict(metainfo=dict(classes=classes))
train_dataloader = dict(dataset=data)
val_dataloader = dict(dataset=data)
test_dataloader = dict(dataset=data)
default_hooks = dict(checkpoint=dict(interval=1000))
