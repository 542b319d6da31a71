"""A volume along its three axes, in both directions, as two maps of the documentation's example."""

import torch

from mmvim import ops

# The axes of (frames, height, width) from the slowest to the fastest.
ORDERS = {'width': (0, 1, 2), 'height': (2, 0, 1), 'time': (1, 2, 0)}


def test_equals_scans_of_permuted_positions():
    torch.manual_seed(0)
    shape, d, n = (3, 2, 4), 3, 2
    x = torch.randn(2, *shape, d, dtype=torch.float64)
    delta = torch.rand(2, *shape, 6, d, dtype=torch.float64)
    B, C = torch.randn(2, 2, *shape, 6, n, dtype=torch.float64)
    A = -torch.rand(6, d, n, dtype=torch.float64)
    tensors = (x, delta, B, C)
    planes, lines = (
        [v.flatten(*axes) if v is x else v[..., part, :].flatten(*axes) for v in tensors]
        for axes, part in (((1, 2), slice(4)), ((2, 3), slice(4, None)))
    )
    routes = ('rows', 'rows_reversed', 'columns', 'columns_reversed')
    given = ops.cross_scan(planes[0], planes[1], A[:4], *planes[2:], routes=routes).view_as(x)
    given = given + ops.cross_scan(
        lines[0], lines[1], A[4:], *lines[2:], routes=routes[2:]
    ).view_as(x)
    expected = torch.zeros_like(x).flatten(1, 3)
    places = torch.arange(x[0, ..., 0].numel()).view(shape)
    for i, axes in enumerate(ORDERS.values()):
        for backwards in (False, True):
            route = places.permute(axes).flatten()
            route = route.flip(0) if backwards else route
            k = 2 * i + backwards
            u, *others = (v.flatten(1, 3)[:, route] for v in tensors)
            step, b, c = (v[:, :, k] for v in others)
            y = ops.selective_scan(u, step, A[k], b, c)
            expected[:, route] += y
    torch.testing.assert_close(given.flatten(1, 3), expected)
