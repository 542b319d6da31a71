# Video classification: data/own_videos/{train,val}.csv with lines "path label", classes.txt, files
_base_ = [
    '../_base_/models/videomamba_video.py',
    '../_base_/datasets/kinetics400.py',
    '../_base_/schedules/own_50e.py',
    '../_base_/default_runtime_mmpretrain.py',
]
number = 2
weights = (
    'https://pjlab-gvm-data.oss-cn-shanghai.aliyuncs.com/videomamba/videomamba_t16_in1k_res224.pth'
)

model = dict(
    data_preprocessor=dict(num_classes=number),
    backbone=dict(init_cfg=dict(type='Pretrained', checkpoint=weights)),
    head=dict(num_classes=number),
)
root = dict(data_root='data/own_videos', data_prefix='')
data = dict(label_file='classes.txt', num_classes=number, **root)
train_dataloader = dict(batch_size=8, dataset=dict(ann_file='train.csv', **data))
val_dataloader = dict(batch_size=8, dataset=dict(ann_file='val.csv', **data))
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1,))
test_evaluator = val_evaluator
