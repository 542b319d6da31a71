import itertools
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmvim.layers import MambaState, resize_temporal_pos_embed
from mmvim.models import VideoMamba
from mmvim.models.streaming import StreamingVideoMamba

ARCH = {'embed_dims': 16, 'depth': 3, 'd_state': 4}
MODES = {
    'causal': {},
    'block': {'block_frames': 4},
    'lookahead': {'lookahead_frames': 4},
}


def build(mode='causal', seed=0, dtype=torch.float64, **kwargs):
    """A small model with no parameter left at 0 or 1."""
    torch.manual_seed(seed)
    default = {
        'arch': ARCH,
        'img_size': (8, 12),
        'patch_size': 4,
        'num_frames': 4,
        'max_frames': 24,
    }
    model = StreamingVideoMamba(stream_mode=mode, **{**default, **MODES[mode], **kwargs})
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model.to(dtype).eval()


def video(frames=24, batch=2, dtype=torch.float64, seed=1, height=8, width=12):
    torch.manual_seed(seed)
    return torch.randn(batch, 3, frames, height, width, dtype=dtype)


def stream(model, x, sizes, flush=False):
    """Feed ``x`` in chunks of ``sizes`` frames; returns all tokens, the last pooled, the state."""
    state = model.init_state(x.shape[0], dtype=x.dtype)
    pieces, start = [], 0
    for size in sizes:
        tokens, pooled, state = model(x[:, :, start : start + size], state=state)
        pieces.append(tokens)
        start += size
    assert start == x.shape[2]
    if flush:
        tokens, pooled, state = model.flush(state)
        pieces.append(tokens)
    return torch.cat(pieces, 1), pooled, state


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@st.composite
def chunkings(draw, total, unit=1):
    sizes = []
    while sum(sizes) < total:
        sizes.append(unit * draw(st.integers(1, (total - sum(sizes)) // unit)))
    return sizes


@pytest.mark.parametrize('cls_token', ['head', 'none'])
@pytest.mark.parametrize('tubelet', [1, 2])
@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_causal_chunks_equal_the_whole(cls_token, tubelet, data):
    model = build(cls_token=cls_token, tubelet_size=tubelet)
    x = video()
    sizes = data.draw(chunkings(24, tubelet))
    with torch.no_grad():
        whole = model.forward_tokens(x)
        tokens, pooled, state = stream(model, x, sizes)
        close(tokens, whole)
        close(pooled, model(x)[0])
    assert state.steps == state.count == 24 // tubelet


@pytest.mark.parametrize('discretization', ['foh_hold', 'tustin', 'bilinear'])
def test_causal_with_other_discretizations(discretization):
    model = build(discretization=discretization)
    with torch.no_grad():
        close(stream(model, video(), [1, 10, 2, 11])[0], model.forward_tokens(video()))


def test_causal_is_the_backbone_itself():
    """Without resizing of the position embedding, the whole video gives VideoMamba's output."""
    model = build(max_frames=None)
    plain = VideoMamba(
        ARCH, img_size=(8, 12), patch_size=4, num_frames=4, bimamba='none', out_type='raw'
    ).double()
    plain.load_state_dict(model.state_dict())
    x = video(4)
    with torch.no_grad():
        expected = plain.eval()(x)[0][:, 1:].unflatten(1, (4, 6))
        close(stream(model, x, [1, 3])[0], expected)


@pytest.mark.parametrize('cls_token', ['head', 'none'])
@settings(max_examples=6, deadline=None, derandomize=True)
@given(data=st.data())
def test_block_equals_its_offline_twin(cls_token, data):
    model = build('block', cls_token=cls_token)
    frames = data.draw(st.sampled_from([24, 22, 3]))
    x = video(frames)
    sizes = data.draw(chunkings(frames - frames % 4, 4)) if frames >= 4 else []
    sizes += [frames % 4] if frames % 4 else []
    with torch.no_grad():
        whole = model.forward_tokens(x)
        tokens, pooled, _ = stream(model, x, sizes)
        close(tokens, whole)
        close(pooled, model(x)[0])


def test_block_of_everything_is_bidirectional():
    model = build('block', block_frames=4, max_frames=None)
    plain = VideoMamba(ARCH, img_size=(8, 12), patch_size=4, num_frames=4, out_type='raw').double()
    plain.load_state_dict(model.state_dict())
    x = video(4)
    with torch.no_grad():
        close(model.forward_tokens(x).flatten(1, 2), plain.eval()(x)[0][:, 1:])


def test_block_knows_nothing_of_the_next_block():
    model = build('block')
    x, changed = video(), video()
    changed[:, :, 8:] += 1
    with torch.no_grad():
        a, b = model.forward_tokens(x), model.forward_tokens(changed)
    assert torch.equal(a[:, :8], b[:, :8])
    assert not torch.allclose(a[:, 8:], b[:, 8:])


@pytest.mark.parametrize('cls_token', ['head', 'none'])
def test_lookahead_that_reaches_the_end_is_bidirectional(cls_token):
    x = video(12)
    model = build('lookahead', lookahead_frames=12, cls_token=cls_token, max_frames=12)
    with torch.no_grad():
        whole = model.forward_tokens(x)
        tokens, pooled, state = stream(model, x, [5, 7], flush=True)
        close(tokens, whole)
        close(pooled, model(x)[0])
    assert state.pending is None


def test_lookahead_error_falls():
    x = video(24)
    errors = {}
    for frames in (0, 2, 4, 8, 16, 24):
        model = build('lookahead', lookahead_frames=frames)
        with torch.no_grad():
            tokens = stream(model, x, [1] * 24, flush=True)[0]
            errors[frames] = (tokens - model.forward_tokens(x)).abs().max().item()
    values = list(errors.values())
    print('largest error by frames of look-ahead:', errors)
    assert all(a > b for a, b in itertools.pairwise(values)), errors
    assert values[0] > 1e-2
    assert values[-1] < 1e-12


def test_lookahead_delays():
    model = build('lookahead', lookahead_frames=4)
    x = video(10)
    state, seen = model.init_state(2, dtype=x.dtype), []
    with torch.no_grad():
        for i in range(10):
            tokens, pooled, state = model(x[:, :, i : i + 1], state=state)
            seen.append(tokens.shape[1])
            assert tokens.shape[2:] == (6, 16)
            assert pooled.isfinite().all()
        assert seen == [0] * 4 + [1] * 6
        tokens, _, state = model.flush(state)
        assert tokens.shape[1] == 4
        assert model.flush(state)[0].shape[1] == 0
    assert state.count == 10


@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float32, 2e-5), (torch.bfloat16, 0.1)])
def test_lower_precision(dtype, tolerance):
    model = build(dtype=dtype)
    x = video(dtype=dtype)
    with torch.no_grad():
        tokens, pooled, state = stream(model, x, [1, 7, 3, 13])
        close(tokens, model.forward_tokens(x), tolerance)
    assert tokens.dtype == pooled.dtype == dtype
    assert all(layer.ssm.dtype == torch.float32 for layer in state.layers)
    assert all(layer.conv.dtype == dtype for layer in state.layers)


