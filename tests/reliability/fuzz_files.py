"""Damaged images, annotations, videos and checkpoints, and what may become of them.

A file is either used, or refused with an error that a tool shows in one line and that names the
file or the key of the config that names it.
"""

import copy
import io
import json
import os
import pickle
import struct
import sys
import tarfile
import zipfile
import zlib
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE.parent / 'datasets'), str(HERE.parent / 'configs')]

IMAGES = ('jpg', 'png', 'palette.png', 'deep.png', 'bmp', 'tif', 'webp', 'gif')
VIDEOS = ('mp4', 'avi', 'webm')
TEXTS = ('coco', 'lvis_like', 'imagenet', 'list', 'kinetics', 'ssv2', 'label_file')
CHECKPOINTS = ('pth', 'training.pth', 'legacy.pth', 'official.pth', 'safetensors', 'tar.pth')
KINDS = {'image': IMAGES, 'label_map': ('png', 'palette.png', 'bmp'), 'video': VIDEOS}
KINDS |= {'annotations': TEXTS, 'checkpoint': CHECKPOINTS}
NONSENSE = (
    None, -1, 0, 10**9, 10**30, 2.5, float('nan'), float('inf'), True, '', 'no', '../../x', '\0',
    [], [[]], {}, {'a': 1}, [1, 2], [[1, 2]], [None] * 4, [-5, -5, 10**9, 10**9], [0, 0, 0, 0],
)  # fmt: skip
LINES = (
    b'', b'\n\n', b'a.jpg', b'a.jpg 0 1 2', b'a.jpg -1', b'a.jpg 99999999999999999999', b'0 a.jpg',
    b'a.jpg x', b'\xff\xfe\x00', b'a.jpg 1e3', b'../../../etc/passwd 0', b'\0 0', b'a.jpg,0',
    b',,,', b'"', b'[', b'{}', b'"a', 'a.jpg ٣'.encode(), 'a.jpg ²'.encode(),
)  # fmt: skip

_where = st.floats(0, 1)
_bytes = st.one_of(
    st.tuples(st.just('flip'), _where, st.integers(1, 255)),
    st.tuples(st.just('cut'), _where),
    st.tuples(st.just('head'), _where),
    st.tuples(st.just('zero'), _where, st.integers(1, 400)),
    st.tuples(st.just('ones'), _where, st.sampled_from((1, 2, 4, 8))),
    st.tuples(st.just('insert'), _where, st.binary(max_size=20)),
    st.tuples(st.just('repeat'), _where, st.integers(1, 400)),
    st.tuples(st.just('number'), _where, st.sampled_from((2**31 - 1, 2**32 - 1, 2**24, 0, 1))),
)
_leaf = st.tuples(st.just('leaf'), st.integers(0, 10**6), st.sampled_from(range(len(NONSENSE))))
_gone = st.tuples(st.just('gone'), st.integers(0, 10**6))
_line = st.tuples(st.just('line'), st.integers(0, 10), st.sampled_from(range(len(LINES))))
BOMBS = {
    'image': ('png', 'gif', 'bmp', 'tif', 'jpg', 'webp', 'svg', 'empty', 'text', 'folder'),
    'label_map': ('png', 'empty', 'text', 'folder', 'other_size'),
    'video': ('empty', 'text', 'folder', 'image', 'y4m', 'playlist'),
    'annotations': ('empty', 'deep', 'binary', 'folder', 'wide', 'number', 'gzip'),
    'checkpoint': (
        'empty', 'text', 'folder', 'zip', 'zip64', 'header', 'expanded', 'pickle', 'deep',
        'cycle', 'object', 'list', 'list_of_weights', 'strings', 'nan_shape', 'sparse',
        'quantized', 'meta', 'complex', 'storage', 'alias', 'safetensors_overlap',
    ),
}  # fmt: skip


@st.composite
def cases(draw: Any, group: str) -> dict:
    """A file of ``group`` and one to three things that are wrong with it."""
    kind = draw(st.sampled_from(KINDS[group]))
    damage = _bytes
    if group == 'annotations' and draw(st.integers(0, 4)):
        damage = (
            _line if kind in ('imagenet', 'list', 'kinetics') else st.one_of(_leaf, _leaf, _gone)
        )
    case = {'group': group, 'kind': kind, 'seed': draw(st.integers(0, 3))}
    if draw(st.integers(0, 11)) == 0:
        case['bomb'] = draw(st.sampled_from(BOMBS[group]))
    else:
        case['damage'] = draw(st.lists(damage, min_size=1, max_size=3))
    return case


