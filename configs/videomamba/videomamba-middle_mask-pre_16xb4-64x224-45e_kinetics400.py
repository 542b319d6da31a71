_base_ = './videomamba-middle_mask-pre_16xb32-8x224-45e_kinetics400.py'

model = dict(backbone=dict(num_frames=64))

train_dataloader = _base_.train_dataloader
val_dataloader = _base_.val_dataloader
test_dataloader = _base_.test_dataloader
for loader in (train_dataloader, val_dataloader, test_dataloader):
    loader['dataset']['pipeline'][0]['num_frames'] = 64
train_dataloader['batch_size'] = 4

optim_wrapper = dict(optimizer=dict(lr=5e-05))
param_scheduler = _base_.param_scheduler
param_scheduler[0].update(start_factor=0.01, end=5)
param_scheduler[1].update(eta_min_ratio=0.01, begin=5, end=45)
train_cfg = dict(max_epochs=45)
auto_scale_lr = dict(base_batch_size=64)
