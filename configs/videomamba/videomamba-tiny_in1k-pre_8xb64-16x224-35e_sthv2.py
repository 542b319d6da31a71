_base_ = './videomamba-tiny_in1k-pre_8xb64-8x224-35e_sthv2.py'

num_frames = 16

model = dict(backbone=dict(num_frames=num_frames))

# The first step of each pipeline, which reads the frames.
train_pipeline = _base_.train_pipeline
val_pipeline = _base_.val_pipeline
test_pipeline = _base_.test_pipeline
for pipeline in (train_pipeline, val_pipeline, test_pipeline):
    pipeline[0]['num_frames'] = num_frames
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=val_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