# --- files ---------------------------------------------------------------------------------------


def _png(width: int, height: int, rows: int = 0, colour: int = 0) -> bytes:
    """A PNG of zeros whose header promises more than there is, if ``rows`` are fewer."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
        )

    packer = zlib.compressobj(9)
    row = bytes(width * (3 if colour == 2 else 1) + 1)
    data = b''.join(packer.compress(row) for _ in range(rows)) + packer.flush()
    header = struct.pack('>IIBBBBB', width, height, 8, colour, 0, 0, 0)
    return (
        b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', data) + chunk(b'IEND', b'')
    )


def image_bytes(kind: str, seed: int) -> bytes:
    """A small picture."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    picture = Image.fromarray(rng.integers(0, 255, (24 + 8 * seed, 40, 3), np.uint8))
    if kind == 'palette.png':
        picture = picture.convert('P')
    if kind == 'deep.png':
        picture = Image.fromarray(rng.integers(0, 65535, (24, 40), np.uint16))
    file = io.BytesIO()
    names = {'jpg': 'JPEG', 'tif': 'TIFF'}
    suffix = kind.rpartition('.')[2]
    picture.save(file, names.get(suffix, suffix.upper()))
    return file.getvalue()


def label_map_bytes(kind: str, seed: int) -> bytes:
    """A map of labels for a picture of :func:`image_bytes`."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    picture = Image.fromarray(rng.integers(0, 150, (24 + 8 * seed, 40), np.uint8))
    if kind == 'palette.png':
        picture.putpalette(list(range(256)) * 3)
    file = io.BytesIO()
    picture.save(file, kind.rpartition('.')[2].upper())
    return file.getvalue()


def coco(seed: int) -> dict:
    """Annotations of two pictures: boxes, polygons, an encoded mask, a crowd."""
    rng = np.random.default_rng(seed)
    images = [
        {'id': i, 'file_name': f'{i}.jpg', 'height': 24 + 8 * i, 'width': 40} for i in range(2)
    ]
    annotations = []
    for i in range(5):
        x, y = (int(v) for v in rng.integers(0, 12, 2))
        polygon = [[x, y, x + 10, y, x + 10, y + 10, x, y + 10]]
        crowd = i == 4
        annotations.append(
            {
                'id': i + 1, 'image_id': i % 2, 'category_id': 1 + i % 2,
                'bbox': [x, y, 10, 10], 'area': 100.0, 'iscrowd': int(crowd),
                'segmentation': {'size': [24, 40], 'counts': [100, 200, 660]} if crowd else polygon,
            }
        )  # fmt: skip
    categories = [{'id': 1, 'name': 'a'}, {'id': 2, 'name': 'b', 'supercategory': 'c'}]
    return {'images': images, 'annotations': annotations, 'categories': categories, 'info': {}}


def text_bytes(kind: str, seed: int) -> bytes:
    """An annotation file."""
    if kind in ('coco', 'lvis_like'):
        return json.dumps(coco(seed)).encode()
    if kind == 'imagenet':
        return b'a/0.jpg 0\nb/1.jpg 1\n'
    if kind == 'list':
        return b'0.mp4 0\n1.mp4 1\n'
    if kind == 'kinetics':
        return (
            b'label,youtube_id,time_start,time_end,split\n'
            b'running,abcdefghijk,1,11,train\nwalking slowly,bcdefghijkl,20,30,train\n'
        )
    if kind == 'ssv2':
        return json.dumps(
            [
                {'id': '1', 'label': 'x', 'template': 'Moving [something]', 'placeholders': ['x']},
                {'id': '2', 'label': 'y', 'template': 'Lifting [something]', 'placeholders': []},
            ]
        ).encode()
    return json.dumps({'Moving something': '0', 'Lifting something': '1'}).encode()


_videos: dict[tuple[str, int], bytes] = {}


def video_bytes(kind: str, seed: int) -> bytes:
    """A short film."""
    from video_files import coded_frames, write_video

    key = (kind, seed)
    if key not in _videos:
        codec = {'mp4': 'libx264', 'avi': 'mpeg4', 'webm': 'libvpx'}[kind]
        path = write_video(f'film-{seed}.{kind}', coded_frames(6 + 3 * seed, 32, 32), codec=codec)
        _videos[key] = path.read_bytes()
    return _videos[key]


_models: list = []


def small_model() -> Any:
    """A backbone with a few weights."""
    import torch

    import mmvim

    if not _models:
        torch.manual_seed(0)
        arch = dict(embed_dims=8, depth=1, d_state=2)
        _models.append(mmvim.Vim(arch=arch, img_size=32, patch_size=16))
    return _models[0]


def checkpoint_bytes(kind: str, seed: int) -> bytes:
    """A checkpoint that fits :func:`small_model`."""
    import torch

    weights = dict(small_model().state_dict())
    file = io.BytesIO()
    if kind == 'safetensors':
        from safetensors.torch import save

        return save({k: v.contiguous() for k, v in weights.items()})
    content: Any = {'state_dict': weights, 'meta': {'epoch': 1, 'classes': ('a', 'b')}}
    if kind == 'training.pth':
        from mmengine.logging import HistoryBuffer

        content['message_hub'] = {'log_scalars': {'loss': HistoryBuffer([1.0], [1])}}
        content['optimizer'] = {'state': {0: {'step': 1, 'm': torch.ones(3)}}, 'param_groups': []}
        content['number'] = np.float64(1.5)
    if kind == 'official.pth':
        content = {'model': weights, 'args': Namespace(lr=0.1), 'epoch': 3}
    if kind == 'tar.pth':
        torch.save(content, file)
        tar = io.BytesIO()
        with tarfile.open(fileobj=tar, mode='w') as archive:
            info = tarfile.TarInfo('x.pth')
            info.size = file.tell()
            archive.addfile(info, io.BytesIO(file.getvalue()))
        return tar.getvalue()
    torch.save(content, file, _use_new_zipfile_serialization=kind != 'legacy.pth')
    return file.getvalue()


MAKERS: dict[str, Callable[[str, int], bytes]] = {
    'image': image_bytes,
    'label_map': label_map_bytes,
    'video': video_bytes,
    'annotations': text_bytes,
    'checkpoint': checkpoint_bytes,
}


# --- damage --------------------------------------------------------------------------------------


def damaged(data: bytes, damage: list[tuple]) -> bytes:
    """``data`` with all of ``damage``."""
    for kind, *rest in damage:
        if kind in ('leaf', 'gone'):
            data = _damaged_json(data, kind, rest)
            continue
        if kind == 'line':
            lines = data.split(b'\n')
            lines[rest[0] % len(lines)] = LINES[rest[1]]
            data = b'\n'.join(lines)
            continue
        at = min(int(rest[0] * len(data)), max(len(data) - 1, 0))
        if kind == 'flip' and data:
            data = data[:at] + bytes([data[at] ^ rest[1]]) + data[at + 1 :]
        elif kind == 'cut':
            data = data[:at]
        elif kind == 'head':
            data = data[at:]
        elif kind == 'zero':
            data = data[:at] + bytes(min(rest[1], len(data) - at)) + data[at + rest[1] :]
        elif kind == 'ones':
            data = data[:at] + b'\xff' * rest[1] + data[at + rest[1] :]
        elif kind == 'insert':
            data = data[:at] + rest[1] + data[at:]
        elif kind == 'repeat':
            data = data[: at + rest[1]] + data[at:]
        elif kind == 'number':
            for code in '<>':
                raw = struct.pack(f'{code}I', rest[1])
                if code == '<':
                    data = data[:at] + raw + data[at + 4 :]
    return data


def _damaged_json(data: bytes, kind: str, rest: list) -> bytes:
    try:
        tree = json.loads(data)
    except ValueError:
        return data
    places: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in items:
            places.append((node, key))
            if isinstance(value, dict | list):
                visit(value)

    if isinstance(tree, dict | list):
        visit(tree)
    if not places:
        return data
    owner, key = places[rest[0] % len(places)]
    if kind == 'gone':
        del owner[key]
    else:
        owner[key] = copy.deepcopy(NONSENSE[rest[1]])
    return json.dumps(tree).encode()


def bomb(group: str, name: str, kind: str) -> bytes | None:
    """A file that was made to do harm; None is a folder."""
    if name == 'folder':
        return None
    if name == 'empty':
        return b''
    if name == 'text':
        return b'certainly none of these\n' * 20
    if name == 'other_size':
        return _png(7, 5, 5)
    if group in ('image', 'label_map'):
        return _image_bomb(name)
    if group == 'video':
        return {
            'image': image_bytes('jpg', 0),
            'y4m': b'YUV4MPEG2 W1000000 H1000000 F25:1 Ip A1:1 C420\nFRAME\n',
            'playlist': b"ffconcat version 1.0\nfile '/etc/passwd'\n",
        }[name]
    if group == 'annotations':
        return {
            'deep': b'[' * 200_000,
            'binary': bytes(range(256)) * 10,
            'wide': b'{"images": [' + b'{},' * 50_000 + b'{}]}',
            'number': b'{"images": ' + b'9' * 10_000 + b'}',
            'gzip': b'\x1f\x8b\x08\x00' + bytes(100),
        }[name]
    return _checkpoint_bomb(name)


def _image_bomb(name: str) -> bytes:
    from PIL import Image

    if name == 'png':
        return _png(60_000, 60_000, 40)
    if name == 'svg':
        return b'<svg xmlns="http://www.w3.org/2000/svg" width="1000000" height="1000000"/>'
    file = io.BytesIO()
    names = {'jpg': 'JPEG', 'tif': 'TIFF'}
    Image.new('RGB', (16, 16)).save(file, names.get(name, name.upper()))
    data = bytearray(file.getvalue())
    if name == 'jpg':
        at = data.index(b'\xff\xc0')
        data[at + 5 : at + 9] = b'\xff\xff\xff\xff'
    elif name == 'gif':
        data[6:10] = b'\xff\xff\xff\xff'
    elif name == 'bmp':
        data[18:26] = struct.pack('<ii', 50_000, 50_000)
    elif name == 'tif':
        for tag in (256, 257):
            at = data.find(struct.pack('<HHI', tag, 3, 1))
            if at >= 0:
                data[at + 2 : at + 12] = struct.pack('<HII', 4, 1, 60_000)
    return bytes(data)


class _Harmful:
    """Leaves a trace when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ('pickle-was-executed',)


