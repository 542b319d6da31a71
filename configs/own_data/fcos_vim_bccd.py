# Blood cells (BCCD, VOC XML) with the small detector that `make quickstart-det` has trained
_base_ = [
    '../_base_/models/fcos_vim_simplefpn.py',
    '../_base_/datasets/own_voc.py',
    '../_base_/schedules/own_50e.py',
    '../_base_/default_runtime_mmdet.py',
]
classes = ('RBC', 'WBC', 'Platelets')
load_from = 'work_dirs/quickstart/det/epoch_4.pth'

train_pipeline = _base_.train_pipeline
train_pipeline[2]['scale'] = (320, 240)
train_pipeline[3].update(prob=0.75, direction=['horizontal', 'vertical', 'diagonal'])
test_pipeline = _base_.test_pipeline
test_pipeline[1]['scale'] = (320, 240)

model = dict(bbox_head=dict(num_classes=len(classes)))
data = dict(data_root='data/BCCD/', metainfo=dict(classes=classes))
train_dataloader = dict(batch_size=8, dataset=dict(pipeline=train_pipeline, **data))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline, **data))
test = dict(ann_file='ImageSets/Main/test.txt', pipeline=test_pipeline, **data)
test_dataloader = dict(dataset=test)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
train_cfg = dict(val_interval=5)
