"""Cases for the ops: described by plain data, run against the references in float64.

An op must give what the reference gives, or refuse the arguments with a ValueError or TypeError
that names one of them.
"""

import inspect
import re
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

import mmvim.ops as ops
from mmvim.ops import reference

DTYPES = {
    'float32': torch.float32,
    'float64': torch.float64,
    'bfloat16': torch.bfloat16,
    'float16': torch.float16,
}
TOLERANCE = {
    torch.float64: 1e-8,
    torch.float32: 3e-4,
    torch.bfloat16: 4e-2,
    torch.float16: 1e-2,
}
LAYOUTS = ('plain', 'plain', 'transposed', 'sliced', 'offset', 'expanded', 'channels')
OTHER_DTYPES = (
    'float32', 'float64', 'bfloat16', 'float16', 'int64', 'int8', 'uint8', 'bool', 'complex64',
    'float8_e4m3fn',
)  # fmt: skip

#: The tensors of each op with their axes; '?' marks what may be left out.
SCAN = {
    'u': 'bld', 'delta': 'bld', 'A': 'dn', 'B': 'blgn', 'C': 'blgn', 'D': 'd?', 'z': 'bld?',
    'delta_bias': 'd?', 'initial_state': 'bdn?',
}  # fmt: skip
ONE_WAY = {k: SCAN[k] for k in ('u', 'delta', 'A', 'B', 'C', 'D', 'delta_bias')}
TENSORS = {
    'selective_scan': SCAN,
    'bidirectional_scan': {
        **{f'{k}_f': v for k, v in ONE_WAY.items()},
        **{f'{k}_b': v for k, v in ONE_WAY.items()},
        'z': 'bld?',
    },
    'cross_scan': {
        'x': 'bhld', 'delta': 'bhlkd', 'A': 'kdn', 'B': 'bhlkn', 'C': 'bhlkn', 'D': 'kd?',
        'delta_bias': 'kd?',
    },
    'causal_conv1d': {'x': 'bld', 'weight': 'dw', 'bias': 'd?', 'initial_state': 'bdr?'},
    'bidirectional_conv1d': {
        'x': 'bld', 'weight_f': 'dw', 'bias_f': 'd?', 'weight_b': 'dw', 'bias_b': 'd?',
    },
    'add_rms_norm': {'x': 'bld', 'weight': 'd', 'residual': 'bld?'},
    'selective_scan_fn': {
        'u': 'bdl', 'delta': 'bdl', 'A': 'dn', 'B': 'bgnl', 'C': 'bgnl', 'D': 'd?', 'z': 'bdl?',
        'delta_bias': 'd?',
    },
    'causal_conv1d_fn': {'x': 'bdl', 'weight': 'dw', 'bias': 'd?', 'initial_states': 'bdr?'},
    'causal_conv1d_update': {
        'x': 'bdl', 'conv_state': 'bds', 'weight': 'dw', 'bias': 'd?', 'cache_seqlens': 'b?',
        'conv_state_indices': 'b?',
    },
    'SelectiveScanCuda': {
        'u': 'bld', 'delta': 'bld', 'A': 'dn', 'B_ssm': 'bln', 'C_ssm': 'bln', 'D_ssm': 'd',
        'h_prev': 'bdn?',
    },
}  # fmt: skip
OPTIONS = {
    'selective_scan': {
        'delta_softplus': (True, False),
        'reverse': (False, True),
        'return_last_state': (True, False),
        'discretization': ops.DISCRETIZATIONS,
        'backend': (None, 'torch', 'compiled'),
    },
    'bidirectional_scan': {
        'delta_softplus': (True, False),
        'scale': (1.0, 0.5),
        'discretization': ops.DISCRETIZATIONS,
        'backend': (None, 'torch', 'compiled'),
    },
    'cross_scan': {
        'delta_softplus': (True, False),
        'discretization': ops.DISCRETIZATIONS,
        'backend': (None, 'torch', 'compiled'),
    },
    'causal_conv1d': {
        'activation': (None, 'silu'),
        'mode': ('causal', 'reverse', 'same'),
        'return_last_state': (False, True),
        'backend': (None, 'torch', 'compiled'),
    },
    'bidirectional_conv1d': {
        'activation': (None, 'silu'),
        'backend': (None, 'torch', 'compiled'),
    },
    'add_rms_norm': {
        'eps': (1e-5, 0.1),
        'residual_in_fp32': (True, False),
        'backend': (None, 'torch', 'compiled'),
    },
    'selective_scan_fn': {'delta_softplus': (True, False), 'return_last_state': (False, True)},
    'causal_conv1d_fn': {
        'activation': (None, 'silu', 'swish'),
        'return_final_states': (False, True),
    },
    'causal_conv1d_update': {'activation': (None, 'silu', 'swish')},
    'SelectiveScanCuda': {},
}
PARAMETERS = ('A', 'D', 'delta_bias', 'weight', 'bias', 'initial_state', 'h_prev')
NONSENSE = (None, 0, -1, 2.5, 'no', '', [], (1, 2), float('nan'), float('inf'), True, 10**30)

