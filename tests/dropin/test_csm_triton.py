"""VMamba's cross scan and cross merge, against the order of positions written out."""

import csm_triton
import pytest
import torch
from csm_triton import cross_merge_fn, cross_scan_fn

B, C, H, W = 2, 3, 2, 4
ROWS = [(i, j) for i in range(H) for j in range(W)]
COLUMNS = [(i, j) for j in range(W) for i in range(H)]
ORDERS = {
    0: [ROWS, COLUMNS, ROWS[::-1], COLUMNS[::-1]],
    1: [ROWS] * 4,
    2: [ROWS, ROWS, ROWS[::-1], ROWS[::-1]],
}
LAYOUTS = [(True, True), (True, False), (False, True), (False, False)]


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def channels(x, first, routes):
    """(b, c, h, w) or (b, 4, c, h, w) in the layout that is asked for."""
    if first:
        return x
    return x.permute(0, 3, 4, 1, 2) if routes else x.permute(0, 2, 3, 1)


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('one_by_one', [False, True])
@pytest.mark.parametrize('scans', ORDERS)
def test_scan(layout, one_by_one, scans):
    into, out = layout
    x = draw(B, 4, C, H, W) if one_by_one else draw(B, C, H, W)
    x.requires_grad_()
    want = torch.stack(
        [
            torch.stack([(x[:, k] if one_by_one else x)[..., i, j] for i, j in order], -1)
            for k, order in enumerate(ORDERS[scans])
        ],
        1,
    )
    want = want if out else want.permute(0, 3, 1, 2)
    given = channels(x, into, one_by_one)
    got = cross_scan_fn(given, into, out, one_by_one, scans, force_torch=True)
    assert got.is_contiguous()
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    weight = draw(*want.shape)
    one, two = (torch.autograd.grad((t * weight).sum(), x) for t in (got, want))
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('one_by_one', [False, True])
@pytest.mark.parametrize('scans', ORDERS)
def test_merge(layout, one_by_one, scans):
    into, out = layout
    y = draw(B, 4, C, H * W).requires_grad_()
    maps = []
    for k, order in enumerate(ORDERS[scans]):
        steps = [order.index(position) for position in ROWS]
        maps.append(y[:, k][..., steps])
    want = torch.stack(maps, 1) if one_by_one else sum(maps)
    if not into:
        want = want.permute(0, 3, 1, 2) if one_by_one else want.transpose(1, 2)
    given = channels(y.view(B, 4, C, H, W), out, True)
    got = cross_merge_fn(given, into, out, one_by_one, scans=scans)
    assert got.is_contiguous()
    torch.testing.assert_close(got, want)
    weight = draw(*want.shape)
    one, two = (torch.autograd.grad((t * weight).sum(), y) for t in (got, want))
    torch.testing.assert_close(one, two)


def test_classes_of_all_releases():
    x, four = draw(B, C, H, W), draw(B, 4, C, H, W)
    xs, merged = cross_scan_fn(x), cross_merge_fn(four)
    each = cross_scan_fn(four, one_by_one=True)
    last = x.permute(0, 2, 3, 1)
    for got, want in (
        (csm_triton.CrossScanTriton.apply(x), xs),
        (csm_triton.CrossScanTritonF.apply(last, False), xs),
        (csm_triton.CrossScanF.apply(last, False, False, False, 0), xs.permute(0, 3, 1, 2)),
        (csm_triton.CrossMergeTriton.apply(four), merged),
        (csm_triton.CrossMergeTritonF.apply(four, False), merged.transpose(1, 2)),
        (csm_triton.CrossScanTriton1b1.apply(four), each),
        (csm_triton.CrossScanTriton1b1F.apply(four.permute(0, 3, 4, 1, 2), False), each),
    ):
        torch.testing.assert_close(got, want)
    for mode in ORDERS:
        scan, merge = csm_triton.getCSM(mode)
        torch.testing.assert_close(scan.apply(x), cross_scan_fn(x, scans=mode))
        torch.testing.assert_close(merge.apply(four), cross_merge_fn(four, scans=mode))


def test_compiled():
    def both(x):
        return cross_merge_fn(cross_scan_fn(x).view(B, 4, C, H, W))

    x = draw(B, C, H, W)
    compiled = torch.compile(both, backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(compiled(x), 4 * x.flatten(2))
    torch.testing.assert_close(both(x), 4 * x.flatten(2))


def test_bad_arguments_are_named():
    x, y = draw(B, C, H, W), draw(B, 4, C, H, W)
    for call, message in (
        (lambda: cross_scan_fn(x, scans=3), 'scans=3 is unknown; allowed: 0, 1, 2'),
        (lambda: cross_scan_fn(x, 'first'), 'in_channel_first must be True or False'),
        (lambda: cross_scan_fn(x, one_by_one=True), r'x must have the axes \(b, 4, c, h, w\)'),
        (lambda: cross_scan_fn(y), r'x must have the axes \(b, c, h, w\)'),
        (lambda: cross_merge_fn(y.flatten(3)), r'y must have the axes \(b, 4, c, h, w\)'),
        (lambda: cross_merge_fn(y[:, :2]), 'y must have 4 routes'),
        (lambda: csm_triton.getCSM(5), 'mode=5 is unknown'),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            call()
    with pytest.raises(NotImplementedError, match='triton_cross_scan is not among'):
        csm_triton.triton_cross_scan(x)