def _checkpoint_bomb(name: str) -> bytes:
    import torch

    if name in ('zip', 'zip64'):
        file = io.BytesIO()
        with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            with archive.open('x/data.pkl', 'w', force_zip64=name == 'zip64') as record:
                for _ in range(200):
                    record.write(bytes(2**20))
            archive.writestr('x/version', '3\n')
        return file.getvalue()
    if name == 'header':
        return struct.pack('<Q', 2**62) + b'{}'
    if name == 'safetensors_overlap':
        entry = {'dtype': 'F32', 'shape': [10**6, 10**6], 'data_offsets': [0, 4]}
        header = json.dumps({'a': entry}).encode()
        return struct.pack('<Q', len(header)) + header + bytes(4)
    if name == 'pickle':
        return pickle.dumps(_Harmful())
    weights = dict(small_model().state_dict())
    key = next(iter(weights))
    nested: list = []
    if name == 'deep':
        for _ in range(5000):
            nested = [nested]
        return pickle.dumps(nested) if sys.getrecursionlimit() > 20_000 else b'](' * 5000 + b'.'
    if name == 'cycle':
        nested.append(nested)
    content: Any = {
        'cycle': {'state_dict': nested},
        'expanded': {**weights, key: torch.zeros(1).expand(2**40)},
        'object': {'state_dict': weights, 'hook': _Harmful()},
        'list': [1, 2, 3],
        'list_of_weights': [*weights.values()],
        'strings': dict.fromkeys(weights, 'weights'),
        'nan_shape': {k: v.flatten() for k, v in weights.items()},
        'sparse': {k: v.to_sparse() for k, v in weights.items()},
        'quantized': {
            **weights,
            key: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        },
        'meta': {k: v.to('meta') for k, v in weights.items()},
        'complex': {k: v.to(torch.complex64) for k, v in weights.items()},
        'storage': {**weights, key: torch.UntypedStorage(8)},
        'alias': dict.fromkeys(weights, torch.zeros(2, 3, 4)),
    }[name]
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


