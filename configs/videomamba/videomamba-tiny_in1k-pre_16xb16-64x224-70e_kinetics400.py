_base_ = './videomamba-tiny_in1k-pre_8xb64-8x224-70e_kinetics400.py'

model = dict(backbone=dict(num_frames=64))

train_dataloader = _base_.train_dataloader
val_dataloader = _base_.val_dataloader
test_dataloader = _base_.test_dataloader
for loader in (train_dataloader, val_dataloader, test_dataloader):
    loader['dataset']['pipeline'][0]['num_frames'] = 64
train_dataloader['batch_size'] = 16

optim_wrapper = dict(optimizer=dict(lr=0.0004))
param_scheduler = _base_.param_scheduler
param_scheduler[0].update(start_factor=0.005, end=5)
param_scheduler[1].update(eta_min_ratio=0.005, begin=5, end=70)
train_cfg = dict(max_epochs=70)
auto_scale_lr = dict(base_batch_size=256)