def test_under_autocast():
    model = build('block', dtype=torch.float32)
    x = video(8, dtype=torch.float32)
    with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16):
        tokens, _, _ = stream(model, x, [4, 4])
        close(tokens.float(), model.forward_tokens(x).float(), 0.1)


def test_temporal_positions_do_not_depend_on_the_chunk():
    model = build(num_frames=4, max_frames=24)
    expected = resize_temporal_pos_embed(model.temporal_pos_embedding, 24)
    close(model._temporal(0, 24), expected)
    close(model._temporal(7, 5), expected[:, 7:12])
    with pytest.raises(ValueError, match=r'frames 20 \.\. 24 go beyond max_frames=24'):
        model._temporal(20, 5)
    clamped = build(num_frames=4, max_frames=24, beyond='clamp')
    close(clamped._temporal(22, 5)[0, 2], expected[0, 23])


def test_running_mean_is_the_mean_of_what_came_out():
    model = build('lookahead')
    x = video()
    state, seen = model.init_state(2, dtype=x.dtype), []
    with torch.no_grad():
        for start in range(0, 24, 3):
            tokens, pooled, state = model(x[:, :, start : start + 3], state=state)
            seen.append(tokens)
            if sum(t.shape[1] for t in seen):
                close(pooled, torch.cat(seen, 1).mean((1, 2)))
    model = build(pool='last')
    with torch.no_grad():
        tokens, pooled, _ = stream(model, x, [10, 14])
        close(pooled, tokens[:, -1].mean(1))
        close(model(x)[0], pooled)


