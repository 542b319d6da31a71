"""Truth of the model index and the READMEs about the configs."""

import re

import pytest
import torch
import yaml
from config_harness import CONFIG_ROOT, REPO, build_model
from mmengine.config import Config

INDEX = yaml.safe_load((REPO / 'model-index.yml').read_text())
METAFILES = [REPO / path for path in INDEX['Import']]
MODELS = [model for path in METAFILES for model in yaml.safe_load(path.read_text())['Models']]


def test_index_lists_every_metafile():
    assert sorted(METAFILES) == sorted(CONFIG_ROOT.rglob('metafile.yml'))


@pytest.mark.parametrize('path', METAFILES, ids=lambda path: path.parent.name)
def test_metafile_covers_its_folder(path):
    content = yaml.safe_load(path.read_text())
    configs = {REPO / model['Config'] for model in content['Models']}
    assert configs == set(path.parent.glob('*.py'))
    names = [model['Name'] for model in content['Models']]
    assert len(set(names)) == len(names)
    collections = {collection['Name'] for collection in content['Collections']}
    assert {model['In Collection'] for model in content['Models']} == collections
    for collection in content['Collections']:
        assert (REPO / collection['README']).is_file()
    for model in content['Models']:
        for result in model.get('Results', []):
            assert 'reported by the authors' in result['Source']


@pytest.mark.parametrize('model', MODELS, ids=lambda model: model['Name'])
def test_parameters(model):
    with torch.device('meta'):
        built = build_model(Config.fromfile(REPO / model['Config']))
    assert sum(p.numel() for p in built.parameters()) == model['Metadata']['Parameters']


@pytest.mark.parametrize('path', METAFILES, ids=lambda path: path.parent.name)
def test_readme_has_the_same_figures(path):
    readme = (path.parent / 'README.md').read_text()
    links = re.findall(r'\]\(([^)/:]+\.py)\)', readme)
    assert {path.parent / link for link in links} == set(path.parent.glob('*.py'))
    rows = [line for line in readme.splitlines() if line.startswith('|')]
    for model in yaml.safe_load(path.read_text())['Models']:
        (row,) = [row for row in rows if f'| `{model["Name"]}` |' in row]
        assert f'({model["Config"].rpartition("/")[2]})' in row
        cells = [cell.strip() for cell in row.split('|')]
        expected = [f'{model["Metadata"]["Parameters"] / 1e6:.2f} M']
        if 'FLOPs' in model['Metadata']:
            expected.append(f'{model["Metadata"]["FLOPs"] / 1e9:.2f} G')
        for result in model.get('Results', []):
            expected += [str(value) for value in result['Metrics'].values()]
        for figure in expected:
            assert figure in cells, (model['Name'], figure)
        if 'Weights' in model:
            assert f'({model["Weights"]})' in row
