"""A step of a stream in ONNX, with its states as inputs and outputs."""

import json

import numpy as np
import pytest
import torch

from mmvim.export.formats import ExportError, open_exported
from mmvim.export.streaming import export_stream, start_of_stream
from mmvim.models import StreamingVideoMamba

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxscript')
pytest.importorskip('onnxruntime')
ARCH = dict(embed_dims=16, depth=2, d_state=4)


def build(**options):
    torch.manual_seed(0)
    model = StreamingVideoMamba(ARCH, img_size=16, patch_size=8, num_frames=4, **options).eval()
    for name, parameter in model.named_parameters():
        if 'pos' in name or 'token' in name:
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    'options',
    [
        dict(stream_mode='causal', max_frames=40),
        dict(stream_mode='block', block_frames=2, beyond='clamp', discretization='tustin'),
    ],
    ids=lambda options: options['stream_mode'],
)
def test_a_stream_equals_the_model(options, tmp_path):
    model = build(**options)
    out = tmp_path / 'm.onnx'
    differences = export_stream(model, out, (1, 3, 2, 16, 16), metadata={'fps': 25})
    assert list(differences) == [tmp_path / 'm_first.onnx', out]
    assert max(differences.values()) < 1e-5
    written = onnx.load(out)
    onnx.checker.check_model(written, full_check=True)
    assert not {'Loop', 'Scan', 'If'} & {node.op_type for node in written.graph.node}
    (about,) = (json.loads(entry.value) for entry in written.metadata_props)
    assert about == {'fps': 25, 'first_chunk': False, 'chunk': [3, 2, 16, 16]}
    # A stream against the whole video.
    video = torch.randn(1, 3, 12, 16, 16)
    run, first = (open_exported(path) for path in (out, tmp_path / 'm_first.onnx'))
    states = {name: x.numpy() for name, x in start_of_stream(model, 1).items()}
    for start in range(0, 12, 2):
        chunk = {'frames': video[:, :, start : start + 2].numpy()}
        _, pooled, *rest = (first if start == 0 else run)({**chunk, **states})
        states = dict(zip(states, rest, strict=True))
    assert states['step'] == 12
    state = model.init_state(1)
    with torch.no_grad():
        _, expected, _ = model(video, state=state)
    np.testing.assert_allclose(pooled, expected.numpy(), atol=1e-5)
    with pytest.raises(FileExistsError):
        export_stream(model, out, (1, 3, 2, 16, 16))


def test_bad_requests(tmp_path):
    out = tmp_path / 'm.onnx'
    ahead = build(stream_mode='lookahead', lookahead_frames=2)
    with pytest.raises(ValueError, match="stream_mode='lookahead'"):
        export_stream(ahead, out, (1, 3, 2, 16, 16))
    model = build(stream_mode='causal')
    with pytest.raises(ValueError, match='chunk_shape must be'):
        export_stream(model, out, (3, 2, 16, 16))
    with pytest.raises(ValueError, match='must end with'):
        export_stream(model, tmp_path / 'm.ts', (1, 3, 2, 16, 16))
    with pytest.raises((ExportError, ValueError)):
        export_stream(model, out, (1, 4, 2, 16, 16))
    assert list(tmp_path.iterdir()) == []
