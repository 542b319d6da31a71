"""A stream through a CUDA graph equals the stream without."""

import pytest
import torch

from mmvim.models import GraphedStream, StreamingVideoMamba, Vim

ARCH = dict(embed_dims=16, depth=2, d_state=4)
MODES = {
    'causal': {},
    'block': dict(block_frames=2),
    'lookahead': dict(lookahead_frames=4),
}


def make(mode, **options):
    torch.manual_seed(0)
    return StreamingVideoMamba(
        ARCH, img_size=32, stream_mode=mode, max_frames=40, **MODES[mode], **options
    ).eval()


@pytest.mark.gpu
@pytest.mark.parametrize('autocast', [False, True])
@pytest.mark.parametrize('beyond', ['error', 'clamp'])
@pytest.mark.parametrize('mode', MODES)
def test_equals_the_model(mode, beyond, autocast):
    model = make(mode, beyond=beyond).cuda()
    step, graph_state = GraphedStream(model), model.init_state(2, dtype=torch.float32)
    state, kept = graph_state, []
    video = torch.randn(2, 3, 48 if beyond == 'clamp' else 40, 32, 32, device='cuda')
    with torch.no_grad(), torch.autocast('cuda', torch.bfloat16, enabled=autocast):
        for chunk in video.split(2, dim=2):
            tokens, pooled, state = model(chunk, state=state)
            found, found_pooled, graph_state = step(chunk, graph_state)
            kept.append((graph_state, [x.clone() for layer in graph_state.layers for x in layer]))
            torch.testing.assert_close(found, tokens, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found_pooled, pooled, rtol=1e-4, atol=1e-5)
            assert (graph_state.steps, graph_state.count) == (state.steps, state.count)
    assert len(step._recordings) == 1
    for old, values in kept:
        torch.testing.assert_close([x for layer in old.layers for x in layer], values)


@pytest.mark.gpu
def test_states_can_be_reordered_and_reused():
    model = make('causal').cuda()
    step = GraphedStream(model)
    chunks = torch.randn(6, 2, 3, 1, 32, 32, device='cuda')
    state = model.init_state(2)
    for chunk in chunks[:4]:
        _, _, state = step(chunk, state)
    index = torch.tensor([1, 0], device='cuda')
    twice = [step(chunks[4], state)[1] for _ in range(2)]
    torch.testing.assert_close(*twice, rtol=0, atol=0)
    swapped = step(chunks[4][index], state.reorder(index))[1]
    torch.testing.assert_close(swapped[index], twice[0])


@pytest.mark.gpu
def test_other_shapes_are_recorded_apart():
    model = make('causal').cuda()
    step, state = GraphedStream(model), model.init_state(1)
    reference = state
    for frames in (1, 1, 2, 1, 2):
        chunk = torch.randn(1, 3, frames, 32, 32, device='cuda')
        found, _, state = step(chunk, state)
        with torch.no_grad():
            expected, _, reference = model(chunk, state=reference)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len(step._recordings) == 2


@pytest.mark.gpu
def test_bad_chunks():
    model = make('block').cuda()
    step, state = GraphedStream(model), model.init_state(1)
    with pytest.raises(ValueError, match='a chunk of 4 steps is more than a block of 2'):
        step(torch.randn(1, 3, 4, 32, 32, device='cuda'), state)
    with pytest.raises(ValueError, match='the chunk is on cpu'):
        step(torch.randn(1, 3, 2, 32, 32), state)


def test_bad_models():
    with pytest.raises(ValueError, match='needs a model on a CUDA device; this is on cpu'):
        GraphedStream(make('causal'))
    with pytest.raises(TypeError, match='model must be a StreamingVideoMamba, got Vim'):
        GraphedStream(Vim(arch=ARCH, img_size=32))
