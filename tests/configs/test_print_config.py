import subprocess
import sys

from config_harness import REPO
from mmengine.config import Config


def print_config(*arguments):
    command = [sys.executable, str(REPO / 'tools/misc/print_config.py'), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_prints_and_saves(tmp_path):
    config = REPO / 'configs/vim/vim-small_8xb64_in1k.py'
    saved = tmp_path / 'saved.py'
    done = print_config(config, '--cfg-options', 'model.backbone.stride=8', '--save-path', saved)
    assert done.returncode == 0, done.stderr
    expected = Config.fromfile(config)
    expected.model.backbone.stride = 8
    assert Config.fromstring(done.stdout, '.py').to_dict() == expected.to_dict()
    assert Config.fromfile(saved).to_dict() == expected.to_dict()


def test_missing_file():
    done = print_config('nowhere.py')
    assert done.returncode == 1
    assert done.stderr.startswith('error: nowhere.py')
    assert len(done.stderr.splitlines()) == 1