_sizes = st.fixed_dictionaries(
    {
        'b': st.sampled_from((1, 2, 0, 3)),
        'l': st.sampled_from((5, 1, 0, 2, 17, 33)),
        'd': st.sampled_from((4, 1, 6, 16, 0, 33)),
        'n': st.sampled_from((3, 1, 16, 8, 0)),
        'g': st.sampled_from((1, 2, 3)),
        'w': st.sampled_from((4, 2, 3)),
        's': st.sampled_from((3, 5)),
    }
)


def _damage(names: tuple[str, ...]) -> st.SearchStrategy:
    """One change of one tensor."""
    change = st.one_of(
        st.tuples(st.just('grow'), st.integers(0, 4), st.sampled_from((1, -1, 2, 250))),
        st.tuples(st.just('size'), st.integers(0, 4), st.sampled_from((0, 1))),
        st.tuples(st.just('huge'), st.integers(0, 4), st.sampled_from((2**31, 2**33, 2**40))),
        st.tuples(st.just('squeeze'), st.integers(0, 4)),
        st.tuples(st.just('unsqueeze'), st.integers(0, 4)),
        st.tuples(st.just('dtype'), st.sampled_from(OTHER_DTYPES)),
        st.tuples(st.just('meta')),
        st.tuples(st.just('sparse')),
        st.tuples(st.just('nested')),
        st.tuples(st.just('numpy')),
        st.tuples(st.just('value'), st.sampled_from(NONSENSE)),
        st.tuples(st.just('fill'), st.sampled_from((0.0, 1.0, float('nan'), float('inf'), 1e30))),
        st.tuples(st.just('negate')),
    )
    return st.tuples(st.sampled_from(names), change)


@st.composite
def cases(draw: Any, op: str) -> dict:
    """A call of ``op``: right as it is, or with one or two things wrong."""
    names = tuple(TENSORS[op])
    case = {
        'op': op,
        'sizes': draw(_sizes),
        'dtype': draw(st.sampled_from(tuple(DTYPES))),
        'grouped': draw(st.booleans()),
        'layouts': draw(st.lists(st.sampled_from(LAYOUTS), min_size=3, max_size=3)),
        'absent': draw(st.sets(st.sampled_from(names), max_size=3)),
        'options': {k: draw(st.sampled_from(v)) for k, v in OPTIONS[op].items()},
        'gradient': draw(st.booleans()),
        'autocast': draw(st.sampled_from((False, False, False, True))),
        'meta': draw(st.sampled_from((False, False, False, False, True))),
        'damage': draw(st.lists(_damage(names), max_size=2)),
        'seed': draw(st.integers(0, 99)),
    }
    if OPTIONS[op] and draw(st.sampled_from((False, False, False, True))):
        option = draw(st.sampled_from(tuple(OPTIONS[op])))
        case['options'][option] = draw(st.sampled_from(NONSENSE))
        case['nonsense'] = option
    return case


