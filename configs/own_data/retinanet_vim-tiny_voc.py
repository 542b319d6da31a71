# Detection from VOC XML: data/own_voc/{JPEGImages,Annotations,ImageSets/Main}
_base_ = [
    '../_base_/models/retinanet_vim_simplefpn.py',
    '../_base_/datasets/own_voc.py',
    '../_base_/schedules/own_50e.py',
    '../_base_/default_runtime_mmdet.py',
]
classes = ('cat', 'dog')  # the <name> of objects
weights = (
    'https://huggingface.co/hustvl/Vim-tiny-midclstok/resolve/main/vim_t_midclstok_76p1acc.pth'
)

model = dict(
    backbone=dict(init_cfg=dict(type='Pretrained', checkpoint=weights)),
    bbox_head=dict(num_classes=len(classes)),
)
data = dict(metainfo=dict(classes=classes))
train_dataloader = dict(dataset=data)
val_dataloader = dict(dataset=data)
test_dataloader = dict(dataset=data)