@pytest.mark.parametrize('mode', MODES)
def test_states_are_never_changed(mode):
    model = build(mode)
    x = video(16)
    with torch.no_grad():
        _, _, state = model(x[:, :, :8], state=model.init_state(2, dtype=x.dtype))
        copies = [t.clone() for layer in state.layers for t in layer]
        mean = state.mean.clone()
        first = model(x[:, :, 8:], state=state)[0]
        again = model(x[:, :, 8:], state=state)[0]
    assert torch.equal(first, again)
    for copy, tensor in zip(copies, [t for layer in state.layers for t in layer], strict=True):
        assert torch.equal(copy, tensor)
    assert torch.equal(mean, state.mean)


def test_shapes():
    model = build()
    state = model.init_state(5, dtype=torch.bfloat16)
    assert len(state.layers) == 3
    for layer in state.layers:
        assert isinstance(layer, MambaState)
        assert layer.conv.shape == (5, 32, 3)
        assert layer.conv.dtype == torch.bfloat16
        assert layer.ssm.shape == (5, 32, 4)
        assert layer.ssm.dtype == torch.float32
    assert model.init_state(1).layers[0].ssm.dtype == torch.float64


@pytest.mark.parametrize('mode', MODES)
def test_reorder(mode):
    model = build(mode)
    x = video(16, batch=3)
    index = torch.tensor([2, 0, 0, 1])
    with torch.no_grad():
        _, _, state = model(x[:, :, :8], state=model.init_state(3, dtype=x.dtype))
        expected = model(x[:, :, 8:], state=state)
        found = model(x[index][:, :, 8:], state=state.reorder(index))
    close(found[0], expected[0][index])
    close(found[1], expected[1][index])
    assert found[2].batch_size == 4


@pytest.mark.parametrize('mode', MODES)
def test_gradients_flow_through_states(mode):
    model = build(mode).train()
    x = video(12)
    sizes = [4, 4, 4]
    if mode == 'lookahead':  # one chunk of look-ahead to the end: the same as the whole
        model.lookahead_steps = 12
    grads = []
    for function in (
        lambda: model.forward_tokens(x),
        lambda: stream(model, x, sizes, flush=mode == 'lookahead')[0],
    ):
        model.zero_grad()
        function()[:, -1].square().sum().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name in grads[0]:
        close(grads[1][name], grads[0][name], 1e-8)


def test_detach_ends_gradients():
    model = build()
    x = video(8).requires_grad_()
    _, _, state = model(x[:, :, :4], state=model.init_state(2, dtype=x.dtype))
    tokens, _, _ = model(x[:, :, 4:], state=state.detach())
    tokens.sum().backward()
    assert x.grad[:, :, :4].eq(0).all()
    assert x.grad[:, :, 4:].ne(0).any()


def test_gradcheck_of_a_state():
    model = build(arch={'embed_dims': 4, 'depth': 1, 'd_state': 2})
    x = video(2, batch=1)
    _, _, state = model(x, state=model.init_state(1, dtype=x.dtype))

    def run(conv, ssm):
        layers = (MambaState(conv, ssm),)
        tokens, _, new = model(x, state=replace(state, layers=layers))
        return tokens, new.layers[0].conv, new.layers[0].ssm

    inputs = [t.detach().clone().requires_grad_() for t in state.layers[0]]
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({'stream_mode': 'online'}, r"stream_mode='online'.*'causal', 'block', 'lookahead'"),
        (
            {'bimamba': 'v2'},
            r"stream_mode='causal' cannot compute bimamba='v2'.*drop_backward=True",
        ),
        ({'stream_mode': 'block', 'block_frames': 4, 'bimamba': 'none'}, "needs bimamba='v2'"),
        ({'stream_mode': 'block'}, 'block_frames=None'),
        ({'block_frames': 4}, 'no other mode takes it'),
        ({'lookahead_frames': 4}, 'no other mode takes it'),
        ({'stream_mode': 'lookahead', 'lookahead_frames': 3, 'tubelet_size': 2}, 'no multiple'),
        ({'stream_mode': 'block', 'block_frames': 4, 'drop_backward': True}, 'no effect'),
        ({'pool': 'cls'}, r"pool='cls'.*sees nothing"),
        ({'pool': 'cls+avg'}, 'sees nothing'),
        ({'out_type': 'raw'}, 'out_type is no argument'),
        ({'beyond': 'wrap'}, "beyond='wrap'"),
        ({'max_frames': 0}, 'max_frames=0'),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        StreamingVideoMamba(**{'arch': ARCH, 'img_size': 8, 'patch_size': 4, **kwargs})
    with pytest.raises(TypeError, match='drop_path'):
        StreamingVideoMamba(ARCH, img_size=8, patch_size=4, drop_path=0.1)