# --- judgement -----------------------------------------------------------------------------------


class Refusal(Exception):
    """A tool would end with this line."""


def _explained(error: Exception, names: tuple[str, ...], cfg: dict | None = None) -> str:
    """The line that a tool shows; raises what it cannot explain."""
    from mmvim.cli.diagnosis import explain

    line = explain(error, cfg)
    if line is None:
        raise error
    if not any(name in line for name in names):
        raise AssertionError(f'the message does not name {names}: {line}') from error
    if len(line) > 2000:
        raise AssertionError(f'a message of {len(line)} characters') from error
    return line


def prepare() -> None:
    """Import all that will be used."""
    import mmvim.apis.inferencers.common  # noqa: I001  # before what it makes importable
    import mmseg.datasets  # noqa: F401
    import torchvision  # noqa: F401

    import mmvim.datasets.video  # noqa: F401
    from mmvim.cli import diagnosis, samples

    samples.install()
    diagnosis.install()
    _photos()
    for i, kind in enumerate(CHECKPOINTS):
        path = Path(f'ready.{kind}')
        path.write_bytes(checkpoint_bytes(kind, 0))
        if i < 4:
            _use_checkpoint(path, {})


def run(case: dict) -> tuple[str, str]:
    """Write the file, use it, and judge what comes out."""
    group, kind = case['group'], case['kind']
    if 'bomb' in case:
        data = bomb(group, case['bomb'], kind)
    else:
        data = damaged(MAKERS[group](kind, case['seed']), case['damage'])
    path = Path(f'file.{kind}' if group != 'annotations' else 'file')
    for old in Path().glob('file*'):
        if old.is_dir():
            old.rmdir()
        else:
            old.unlink()
    if data is None:
        path.mkdir()
    else:
        path.write_bytes(data)
    try:
        detail = globals()[f'_use_{group}'](path, case)
    except Refusal as refusal:
        return 'refused', str(refusal)
    finally:
        if Path('pickle-was-executed').exists():
            raise AssertionError('a pickle was executed')
    return 'ok', detail


