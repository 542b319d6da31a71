_base_ = './videomamba-small_8xb512_in1k.py'

model = dict(
    backbone=dict(arch='middle', img_size=448, drop_path_rate=0.5),
    head=dict(in_channels=576),
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://huggingface.co/OpenGVLab/VideoMamba/resolve/main/'
        'videomamba_m16_in1k_res224.pth',
    ),
)

train_dataloader = _base_.train_dataloader
val_dataloader = _base_.val_dataloader
test_dataloader = _base_.test_dataloader
train_dataloader['batch_size'] = 32
train_dataloader['dataset']['pipeline'][1]['scale'] = 448
for loader in (val_dataloader, test_dataloader):
    loader['dataset']['pipeline'][1]['scale'] = 512
    loader['dataset']['pipeline'][2]['crop_size'] = 448

optim_wrapper = dict(optimizer=dict(lr=5e-06, weight_decay=1e-8), clip_grad=None)
param_scheduler = _base_.param_scheduler
param_scheduler[0].update(start_factor=0.2, end=5)
param_scheduler[1].update(eta_min=5e-6, begin=5, end=30)
train_cfg = dict(max_epochs=30)
auto_scale_lr = dict(base_batch_size=512)
