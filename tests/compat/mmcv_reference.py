"""mmcv's ops from their definitions, one number at a time.

Plain loops in float64, with no code shared with torchvision or with the package.
"""

import math

import torch
import torch.nn.functional as F


def iou(a, b, offset=0):
    """Intersection over union of two boxes (x1, y1, x2, y2)."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + offset)
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + offset)
    inter = width * height
    union = sum((c[2] - c[0] + offset) * (c[3] - c[1] + offset) for c in (a, b)) - inter
    return inter / union if union else 0.0


def nms(boxes, scores, threshold, offset=0):
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(iou(boxes[i], boxes[k], offset) <= threshold for k in kept):
            kept.append(i)
    return kept


def nms_match(boxes, scores, threshold):
    order = sorted(range(len(boxes)), key=lambda i: -scores[i])
    groups = []
    while order:
        best = order.pop(0)
        members = [i for i in order if iou(boxes[i], boxes[best]) >= threshold]
        groups.append([best, *members])
        order = [i for i in order if i not in members]
    return groups


def soft_nms(boxes, scores, threshold, sigma, min_score, method, offset=0):
    left = dict(enumerate(scores))
    selected = []
    while left:
        best = max(left, key=left.get)
        selected.append((best, left.pop(best)))
        for i in list(left):
            overlap = iou(boxes[i], boxes[best], offset)
            if method == 'gaussian':
                left[i] *= math.exp(-overlap * overlap / sigma)
            elif overlap >= threshold:
                left[i] *= 0.0 if method == 'naive' else 1 - overlap
            if left[i] < min_score:
                del left[i]
    return [i for i, _ in selected], [score for _, score in selected]


def roi_align(features, rois, size, scale, sampling_ratio, aligned):
    """Mean of bilinear samples on a regular grid in each bin."""
    height, width = features.shape[-2:]
    out = features.new_zeros(len(rois), features.size(1), *size)
    shift = 0.5 if aligned else 0.0
    for n, (image, x1, y1, x2, y2) in enumerate(rois.tolist()):
        left, top = x1 * scale - shift, y1 * scale - shift
        w, h = (x2 - x1) * scale, (y2 - y1) * scale
        if not aligned:
            w, h = max(w, 1.0), max(h, 1.0)
        bin_h, bin_w = h / size[0], w / size[1]
        grid_h = sampling_ratio or math.ceil(bin_h)
        grid_w = sampling_ratio or math.ceil(bin_w)
        for i in range(size[0]):
            for j in range(size[1]):
                total = features.new_zeros(features.size(1))
                for a in range(grid_h):
                    for b in range(grid_w):
                        y = top + (i + (a + 0.5) / grid_h) * bin_h
                        x = left + (j + (b + 0.5) / grid_w) * bin_w
                        if -1 <= y <= height and -1 <= x <= width:
                            total += _clamped_bilinear(features[int(image)], y, x)
                out[n, :, i, j] = total / max(grid_h * grid_w, 1)
    return out


def roi_pool(features, rois, size, scale):
    """Maximum of the pixels that each bin touches."""
    height, width = features.shape[-2:]
    out = features.new_zeros(len(rois), features.size(1), *size)
    for n, (image, x1, y1, x2, y2) in enumerate(rois.tolist()):
        left, top = x1 * scale, y1 * scale
        w, h = (x2 + 1) * scale - left, (y2 + 1) * scale - top
        if w <= 0 or h <= 0:
            continue
        for i in range(size[0]):
            for j in range(size[1]):
                rows = _pixels(top + i * h / size[0], top + (i + 1) * h / size[0], height)
                columns = _pixels(left + j * w / size[1], left + (j + 1) * w / size[1], width)
                pixels = [features[int(image), :, y, x] for y in rows for x in columns]
                if pixels:
                    out[n, :, i, j] = torch.stack(pixels).amax(0)
    return out


def deform_conv(
    x, offset, weight, *, mask=None, bias=None, stride, padding, dilation, groups, deform_groups
):
    """Convolution that samples its input at shifted places; differentiable."""
    batch, channels = x.shape[:2]
    kernel_h, kernel_w = weight.shape[2:]
    out_h, out_w = offset.shape[2:]
    per_group = channels // deform_groups
    offset = offset.view(batch, deform_groups, kernel_h * kernel_w, 2, out_h, out_w)
    if mask is not None:
        mask = mask.view(batch, deform_groups, kernel_h * kernel_w, out_h, out_w)
    rows = torch.arange(out_h, dtype=x.dtype)[:, None] * stride[0] - padding[0]
    columns = torch.arange(out_w, dtype=x.dtype)[None] * stride[1] - padding[1]
    sampled = []
    for g in range(deform_groups):
        image = x[:, g * per_group : (g + 1) * per_group]
        for i in range(kernel_h):
            for j in range(kernel_w):
                tap = i * kernel_w + j
                y = rows + i * dilation[0] + offset[:, g, tap, 0]
                z = columns + j * dilation[1] + offset[:, g, tap, 1]
                value = _zero_padded_bilinear(image, y, z)
                sampled.append(value if mask is None else value * mask[:, g, tap, None])
    taps = torch.stack(sampled, 2).view(batch, per_group, deform_groups, -1, out_h, out_w)
    taps = taps.transpose(1, 2).reshape(batch, groups, channels // groups, -1, out_h, out_w)
    kernel = weight.view(groups, weight.size(0) // groups, channels // groups, -1)
    out = torch.einsum('bgcthw,goct->bgohw', taps, kernel).flatten(1, 2)
    return out if bias is None else out + bias[:, None, None]


def sigmoid_focal_loss(logits, target, gamma, alpha, weight=None):
    one_hot = torch.zeros_like(logits)
    for row, label in enumerate(target.tolist()):
        if 0 <= label < logits.size(1):
            one_hot[row, label] = 1
    entropy = F.binary_cross_entropy_with_logits(logits, one_hot, reduction='none')
    miss = one_hot * (1 - logits.sigmoid()) + (1 - one_hot) * logits.sigmoid()
    loss = (alpha * one_hot + (1 - alpha) * (1 - one_hot)) * miss**gamma * entropy
    return loss if weight is None else loss * weight[target][:, None]


def softmax_focal_loss(logits, target, gamma, alpha, weight=None):
    losses = []
    for row, label in zip(logits.log_softmax(1), target.tolist(), strict=True):
        if label < 0:
            losses.append(row.sum() * 0)
            continue
        loss = -alpha * (1 - row[label].exp()) ** gamma * row[label]
        losses.append(loss if weight is None else loss * weight[label])
    return torch.stack(losses)


def deform_attention(value, shapes, locations, weights):
    batch, _, heads, depth = value.shape
    _, queries, _, levels, points, _ = locations.shape
    out = value.new_zeros(batch, queries, heads, depth)
    start = 0
    for level in range(levels):
        height, width = shapes[level].tolist()
        plane = value[:, start : start + height * width].view(batch, height, width, heads, depth)
        start += height * width
        for b in range(batch):
            for q in range(queries):
                for h in range(heads):
                    for p in range(points):
                        x, y = locations[b, q, h, level, p].tolist()
                        image = plane[b, :, :, h].permute(2, 0, 1)[None]
                        at = torch.tensor([[[y * height - 0.5]]], dtype=value.dtype)
                        to = torch.tensor([[[x * width - 0.5]]], dtype=value.dtype)
                        sample = _zero_padded_bilinear(image, at, to)[0, :, 0, 0]
                        out[b, q, h] += weights[b, q, h, level, p] * sample
    return out.flatten(2)


def _pixels(start, end, limit):
    return range(max(math.floor(start), 0), min(math.ceil(end), limit))


def _clamped_bilinear(image, y, x):
    """Value of (c, h, w) at (y, x), the border pixels continued outwards."""
    height, width = image.shape[-2:]
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
    dy, dx = y - y0, x - x0
    above = (1 - dx) * image[:, y0, x0] + dx * image[:, y0, x1]
    below = (1 - dx) * image[:, y1, x0] + dx * image[:, y1, x1]
    return (1 - dy) * above + dy * below


def _zero_padded_bilinear(image, y, x):
    """Values of (b, c, h, w) at y, x, both (b, ho, wo); zero beyond the border."""
    height, width = image.shape[-2:]
    out = 0
    for row in (y.floor(), y.floor() + 1):
        for column in (x.floor(), x.floor() + 1):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            index = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
            flat = index.long().flatten(1)[:, None].expand(-1, image.size(1), -1)
            pixel = image.flatten(2).gather(2, flat).view(*image.shape[:2], *y.shape[1:])
            share = (1 - (y - row).abs()) * (1 - (x - column).abs()) * inside
            out = out + pixel * share[:, None]
    return out