def _refusable(function: Callable[[], Any], names: tuple[str, ...], cfg: dict | None = None) -> Any:
    try:
        return function()
    except Exception as error:
        line = _explained(error, names, cfg)
        raise Refusal(line) from error


def _pipeline(*steps: dict) -> Any:
    from mmengine.dataset import Compose
    from mmengine.registry import DefaultScope

    with DefaultScope.overwrite_default_scope('mmseg'):
        return Compose(list(steps))


def _use_image(path: Path, case: dict) -> str:
    from mmengine.config import Config

    from mmvim.apis.inferencers.pipeline import InferencePipeline

    if case['seed'] % 2:
        steps = [dict(type='LoadImageFromFile'), dict(type='mmseg.PackSegInputs')]
        read = InferencePipeline(Config(dict(default_scope='mmseg', test_pipeline=steps))).read
        picture, _ = _refusable(lambda: read(str(path)), (path.name,))
    else:
        backend = 'pillow' if case['seed'] else 'cv2'
        steps = _pipeline(dict(type='LoadImageFromFile', imdecode_backend=backend))
        loaded = _refusable(lambda: steps({'img_path': str(path)}), (path.name,))
        picture = loaded['img']
    assert picture.dtype == np.uint8, picture.dtype
    assert picture.ndim == 3
    assert picture.shape[2] == 3
    return str(picture.shape)


def _use_label_map(path: Path, case: dict) -> str:
    Path('photo.jpg').write_bytes(image_bytes('jpg', case['seed']))
    steps = _pipeline(
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', reduce_zero_label=True),
        dict(type='RandomCrop', crop_size=(16, 16)),
        dict(type='PackSegInputs'),
    )
    sample = {
        'img_path': 'photo.jpg', 'seg_map_path': str(path), 'seg_fields': [],
        'reduce_zero_label': True, 'label_map': None,
    }  # fmt: skip
    packed = _refusable(lambda: steps(sample), (path.name,))
    labels = packed['data_samples'].gt_sem_seg.data
    assert labels.shape == (1, *packed['inputs'].shape[1:]), labels.shape
    return str(tuple(labels.shape))


