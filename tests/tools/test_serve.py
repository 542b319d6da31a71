"""The service: good and bad uploads in one batch, and over HTTP."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

from mmvim.apis import build_model

pytest.importorskip('litserve')
ROOT = Path(__file__).parents[2]
CONFIG = ROOT / 'configs/quickstart/vim_digits_cls.py'


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp('serve') / 'x.pth'
    torch.save(build_model(Config.fromfile(CONFIG)).state_dict(), path)
    return path


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'tools')
    import serve

    return serve


def png(*size, mode='RGB', format='PNG'):
    file = io.BytesIO()
    Image.effect_noise(size, 50).convert(mode).save(file, format)
    return file.getvalue()


def test_bad_uploads_leave_their_batch_alone(serve, weights, monkeypatch):
    service = serve.Service(str(CONFIG), str(weights), max_batch_size=8)
    service.setup('cpu')
    damaged = png(32, 32)[:-40]
    monkeypatch.setattr(serve, 'MAX_PIXELS', 5000)
    uploads = [png(32, 32), b'', b'text', damaged, png(80, 80), png(32, 32, mode='LA'), png(40, 32)]
    requests = [SimpleNamespace(file=io.BytesIO(upload)) for upload in uploads]
    batch = service.batch([service.decode_request(request) for request in requests])
    answers = [service.encode_response(x) for x in service.unbatch(service.predict(batch))]
    assert [x.status_code for x in answers] == [200, 400, 400, 400, 400, 200, 200]
    bodies = [json.loads(x.body) for x in answers]
    assert [sorted(x) for x in bodies] == [
        ['error' if x.status_code == 400 else 'classes'] for x in answers
    ]
    assert 'is empty' in bodies[1]['error']
    assert 'no image of a known format' in bodies[2]['error']
    assert 'cannot be read' in bodies[3]['error']
    assert '80 x 80 pixels' in bodies[4]['error']
    # Each image has its own prediction.
    (alone,) = service.predict([batch[0]])
    assert alone['classes'] == bodies[0]['classes'] != bodies[6]['classes']


def test_pixels(serve):
    image = Image.new('RGB', (2, 3), (255, 0, 0))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    file = io.BytesIO()
    image.save(file, 'PNG', exif=exif)
    pixels = serve.decode(file.getvalue())
    assert pixels.shape == (2, 3, 3)
    np.testing.assert_array_equal(pixels, np.broadcast_to([0, 0, 255], (2, 3, 3)))


def processes_of_group(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_over_http(weights, tmp_path):
    httpx = pytest.importorskip('httpx')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    url = f'http://127.0.0.1:{port}'
    options = ('--weights', weights, '--port', port, '--device', 'cpu', '--max-upload', 1)
    command = [sys.executable, ROOT / 'tools/serve.py', CONFIG, *options]
    server = subprocess.Popen(list(map(str, command)), cwd=tmp_path, start_new_session=True)
    try:
        for _ in range(600):
            try:
                if httpx.get(f'{url}/health').status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert server.poll() is None
            time.sleep(0.2)

        def post(**files):
            answer = httpx.post(f'{url}/predict', files=files, timeout=60)
            return answer.status_code, answer.json()

        status, body = post(request=png(32, 32))
        assert (status, len(body['classes'])) == (200, 5)
        assert post(request=b'text')[0] == 400
        assert post(other=png(32, 32))[0] == 422
        assert post(request=bytes(2**21))[0] == 413
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    for _ in range(100):
        if not processes_of_group(server.pid):
            break
        time.sleep(0.1)
    assert not processes_of_group(server.pid)