def test_mismatches():
    model = build(tubelet_size=2)
    state = model.init_state(2, dtype=torch.float64)
    cases = [
        (video(2, batch=3), 'chunk is of 3 streams and the state of 2'),
        (video(2, dtype=torch.float32), 'chunk is torch.float32 and the state torch.float64'),
        (video(3), '3 frames, which is no positive multiple of tubelet_size=2'),
        (video(26), 'go beyond max_frames=24'),
    ]
    for x, message in cases:
        with pytest.raises(ValueError, match=message):
            model(x, state=state)
    _, _, later = model(video(2), state=state)
    with pytest.raises(ValueError, match=r'\(3, 3\) patches.*\(2, 3\)'):
        model(video(2, height=12), state=later)
    with pytest.raises(TypeError, match='must be a VideoState'):
        model(video(2), state=list(state.layers))
    with pytest.raises(ValueError, match='the state is of a model of causal, 3 layers'):
        build('block', arch={**ARCH, 'depth': 2})(video(4), state=state)
    with pytest.raises(ValueError, match='batch_size=0'):
        model.init_state(0)


def test_a_block_must_be_complete_before_the_next():
    model = build('block')
    _, _, state = model(video(6), state=model.init_state(2, dtype=torch.float64))
    with pytest.raises(ValueError, match='ended inside a block, after 6 steps of blocks of 4'):
        model(video(4), state=state)


def test_drop_backward_takes_bidirectional_weights(tmp_path):
    torch.manual_seed(0)
    both = VideoMamba(ARCH, img_size=(8, 12), patch_size=4, num_frames=4)
    model = build(drop_backward=True, bimamba='v2')
    model.load_state_dict(both.state_dict())
    close(model.layers[1].mixer.conv1d.weight, both.layers[1].mixer.conv1d.weight.double())
    assert not any('_b' in name.rpartition('mixer')[2] for name, _ in model.named_parameters())
    with pytest.raises(ValueError, match="bimamba is 'v2'"):
        build().load_state_dict(both.state_dict())


def test_same_keys_as_the_backbone():
    both = VideoMamba(ARCH, img_size=(8, 12), patch_size=4, num_frames=4)
    assert set(build('block').state_dict()) == set(both.state_dict())


def test_trains_in_a_classifier():
    from mmengine.registry import MODELS

    backbone = MODELS.build(
        dict(
            type='mmvim.StreamingVideoMamba', arch=ARCH, img_size=8, patch_size=4, num_frames=4,
            stream_mode='block', block_frames=2, with_cp=True, drop_path_rate=0.1,
        )
    ).train()  # fmt: skip
    (features,) = backbone(torch.randn(2, 3, 4, 8, 8))
    assert features.shape == (2, 16)
    features.square().sum().backward()
    unused = [n for n, p in backbone.named_parameters() if p.grad is None]
    assert not unused


def run_long(frames):
    """Stream ``frames`` frames; return the sizes of the states in bytes and a function.

    The function tells how many times longer a frame takes now than at the beginning; both are
    measured in turns, as other programs run on this machine.
    """
    model = build(
        arch={'embed_dims': 8, 'depth': 2, 'd_state': 4}, img_size=8, dtype=torch.float32,
        max_frames=8, beyond='clamp',
    )  # fmt: skip
    x = video(1, batch=1, dtype=torch.float32, width=8)
    sizes = set()
    with torch.inference_mode():
        _, _, first = model(x, state=model.init_state(1))
        state = first
        for _ in range(frames - 1):
            _, pooled, state = model(x, state=state)
            sizes.add(state.nbytes())
    assert pooled.isfinite().all()
    assert state.count == frames

    @torch.inference_mode()
    def slowdown():
        times = {'first': [], 'last': []}
        for _ in range(200):
            for name, at in (('first', first), ('last', state)):
                start = time.process_time()
                for _ in range(5):
                    model(x, state=at)
                times[name].append(time.process_time() - start)
        return sorted(times['last'])[100] / sorted(times['first'])[100]

    return sizes, slowdown


def test_the_state_keeps_its_size():
    assert len(run_long(300)[0]) == 1


@pytest.mark.slow
def test_constant_memory_and_throughput_over_10000_frames():
    import resource

    run_long(1000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sizes, slowdown = run_long(10_000)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    ratio = slowdown()
    print(f'state {sizes} bytes, peak grew {grown} KiB, time of frame 10,000 to 1: {ratio:.3f}')
    assert len(sizes) == 1
    assert grown < 2048
    assert ratio < 1.2
