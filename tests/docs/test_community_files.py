"""README, changelog, citation and the files that GitHub reads."""

import os
import re

import pytest
import yaml
from documents import ROOT

PYPROJECT = (ROOT / 'pyproject.toml').read_text()
VERSION = re.search(r'^version = "(.+)"$', PYPROJECT, re.MULTILINE).group(1)
GITHUB = ROOT / '.github'


def test_the_changelog_has_the_version():
    text = (ROOT / 'CHANGELOG.md').read_text()
    sections = re.findall(r'^## \[(.+?)\]', text, re.MULTILINE)
    assert sections[0] == 'Unreleased'
    assert VERSION in sections or f'will be {VERSION}' in text


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert {'cff-version', 'message', 'title', 'authors'} <= set(citation)
    assert citation['version'] == VERSION
    assert citation['license'] == 'Apache-2.0'
    for work in citation['references']:
        assert {'type', 'title', 'authors', 'year', 'url'} <= set(work)


def test_the_workflow_runs_the_checks_of_the_repository():
    (job,) = yaml.safe_load((GITHUB / 'workflows/ci.yml').read_text())['jobs'].values()
    assert [step['run'] for step in job['steps'] if 'run' in step] == ['.ci/run']
    assert os.access(ROOT / '.ci/run', os.X_OK)
    settings = (ROOT / 'tools/setup_venv.sh').read_text()
    assert all(f'${{{name}:-' in settings for name in job['env'])
    oldest = re.search(r'requires-python = ">=(.+?)"', PYPROJECT).group(1)
    assert oldest in job['strategy']['matrix']['python']


@pytest.mark.parametrize('path', sorted(GITHUB.glob('ISSUE_TEMPLATE/*.yml')), ids=lambda p: p.stem)
def test_issue_forms_have_what_github_asks_for(path):
    form = yaml.safe_load(path.read_text())
    assert form['name']
    assert form['description']
    ids = [field['id'] for field in form['body']]
    assert len(ids) == len(set(ids))
    for field in form['body']:
        assert field['type'] in ('input', 'textarea', 'dropdown', 'checkboxes')
        assert field['attributes']['label']