def _laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values, otherwise in memory."""
    if x.dim() == 0 or layout == 'plain':
        return x
    if layout == 'transposed':
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == 'channels' and x.dim() > 2:
        return x.transpose(1, -1).contiguous().transpose(1, -1)
    if layout == 'sliced':
        wide = torch.stack((x, torch.zeros_like(x)), -1).flatten(-2)
        return wide[..., ::2]
    if layout == 'offset':
        flat = torch.cat((x.new_zeros(1), x.reshape(-1)))[1:]
        return flat.view(x.shape)
    if layout == 'expanded' and x.shape[0] > 0:
        return x[:1].expand(x.shape)
    return x


def _tensor(name: str, axes: str, case: dict, generator: torch.Generator, layout: str) -> Tensor:
    sizes = dict(case['sizes'])
    sizes |= {'r': sizes['w'] - 1, 'h': sizes['g'], 'k': len(ops.ROUTES)}
    if not case['grouped']:
        axes = axes.replace('g', '')
    shape = tuple(sizes[axis] for axis in axes.rstrip('?'))
    if name in ('cache_seqlens', 'conv_state_indices'):
        return torch.randperm(shape[0], generator=generator)
    bare = name.removesuffix('_f').removesuffix('_b').removesuffix('_ssm')
    dtype = DTYPES[case['dtype']]
    if bare in PARAMETERS or (bare.startswith('initial') and case['seed'] % 2):
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if bare == 'A':
        x = -torch.exp(0.5 * x)
    if bare in ('delta', 'delta_bias') and not case['options'].get('delta_softplus'):
        # Steps into the past would let the state grow without bounds.
        x = 0.1 + 0.3 * x.abs()
    return _laid_out(x.to(dtype), layout)


def _damaged(x: Any, change: tuple) -> Any:
    kind, *rest = change
    if kind == 'value':
        return rest[0]
    if not isinstance(x, Tensor):
        return x
    if x.numel() > 10**6 and kind not in ('meta', 'squeeze', 'unsqueeze'):
        return x  # enlarged already, without memory of its own: this would take it
    if kind == 'numpy':
        return np.zeros(tuple(x.shape), np.float32)
    if kind == 'dtype':
        return x.to(getattr(torch, rest[0]))
    if kind == 'meta':
        return x.to('meta')
    if kind == 'sparse':
        return x.to_sparse()
    if kind == 'nested':
        return torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(1, 3)])
    if kind == 'fill':
        return torch.full_like(x, rest[0]) if x.is_floating_point() else x
    if kind == 'negate':
        return -x if x.is_floating_point() else x
    if kind == 'unsqueeze':
        return x.unsqueeze(rest[0] % (x.dim() + 1))
    if x.dim() == 0:
        return x
    axis = rest[0] % x.dim()
    if kind == 'squeeze':
        return x.select(axis, 0) if x.shape[axis] else x
    size = x.shape[axis] + rest[1] if kind == 'grow' else rest[1]
    shape = list(x.shape)
    shape[axis] = max(size, 0)
    if kind == 'huge':
        if any(s == 0 for i, s in enumerate(shape) if i != axis):
            return x.new_empty(shape)
        return x.select(axis, 0).unsqueeze(axis).expand(shape) if x.shape[axis] else x
    return (
        torch.linspace(-1, -0.1, max(1, int(np.prod(shape))))
        .to(x.dtype)[: int(np.prod(shape))]
        .view(shape)
    )


def build(case: dict) -> dict[str, Any]:
    """The tensors of a case, by name."""
    generator = torch.Generator().manual_seed(case['seed'])
    given = {}
    for i, (name, axes) in enumerate(TENSORS[case['op']].items()):
        if axes.endswith('?') and name in case['absent']:
            given[name] = None
            continue
        layout = case['layouts'][i % 3]
        given[name] = _tensor(name, axes, case, generator, layout)
    if case['meta']:
        given = {k: None if v is None else v.to('meta') for k, v in given.items()}
    for name, change in case['damage']:
        try:
            given[name] = _damaged(given[name], change)
        except (RuntimeError, NotImplementedError, TypeError):
            continue  # torch does not make such a tensor either
    if case['gradient']:
        for name, x in given.items():
            if isinstance(x, Tensor) and x.is_floating_point() and x.layout == torch.strided:
                given[name] = x.detach().requires_grad_()
    return given


def call(op: str, given: dict[str, Any], options: dict[str, Any]) -> Any:
    """The op's result."""
    if op == 'bidirectional_scan':
        one, two = (ops.ScanInputs(*(given[f'{name}_{side}'] for name in ONE_WAY)) for side in 'fb')
        return ops.bidirectional_scan(one, two, given['z'], **options)
    if op == 'causal_conv1d_update':
        # The state is overwritten.
        state = given['conv_state']
        given = {**given, 'conv_state': state.clone() if isinstance(state, Tensor) else state}
        return ops.causal_conv1d_update(**given, **options)
    if op == 'SelectiveScanCuda':
        return ops.SelectiveScanCuda().forward_with_state(**given)
    return getattr(ops, op)(**given, **options)