def _use_video(path: Path, case: dict) -> str:
    from mmvim.datasets.video import VideoReader

    def read() -> Any:
        with VideoReader(str(path)) as video:
            count = len(video)
            assert count >= 1
            return video.frames([0, count // 2, count - 1])

    frames = _refusable(read, (path.name,))
    assert frames.shape[:2] == (3, 3)
    return str(tuple(frames.shape))


def _use_checkpoint(path: Path, case: dict) -> str:
    from mmvim.apis import load_weights

    model = copy.deepcopy(small_model())
    report = _refusable(lambda: load_weights(model, str(path)), (path.name,))
    assert report.loaded > 0
    assert not any(p.is_meta for p in model.parameters())
    return f'{report.loaded} loaded'


def _photos() -> None:
    for i in range(2):
        for folder in ('.', 'a', 'b'):
            Path(folder).mkdir(exist_ok=True)
            photo = Path(folder) / f'{i}.jpg'
            if not photo.exists():
                photo.write_bytes(image_bytes('jpg', i))


def _films() -> None:
    folder = Path('films')
    folder.mkdir(exist_ok=True)
    names = ('0.mp4', '1.mp4', '1.webm', '2.webm')
    for name in (*names, 'abcdefghijk_000001_000011.mp4', 'bcdefghijkl_000020_000030.mp4'):
        (folder / name).touch()


def _use_annotations(path: Path, case: dict) -> str:
    kind = case['kind']
    if kind in ('coco', 'lvis_like'):
        return _use_coco(path, case)
    if kind == 'imagenet':
        _photos()
        config = dict(type='mmpretrain.CustomDataset', ann_file=str(path), data_prefix='.')
        config['metainfo'] = dict(classes=('x', 'y'))
        steps = [dict(type='mmpretrain.LoadImageFromFile'), dict(type='mmpretrain.PackInputs')]
        return _use_dataset(dict(config, pipeline=steps), (path.name, '.jpg', 'image'))
    _films()
    config = dict(type='mmvim.VideoDataset', ann_file=str(path), data_prefix='films', pipeline=[])
    config['layout'] = {'label_file': 'ssv2'}.get(kind, kind)
    if kind == 'ssv2':
        Path('labels.json').write_bytes(text_bytes('label_file', 0))
        config['label_file'] = 'labels.json'
    if kind == 'label_file':
        named = Path('names.json')
        if named.is_dir():
            named.rmdir()
        if path.is_dir():
            raise Refusal('a folder is refused before')
        named.write_bytes(path.read_bytes())
        path.write_bytes(text_bytes('ssv2', 0))
        config['label_file'] = str(named)
    return _use_dataset(config, (path.name, 'names.json', 'labels.json'))


def _use_dataset(config: dict, names: tuple[str, ...]) -> str:
    from mmengine.registry import DATASETS

    # Serializing collects all garbage, which takes longer than all the rest.
    config = dict(config, serialize_data=False)
    cfg = {'train_dataloader': {'dataset': config}}

    def use() -> int:
        dataset = DATASETS.build(copy.deepcopy(config))
        for i in range(len(dataset)):
            assert dataset[i] is not None
        return len(dataset)

    return f'{_refusable(use, (*names, "train_dataloader.dataset"), cfg)} samples'


def _use_coco(path: Path, case: dict) -> str:
    steps = [
        dict(type='mmdet.LoadImageFromFile'),
        dict(type='mmdet.LoadAnnotations', with_bbox=True, with_mask=case['kind'] == 'coco'),
        dict(type='mmdet.RandomFlip', prob=1.0),
        dict(type='mmdet.PackDetInputs'),
    ]
    config = dict(
        type='mmdet.CocoDataset', ann_file=str(path), data_prefix=dict(img='.'), pipeline=steps,
        metainfo=dict(classes=('a', 'b')), test_mode=bool(case['seed'] % 2),
    )  # fmt: skip
    return _use_dataset(config, (path.name, '.jpg', 'image'))
