import pytest
from config_harness import MiniatureData


@pytest.fixture(scope='session')
def miniature_data(tmp_path_factory):
    return MiniatureData(tmp_path_factory.mktemp('miniature'))
