"""A task of three classes that needs mmengine alone; configs of the tests import it."""

import json
from typing import ClassVar

import numpy as np
import torch
from mmengine.dataset import BaseDataset
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS, TRANSFORMS
from torch import nn


@TRANSFORMS.register_module(force=True)
class LoadVector:
    """Read the sample's .npy file."""

    def __call__(self, results: dict) -> dict:
        results['inputs'] = torch.from_numpy(np.load(results['img_path'])).float()
        return results


@DATASETS.register_module(force=True)
class ToyDataset(BaseDataset):
    METAINFO: ClassVar = {'classes': ('a', 'b', 'c')}

    def load_data_list(self) -> list[dict]:
        with open(self.ann_file) as file:
            samples = json.load(file)['samples']
        root = self.data_prefix.get('img_path', '')
        return [{'img_path': f'{root}/{s["file"]}', 'label': s['label']} for s in samples]


@MODELS.register_module(force=True)
class ToyBackbone(nn.Module):
    def __init__(self, arch: str = 'tiny', depth: int = 2):
        super().__init__()
        if arch not in ('tiny', 'small'):
            raise ValueError(f"arch must be 'tiny' or 'small', not {arch!r}")
        width = {'tiny': 8, 'small': 12}[arch]
        self.width = width
        self.embed = nn.Linear(4, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + torch.relu(block(x))
        return self.norm(x)


@MODELS.register_module(force=True)
class ToyModel(BaseModel):
    def __init__(self, backbone: dict, num_classes: int = 3, init_cfg: dict | None = None):
        super().__init__(init_cfg=init_cfg)
        self.backbone = MODELS.build(backbone)
        self.head = nn.Linear(self.backbone.width, num_classes)
        self.seen_dtypes: set = set()

    def forward(self, inputs, label=None, mode='tensor', **kwargs):
        inputs = torch.stack(list(inputs)) if isinstance(inputs, list | tuple) else inputs
        logits = self.head(self.backbone(inputs))
        self.seen_dtypes.add(logits.dtype)
        if mode == 'loss':
            return {'loss': nn.functional.cross_entropy(logits, torch.as_tensor(label))}
        predicted = logits.argmax(1).tolist()
        return [{'pred': p, 'label': int(t)} for p, t in zip(predicted, label, strict=True)]


@METRICS.register_module(force=True)
class ToyMetric(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results += [sample['pred'] == sample['label'] for sample in data_samples]

    def compute_metrics(self, results):
        return {'accuracy': float(np.mean(results))}
