_base_ = './videomamba-middle_in1k-pre_8xb32-8x224-50e_kinetics400.py'

num_frames = 16

model = dict(backbone=dict(num_frames=num_frames))

# The first step of each pipeline, which reads the frames.
train_pipeline = _base_.train_pipeline
val_pipeline = _base_.val_pipeline
test_pipeline = _base_.test_pipeline
for pipeline in (train_pipeline, val_pipeline, test_pipeline):
    pipeline[0]['num_frames'] = num_frames
train_dataloader = dict(batch_size=16, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=val_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))

optim_wrapper = dict(optimizer=dict(lr=1e-4))
param_scheduler = _base_.param_scheduler
param_scheduler[0]['start_factor'] = 1e-2
param_scheduler[1]['eta_min_ratio'] = 1e-2
auto_scale_lr = dict(base_batch_size=128)
