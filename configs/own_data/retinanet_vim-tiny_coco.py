# Detection from COCO JSON: data/own_coco/{train,val}.json, pictures in data/own_coco/images/
_base_ = [
    '../_base_/models/retinanet_vim_simplefpn.py',
    '../_base_/datasets/coco_detection.py',
    '../_base_/schedules/own_50e.py',
    '../_base_/default_runtime_mmdet.py',
]
root, classes = 'data/own_coco/', ('cat', 'dog')  # as in "categories", in any order
weights = (
    'https://huggingface.co/hustvl/Vim-tiny-midclstok/resolve/main/vim_t_midclstok_76p1acc.pth'
)

model = dict(
    backbone=dict(init_cfg=dict(type='Pretrained', checkpoint=weights)),
    bbox_head=dict(num_classes=len(classes)),
)
data = dict(data_root=root, data_prefix=dict(img='images/'), metainfo=dict(classes=classes))
train_dataloader = dict(dataset=dict(ann_file='train.json', **data))
val_dataloader = dict(dataset=dict(ann_file='val.json', **data))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=root + 'val.json')
test_evaluator = val_evaluator
