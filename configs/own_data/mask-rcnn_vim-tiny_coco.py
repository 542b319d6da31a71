# Instance masks from COCO JSON, for instance that of tools/converters/masks_to_coco.py
_base_ = [
    '../_base_/models/mask-rcnn_vim_simplefpn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/own_50e.py',
    '../_base_/default_runtime_mmdet.py',
]
root, classes = 'data/own_coco/', ('cat', 'dog')  # as in "categories", in any order
weights = (
    'https://huggingface.co/hustvl/Vim-tiny-midclstok/resolve/main/vim_t_midclstok_76p1acc.pth'
)

heads = dict(num_classes=len(classes))
model = dict(
    backbone=dict(init_cfg=dict(type='Pretrained', checkpoint=weights)),
    roi_head=dict(bbox_head=heads, mask_head=heads),
)
data = dict(data_root=root, data_prefix=dict(img='images/'), metainfo=dict(classes=classes))
train_dataloader = dict(dataset=dict(ann_file='train.json', **data))
val_dataloader = dict(dataset=dict(ann_file='val.json', **data))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=root + 'val.json')
test_evaluator = val_evaluator