def expected(op: str, given: dict[str, Any], options: dict[str, Any]) -> tuple:
    """The results of the references, in float64."""
    given = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in given.items()
    }
    options = {k: v for k, v in options.items() if k != 'backend'}
    states = bool(options.pop('return_last_state', options.pop('return_final_states', False)))
    if op == 'selective_scan':
        return reference.selective_scan(**given, **options)[: 1 + states]
    if op == 'bidirectional_scan':
        directions = ([given[f'{k}_{side}'] for k in ONE_WAY] for side in 'fb')
        return (reference.bidirectional_scan(*directions, given['z'], **options),)
    if op == 'cross_scan':
        return (reference.cross_scan(**given, **options),)
    if op == 'causal_conv1d':
        return reference.causal_conv1d(**given, **options)[: 1 + states]
    if op == 'bidirectional_conv1d':
        return reference.bidirectional_conv1d(**given, **options)
    if op == 'add_rms_norm':
        return reference.add_rms_norm(**given, eps=float(options['eps']))
    if op == 'selective_scan_fn':
        last = {'u': -1, 'delta': -1, 'z': -1, 'B': -1, 'C': -1}
        moved = {
            k: v.movedim(-1, 1) if k in last and v is not None and v.dim() > 2 else v
            for k, v in given.items()
        }
        b, length = moved['u'].shape[:2]
        for name in ('B', 'C'):
            if moved[name].dim() == 2:
                moved[name] = moved[name].expand(b, length, *moved[name].shape)
            elif moved[name].dim() == 3:
                moved[name] = moved[name].unsqueeze(2)
        groups = max(moved['B'].shape[2], moved['C'].shape[2])
        for name in ('B', 'C'):
            moved[name] = moved[name].repeat_interleave(groups // moved[name].shape[2], 2)
        y, state = reference.selective_scan(**moved, **options)
        return (y.movedim(1, -1), state)[: 1 + states]
    if op == 'SelectiveScanCuda':
        names = ('u', 'delta', 'A', 'B_ssm', 'C_ssm', 'D_ssm')
        return reference.selective_scan(
            *(given[name] for name in names), initial_state=given['h_prev']
        )
    activation = 'silu' if options['activation'] else None
    if op == 'causal_conv1d_fn':
        y, state = reference.causal_conv1d(
            given['x'].movedim(-1, 1),
            given['weight'],
            given['bias'],
            given['initial_states'],
            activation=activation,
        )
        return (y.movedim(1, -1), state)[: 1 + states]
    x, state = given['x'], given['conv_state']
    squeezed = x.dim() == 2
    x = x.unsqueeze(-1) if squeezed else x
    reach = given['weight'].shape[1] - 1
    if given['conv_state_indices'] is not None:
        state = state[given['conv_state_indices'].long()]
    if given['cache_seqlens'] is not None:
        start = given['cache_seqlens'].long().view(-1, 1, 1)
        ring = ((start + torch.arange(-reach, 0)) % state.shape[2]).expand(-1, state.shape[1], -1)
        state = state.gather(2, ring)
    y, _ = reference.causal_conv1d(
        x.movedim(-1, 1),
        given['weight'],
        given['bias'],
        state[..., state.shape[2] - reach :],
        activation=activation,
    )
    y = y.movedim(1, -1)
    return (y.squeeze(-1) if squeezed else y,)


def _tuple(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _names(op: str) -> set[str]:
    names = {*TENSORS[op], *OPTIONS[op]}
    if op == 'bidirectional_scan':
        names |= {*ONE_WAY, 'forward', 'backward'}
    return names


def _is_extreme(case: dict) -> bool:
    """Whether the values given are beyond what a finite result can be asked for."""
    changes = [change for _, change in case['damage']]
    return any(c[0] in ('fill', 'negate', 'dtype', 'value') for c in changes) or any(
        isinstance(v, float) and not abs(v) < 10 for v in case['options'].values()
    )


def run(case: dict) -> tuple[str, str]:
    """Make the call and judge what comes out."""
    op, options = case['op'], case['options']
    given = build(case)
    try:
        with torch.autocast('cpu', torch.bfloat16, enabled=case['autocast']):
            results = _tuple(call(op, given, options))
    except (TypeError, ValueError) as error:
        text = str(error)
        if not any(re.search(rf'\b{re.escape(name)}\b', text) for name in _names(op)):
            raise AssertionError(f'the message names no argument: {text}') from error
        if len(text) > 1000 or '\n' in text:
            raise AssertionError(f'not one line: {text}') from error
        if not case['damage'] and 'nonsense' not in case and not _explains(case, text):
            raise AssertionError(f'a right call was refused: {text}') from error
        return 'refused', text
    except (RuntimeError, MemoryError) as error:
        if str(error).startswith("backend 'compiled'"):
            return 'refused', str(error)
        # What does not fit into memory is torch's to say.
        if re.search(r"can't allocate memory|out of memory|[Ss]torage size|numel", str(error)):
            return 'refused', 'memory'
        raise
    _judge(case, given, results)
    return 'ok', str(tuple(results[0].shape))


def _explains(case: dict, text: str) -> bool:
    """Whether sizes or options that were drawn cannot go together, as the message says."""
    sizes, options = case['sizes'], case['options']
    return (
        ('1 to 256 states' in text and sizes['n'] == 0)
        or ('number of groups' in text and case['grouped'] and sizes['d'] % sizes['g'] > 0)
        or ("mode 'same' has no states" in text and options.get('mode') == 'same')
        or ('last axis of at least 1' in text and sizes['d'] == 0)
        or ('at least w-1' in text and sizes['s'] < sizes['w'] - 1)
    )


def _judge(case: dict, given: dict[str, Any], results: tuple[Tensor, ...]) -> None:
    op = case['op']
    main = given['u_f' if op == 'bidirectional_scan' else 'u' if 'u' in given else 'x']
    assert results[0].shape == main.shape, (results[0].shape, main.shape)
    cast = case['autocast'] and main.dtype != torch.float64
    if any(isinstance(x, Tensor) and x.is_meta for x in given.values()):
        assert results[0].is_meta
        return
    if not main.numel() or any(isinstance(x, Tensor) and x.numel() > 10**6 for x in given.values()):
        return
    truth = expected(op, given, case['options'])
    assert len(truth) == len(results)
    extreme = _is_extreme(case)
    dtype = torch.bfloat16 if cast else main.dtype
    for value, right in zip(results, truth, strict=True):
        assert value.shape == right.shape, (value.shape, right.shape)
        if not extreme:
            _close(value, right, TOLERANCE[dtype], 'result')
    if case['gradient'] and not extreme:
        _judge_gradients(case, given, results, truth, dtype)


def _close(value: Tensor, right: Tensor, tolerance: float, what: str) -> None:
    if not right.numel():
        return
    value, right = value.detach().double(), right.detach().double()
    assert bool(torch.isfinite(value).all()), f'{what} is not finite'
    error = (value - right).abs().max().item()
    scale = max(right.abs().max().item(), 1.0)
    assert error <= tolerance * scale, f'{what}: error {error:.3g} at scale {scale:.3g}'


def _judge_gradients(case: dict, given: dict, results: tuple, truth: tuple, dtype: Any) -> None:
    names = [k for k, v in given.items() if isinstance(v, Tensor) and v.requires_grad]
    pairs = [
        (a, b) for a, b in zip(results, truth, strict=True) if a.requires_grad and b.requires_grad
    ]
    if not pairs or not names:
        return
    inputs = [given[name] for name in names]
    got = torch.autograd.grad([a.double().sum() for a, _ in pairs], inputs, allow_unused=True)
    wanted = torch.autograd.grad([b.sum() for _, b in pairs], inputs, allow_unused=True)
    for name, a, b in zip(names, got, wanted, strict=True):
        if a is None or b is None:
            assert a is None or not bool(a.any()), name
            if b is not None and name != 'conv_state':
                assert not bool(b.any()), f'no gradient of {name}'
            continue
        assert a.shape == given[name].shape
        assert a.dtype == given[name].dtype
        _close(a, b, 5 * TOLERANCE[dtype], f'gradient of {name}')


assert set(TENSORS) == {
    name
    for name in ops.__all__
    if (callable(getattr(ops, name)) and 'Tensor' in str(inspect.signature(getattr(ops, name))))
    or name == 'SelectiveScanCuda'
} - {'ScanInputs'}, 'every public op is fuzzed'
