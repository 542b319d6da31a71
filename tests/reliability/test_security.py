"""Nothing runs, is written or is asked for that the user did not ask for."""

import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
import textwrap
import threading
import urllib.request
from functools import partial
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path

import pytest
import torch
from script_runner import run_script

import mmvim
from mmvim import compat

mmengine = pytest.importorskip('mmengine')
compat.install()

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / 'configs/quickstart/vim_digits_cls.py'
VIDEO = ROOT / 'configs/quickstart/videomamba_digits_video.py'


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def zipped(path, payload):
    torch.save({'state_dict': {'w': torch.ones(2)}, 'meta': {'x': payload}}, path)


def legacy(path, payload):
    content = {'state_dict': {'w': torch.ones(2)}, 'optimizer': payload}
    torch.save(content, path, _use_new_zipfile_serialization=False)


def bare(path, payload):
    path.write_bytes(pickle.dumps(payload))


def tarred(path, payload):
    inner = path.with_suffix('.inner')
    bare(inner, payload)
    with tarfile.open(path, 'w') as archive:
        for name in ('sys_info', 'pickle', 'storages', 'tensors'):
            archive.add(inner, name)


def tools(tmp_path, harmful):
    """Every command that reads a checkpoint."""
    movie = tmp_path / 'movie.mp4'
    return {
        'train --resume': ('train.py', CONFIG, '--no-checks', '--resume', harmful),
        'train load_from': (
            'train.py', CONFIG, '--no-checks', '--cfg-options', f'load_from={harmful}',
        ),
        'train init_cfg': (
            'train.py', CONFIG, '--no-checks', '--cfg-options',
            f"model.backbone.init_cfg=dict(type='Pretrained',checkpoint='{harmful}')",
        ),
        'test': ('test.py', CONFIG, harmful, '--no-checks'),
        'convert': ('converters/convert_checkpoint.py', CONFIG, harmful, tmp_path / 'x.pth'),
        'check': ('converters/check_checkpoint.py', CONFIG, harmful),
        'publish': ('publish.py', harmful, tmp_path / 'x.pth'),
        'demo': ('demo/image_demo.py', CONFIG, tmp_path / 'a.png', '--weights', harmful,
                 '--device', 'cpu'),
        'stream': ('demo/stream.py', VIDEO, harmful, movie, '--device', 'cpu'),
        'export': ('export/export.py', CONFIG, tmp_path / 'x.pt2', '--weights', harmful),
    }  # fmt: skip


def small_config(tmp_path):
    """The data of the config are wanted by the commands that get as far as the checkpoint."""
    from PIL import Image

    for split in ('train', 'val', 'test'):
        for name in '0123456789':
            folder = tmp_path / 'data/quickstart/cls' / split / name
            folder.mkdir(parents=True)
            Image.new('L', (32, 32)).save(folder / '0.png')
    Image.new('RGB', (32, 32)).save(tmp_path / 'a.png')


KINDS = {'zipped': zipped, 'legacy': legacy, 'bare': bare, 'tarred': tarred}
QUICK = (('test', 'zipped'), ('train --resume', 'legacy'), ('publish', 'bare'))
# The others read files as one of these does.
EVERY_KIND = ('test', 'train --resume', 'train init_cfg', 'publish')


