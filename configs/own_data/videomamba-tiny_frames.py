# The same with a folder of frames for each video, named by a template: 000001/img_00001.jpg, …
_base_ = ['./videomamba-tiny_videos.py']

template = 'img_{:05}.jpg'
train_pipeline = _base_.train_pipeline
train_pipeline[0]['frame_template'] = template
val_pipeline = _base_.val_pipeline
val_pipeline[0]['frame_template'] = template
test_pipeline = _base_.test_pipeline
test_pipeline[0]['frame_template'] = template

train_dataloader = dict(dataset=dict(data_root='data/own_frames', pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(data_root='data/own_frames', pipeline=val_pipeline))
test_dataloader = dict(dataset=dict(data_root='data/own_frames', pipeline=test_pipeline))