@pytest.mark.parametrize(
    ('name', 'kind'),
    [
        pytest.param(name, kind, marks=() if (name, kind) in QUICK else pytest.mark.slow)
        for name in sorted(tools(Path(), ''))
        for kind in (KINDS if name in EVERY_KIND else ['zipped'])
    ],
)
def test_no_command_runs_a_pickle(name, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_config(tmp_path)
    if name == 'stream':
        av = pytest.importorskip('av')
        del av
        sys.path.append(str(ROOT / 'tests/datasets'))
        from video_files import coded_frames, write_video

        write_video(tmp_path / 'movie.mp4', coded_frames(16, 32, 32))
    harmful, marker = tmp_path / 'harmful.pth', tmp_path / 'it-was-executed'
    KINDS[kind](harmful, Harmful(marker))
    command = list(tools(tmp_path, harmful)[name])
    if name.startswith('train'):
        command[2:2] = ['--work-dir', tmp_path / 'work']
    result = run_script(*command)
    assert not marker.exists()
    assert result.returncode == 2, result.stderr
    error = result.stderr.strip().splitlines()[-1]
    assert error.startswith('error: '), result.stderr
    assert 'harmful.pth' in error


def test_no_function_runs_a_pickle(tmp_path):
    from mmvim.apis import get_model, load_weights, read_checkpoint
    from mmvim.apis.inferencers import make_inferencer
    from mmvim.errors import CheckpointError

    marker, harmful = tmp_path / 'it-was-executed', tmp_path / 'harmful.pth'
    renamed = tmp_path / 'harmful.safetensors'
    zipped(harmful, Harmful(marker))
    bare(renamed, Harmful(marker))
    model = mmvim.Vim(arch=dict(embed_dims=8, depth=1, d_state=2), img_size=32)
    for file in (harmful, renamed):
        for use in (
            lambda file: read_checkpoint(file),
            lambda file: load_weights(model, file),
            lambda file: get_model(CONFIG, file),
            lambda file: make_inferencer(str(CONFIG), str(file), 'cpu'),
        ):
            with pytest.raises(CheckpointError, match=file.name):
                use(file)
    assert not marker.exists()


def with_mmengine(file):
    from mmengine.runner import load_checkpoint

    load_checkpoint(torch.nn.Linear(2, 2), file)


def with_init_cfg(file):
    from mmengine.model import BaseModule

    BaseModule(dict(type='Pretrained', checkpoint=file)).init_weights()


def with_init_cfg_of_a_part(file):
    from mmengine.model import BaseModule

    BaseModule(dict(type='Pretrained', checkpoint=file, prefix='backbone.')).init_weights()


def with_mmpretrain(file):
    pytest.importorskip('mmpretrain').get_model('resnet18_8xb32_in1k', pretrained=file)


def with_mmpretrain_of_mmvim(file):
    pytest.importorskip('mmpretrain').get_model('vim-tiny_3rdparty_in1k', pretrained=file)


def with_inferencer_of_mmpretrain(file):
    mmpretrain = pytest.importorskip('mmpretrain')
    mmpretrain.ImageClassificationInferencer('resnet18_8xb32_in1k', pretrained=file, device='cpu')


def with_mmdet(file):
    config = str(ROOT / 'configs/quickstart/vim_digits_det.py')
    pytest.importorskip('mmdet.apis').init_detector(config, file, device='cpu')


def with_inferencer_of_mmdet(file):
    config = str(ROOT / 'configs/quickstart/vim_digits_det.py')
    pytest.importorskip('mmdet.apis').DetInferencer(config, file, device='cpu')


def with_mmseg(file):
    config = str(ROOT / 'configs/quickstart/vim_digits_seg.py')
    pytest.importorskip('mmseg.apis').init_model(config, file, device='cpu')


QUICK_USES = (with_mmengine, with_init_cfg, with_init_cfg_of_a_part)
SLOW_USES = (
    with_mmpretrain, with_mmpretrain_of_mmvim, with_inferencer_of_mmpretrain,
    with_mmdet, with_inferencer_of_mmdet, with_mmseg,
)  # fmt: skip


@pytest.mark.parametrize('remote', [False, True], ids=['file', 'url'])
@pytest.mark.parametrize(
    'use', [*QUICK_USES, *(pytest.param(use, marks=pytest.mark.slow) for use in SLOW_USES)]
)
def test_other_libraries_run_no_pickle_beside_mmvim(use, remote, server):
    """Calls of a script that imports mmvim and then loads weights without it."""
    folder, address = server
    marker, harmful = folder / 'it-was-executed', folder / 'harmful.pth'
    zipped(harmful, Harmful(marker))
    with pytest.raises(pickle.UnpicklingError, match=r'harmful\.pth.* refused'):
        use(f'{address}/harmful.pth' if remote else str(harmful))
    assert not marker.exists()


def test_resume_reads_no_pickle_that_last_checkpoint_points_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_config(tmp_path)
    marker, elsewhere = tmp_path / 'it-was-executed', tmp_path / 'elsewhere'
    elsewhere.mkdir()
    (tmp_path / 'work').mkdir()
    zipped(elsewhere / 'epoch_1.pth', Harmful(marker))
    (tmp_path / 'work/last_checkpoint').write_text(str(elsewhere / 'epoch_1.pth'))
    epochs = ['--cfg-options', 'train_cfg.max_epochs=1', 'train_dataloader.num_workers=0']
    result = run_script(
        'train.py', CONFIG, '--work-dir', tmp_path / 'work', '--resume', '--no-validate', *epochs
    )
    assert not marker.exists()
    assert result.returncode in (0, 2), result.stderr


@pytest.mark.parametrize('name', ['../../x.pth', '/tmp/x_{}.pth', 'a/b_{}.pth', '..\\x_{}.pth'])
def test_checkpoints_stay_in_their_directory(name):
    from mmengine.config import Config

    from mmvim.cli.checks import check_config
    from mmvim.errors import UserError

    cfg = Config.fromfile(CONFIG)
    check_config(cfg, ('train',), paths=False)
    cfg.default_hooks.checkpoint.filename_tmpl = name
    with pytest.raises(UserError, match=r'^default_hooks.checkpoint.filename_tmpl must be a file'):
        check_config(cfg, ('train',), paths=False)


def test_names_of_configs_stay_in_the_package(tmp_path):
    from mmengine.config import Config

    from mmvim.compat.mmengine_configs import config_path

    outside = tmp_path / 'evil.py'
    outside.write_text(f'import os\nos.mkdir({str(tmp_path / "executed")!r})\n')
    for name in (os.path.relpath(outside, ROOT / 'configs'), str(outside)):
        with pytest.raises(FileNotFoundError, match='outside'):
            config_path(name)
        (tmp_path / 'base.py').write_text(f'_base_ = {"mmvim::" + name!r}\n')
        with pytest.raises((FileNotFoundError, ValueError)):
            Config.fromfile(tmp_path / 'base.py')
    assert not (tmp_path / 'executed').exists()


def test_pictures_stay_in_the_output_directory(tmp_path, monkeypatch):
    """Names of images, which may come from anywhere, name what is written."""
    from PIL import Image

    images = tmp_path / 'in' / 'a'
    images.mkdir(parents=True)
    for name in ('...png', '..\\x.png', '-.png', 'c\nd.png'):
        Image.new('RGB', (32, 32)).save(images / name, 'PNG')
    outside = tmp_path / 'in' / 'x.png'
    Image.new('RGB', (32, 32)).save(outside)
    out = tmp_path / 'out'
    result = run_script(
        'demo/image_demo.py', CONFIG, images, images / '../x.png', '--out-dir', out,
        '--device', 'cpu', '--no-progress',
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    written = {p for p in tmp_path.rglob('*') if p.is_file() and images.parent not in p.parents}
    assert len(written) == 6
    assert all(p.is_relative_to(out) for p in written)
    listed = json.loads((out / 'predictions.json').read_text())
    assert all(Path(entry['picture']).resolve().is_relative_to(out) for entry in listed)


OFFLINE = """
import socket, sys

tried = []

def refuse(*args, **kwargs):
    tried.append(args)
    raise OSError('the network is out of bounds')

for name in ('create_connection', 'getaddrinfo', 'gethostbyname'):
    setattr(socket, name, refuse)
socket.socket.connect = socket.socket.connect_ex = refuse

import numpy as np
import torch
import mmvim, mmvim.ops, mmvim.layers, mmvim.models, mmvim.apis
from mmengine.config import Config

mmvim.list_models()
for name in sys.argv[1:4]:
    cfg = Config.fromfile(name)
    model = mmvim.apis.build_model(cfg)
    model.init_weights()
    assert next(model.parameters()).shape
    torch.save({'state_dict': model.state_dict()}, 'weights.pth')
    from mmvim.apis.inferencers import make_inferencer
    (result,) = make_inferencer(cfg, 'weights.pth', 'cpu').predict(np.zeros((32, 32, 3), np.uint8))
    assert result.prediction
from mmvim.cli.launcher import main_train
main_train([
    sys.argv[1], '--work-dir', 'work', '--no-validate', '--cfg-options', 'train_cfg.max_epochs=1',
    'train_dataloader.num_workers=0'])
assert not tried, tried
print('offline')
"""


@pytest.mark.slow
def test_no_network(tmp_path):
    small_config(tmp_path)
    configs = [ROOT / f'configs/quickstart/vim_digits_{task}.py' for task in ('cls', 'det', 'seg')]
    environment = {k: v for k, v in os.environ.items() if not k.lower().endswith('_offline')}
    path = os.pathsep.join((str(ROOT), os.environ.get('PYTHONPATH', '')))
    environment |= {'PYTHONPATH': path, 'TORCH_HOME': str(tmp_path / 'cache')}
    environment |= {'HF_HOME': str(tmp_path / 'hf'), 'OMP_NUM_THREADS': '1'}
    run = subprocess.run(
        [sys.executable, '-c', textwrap.dedent(OFFLINE), *map(str, configs)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.strip().endswith('offline')
    assert not (tmp_path / 'cache').exists()
    assert not (tmp_path / 'hf').exists()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A folder and the address at which it is served on this machine."""
    folder = tmp_path / 'served'
    folder.mkdir()
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    for name in ('http_proxy', 'HTTP_PROXY', 'all_proxy', 'ALL_PROXY'):
        monkeypatch.delenv(name, raising=False)

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(('127.0.0.1', 0), partial(Handler, directory=str(folder))) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield folder, f'http://127.0.0.1:{httpd.server_port}'
        httpd.shutdown()
        thread.join()


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_downloads_are_compared_with_their_hash(suffix, server, tmp_path):
    from mmvim.apis import read_checkpoint
    from mmvim.checkpoints.files import write_checkpoint
    from mmvim.errors import CheckpointError

    folder, address = server
    plain = folder / f'model{suffix}'
    write_checkpoint({'w': torch.arange(3.0)}, plain)
    digest = sha256(plain.read_bytes()).hexdigest()[:8]
    right, wrong = f'model-{digest}{suffix}', f'model-0123abcd{suffix}'
    for name in (right, wrong, f'model-20240131{suffix}'):
        (folder / name).write_bytes(plain.read_bytes())
    for name in (right, f'model-20240131{suffix}', plain.name):
        weights = read_checkpoint(f'{address}/{name}')['state_dict']
        assert weights['w'].tolist() == [0, 1, 2]
    with pytest.raises(CheckpointError, match='invalid hash value'):
        read_checkpoint(f'{address}/{wrong}')
    cached = next((tmp_path / 'cache').rglob(right))
    assert not list((tmp_path / 'cache').rglob(wrong))
    # Nor is a cache believed that was changed since.
    cached.write_bytes(b'something else')
    assert read_checkpoint(f'{address}/{right}')['state_dict']['w'].tolist() == [0, 1, 2]


PLAYLIST = '#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10.0,\n{}\n#EXT-X-ENDLIST\n'
SCRIPT = "ffconcat version 1.0\nfile '{}'\n"
SESSION = 'v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 26\n'


@pytest.mark.parametrize(
    ('name', 'text', 'target'),
    [
        ('a.m3u8', PLAYLIST, '{folder}/other.ts'),
        ('a.m3u8', PLAYLIST, '{address}/other.ts'),
        ('a.mp4', SCRIPT, 'other.ts'),
        ('a.mp4', SCRIPT, '{address}/other.ts'),
        ('a.mp4', SESSION, ''),
    ],
)
def test_videos_that_name_others_are_refused(name, text, target, server, tmp_path):
    pytest.importorskip('av')
    sys.path.append(str(ROOT / 'tests/datasets'))
    from video_files import coded_frames, write_video

    from mmvim.datasets.video import VideoReader, VideoSampleError

    folder, address = server
    write_video(folder / 'other.ts', coded_frames(16, 32, 32))
    assert len(VideoReader(folder / 'other.ts')) == 16
    (folder / name).write_text(text.format(target.format(folder=folder, address=address)))
    with pytest.raises(VideoSampleError, match=f'{name}.*: a playlist'):
        VideoReader(folder / name)


def test_names_of_videos_are_no_addresses(server, tmp_path, monkeypatch):
    """``http:/host/a.mp4`` is a file in the folder ``http:``, also to FFmpeg."""
    pytest.importorskip('av')
    sys.path.append(str(ROOT / 'tests/datasets'))
    from video_files import coded_frames, write_video

    from mmvim.datasets.video import VideoReader

    monkeypatch.chdir(tmp_path)
    folder, address = server
    write_video(folder / 'a.mp4', coded_frames(8, 32, 32))
    local = tmp_path / address.replace('//', '/') / 'a.mp4'
    local.parent.mkdir(parents=True)
    write_video(local, coded_frames(16, 32, 32))
    assert len(VideoReader(f'{address}/a.mp4')) == 16


def test_lists_of_data_may_name_files_elsewhere_but_no_addresses(server, tmp_path):
    """Lists of one's own data have absolute paths, ``..`` and links; an address is only a name."""
    datasets = pytest.importorskip('mmpretrain.datasets')
    from PIL import Image

    folder, address = server
    data = tmp_path / 'data'
    data.mkdir()
    Image.new('RGB', (8, 8), (255, 0, 0)).save(folder / 'a.png')
    (data / 'link.png').symlink_to(folder / 'a.png')
    names = [str(folder / 'a.png'), '../served/a.png', 'link.png', f'{address}/a.png']
    (tmp_path / 'list.txt').write_text(''.join(f'{name} 0\n' for name in names))
    dataset = datasets.CustomDataset(
        ann_file=str(tmp_path / 'list.txt'), data_prefix=str(data),
        pipeline=[dict(type='LoadImageFromFile')],
    )  # fmt: skip
    for index in range(3):
        assert dataset.prepare_data(index)['img'].shape == (8, 8, 3)
    # The picture is there to be fetched.
    with urllib.request.urlopen(f'{address}/a.png') as answer:
        assert answer.status == 200
    with pytest.raises(Exception, match='data/http'):
        dataset.prepare_data(3)


def test_hash_in_name():
    from mmvim.compat.mmengine_checkpoints import hash_in_name

    assert hash_in_name('vim-tiny_in1k_20240131-0a1b2c3d.pth') == '0a1b2c3d'
    assert hash_in_name(f'a-{"f" * 64}.safetensors') == 'f' * 64
    for name in ('a.pth', 'mask-rcnn-1x.pth', 'model-2.pth', 'a-20240131.pth', 'a-0a1b2c3d.txt'):
        assert hash_in_name(name) is None


@pytest.mark.skipif(os.name == 'nt', reason='POSIX permissions')
def test_cache_of_compiled_kernels_is_private(tmp_path, monkeypatch):
    from mmvim.ops import extension

    monkeypatch.setenv('MMVIM_CACHE_DIR', str(tmp_path / 'new' / 'cache'))
    assert extension._cache_root().stat().st_mode & 0o777 == 0o700
    for mode in (0o770, 0o707, 0o777, 0o1777):
        (tmp_path / 'new' / 'cache').chmod(mode)
        with pytest.raises(PermissionError, match='can be written by others'):
            extension._cache_root()
        assert extension._cached_folders() == []
    if os.geteuid() == 0:
        (tmp_path / 'new' / 'cache').chmod(0o700)
        os.chown(tmp_path / 'new' / 'cache', 12345, 12345)
        with pytest.raises(PermissionError, match='can be written by others'):
            extension._cache_root()


@pytest.mark.skipif(os.name == 'nt', reason='POSIX permissions')
def test_a_cache_that_others_prepared_in_the_temporary_folder_is_not_used(tmp_path, monkeypatch):
    """Without a home directory, the name of the fallback can be guessed."""
    from mmvim.ops import extension

    monkeypatch.delenv('MMVIM_CACHE_DIR', raising=False)
    blocked = tmp_path / 'file'
    blocked.touch()
    monkeypatch.setenv('XDG_CACHE_HOME', str(blocked))
    monkeypatch.setattr(extension.tempfile, 'gettempdir', lambda: str(tmp_path))
    trap = tmp_path / f'mmvim-{os.getuid()}'
    trap.mkdir()
    trap.chmod(0o777)
    with pytest.raises(PermissionError, match='can be written by others'):
        extension._cache_root()
    assert extension._cached_folders() == []


def requirements():
    tomllib = pytest.importorskip('tomllib')
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    extras = project['optional-dependencies']
    return [*project['dependencies'], *(text for extra in extras.values() for text in extra)]


def test_what_is_installed_is_what_is_asked_for():
    packaging = pytest.importorskip('packaging.requirements')
    checked = 0
    for text in requirements():
        try:
            wanted = packaging.Requirement(text)
            installed = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            continue
        assert wanted.specifier.contains(installed, prereleases=True), f'{text}: {installed}'
        checked += 1
    assert checked >= 10


def test_no_dependency_is_fetched_from_elsewhere():
    """Neither an address nor an index of packages is named: pip's own configuration decides."""
    for name in ('pyproject.toml', 'tools/setup_venv.sh', 'Makefile', 'setup.py'):
        text = (ROOT / name).read_text()
        assert not re.search(r'git\+|(?<!-)--(extra-)?index-url\s+\S*://|trusted-host', text), name
