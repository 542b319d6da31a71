"""8-bit weights and activations in ONNX files, by onnxruntime's own tools.

Matrix products with constant weights (and, with calibration, convolutions) are quantised, one scale
for each output channel; scans, norms and everything else stay as they are.
"""

import contextlib
import logging
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from .formats import require

MODES = ('dynamic', 'static', 'weights')


def quantize(
    path: str | Path,
    out: str | Path,
    mode: str = 'dynamic',
    *,
    images: Iterable[np.ndarray] | None = None,
    overwrite: bool = False,
) -> Path:
    """Quantise an ONNX file to 8 bits.

    Args:
        path: An ONNX file of :func:`mmvim.export.formats.export_model`.
        out: File to write.
        mode: 'dynamic': scales of activations are found while the model runs; 'static': they are
            calibrated with ``images``; 'weights': activations stay float32, and the file contains
            onnxruntime's operator ``MatMulNBits``. Defaults to 'dynamic'.
        images: Inputs of the model, float32 (batch, channels, height, width), for 'static' only.
        overwrite: Whether ``out`` may exist. Defaults to False.

    Raises:
        ValueError: An argument is invalid.
        FileExistsError: ``out`` exists.
        ImportError: onnx or onnxruntime is not installed.
    """
    out = Path(out)
    if mode not in MODES:
        raise ValueError(f'mode must be one of {MODES}, got {mode!r}')
    if (images is None) is (mode == 'static'):
        raise ValueError("images are needed for mode 'static', and for no other")
    if out.exists() and not overwrite:
        raise FileExistsError(f'{str(out)!r} exists; it is not overwritten unless you say so')
    onnx = require('onnx', 'quantising ONNX files')
    require('onnxruntime', 'quantising ONNX files')
    model = onnx.load(str(path))
    # The quantisers transpose weights and then fail on the recorded shapes.
    del model.graph.value_info[:]
    temporary = out.with_name(f'.{uuid.uuid4().hex[:8]}.onnx')
    try:
        with _quiet_root_logger():
            _WRITERS[mode](model, temporary, images)
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return out


def _dynamic(model, out, images) -> None:
    from onnx import TensorProto
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        model,
        str(out),
        op_types_to_quantize=['MatMul', 'Gemm'],
        per_channel=True,
        weight_type=QuantType.QInt8,
        # Shapes and types behind mmvim's operator cannot be inferred.
        extra_options={'MatMulConstBOnly': True, 'DefaultTensorType': TensorProto.FLOAT},
    )


def _static(model, out, images) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self._rest = iter(images)

        def get_next(self) -> dict | None:
            batch = next(self._rest, None)
            return None if batch is None else {model.graph.input[0].name: batch}

    constants = {x.name for x in model.graph.initializer}
    quantize_static(
        model,
        str(out),
        Images(),
        op_types_to_quantize=['MatMul', 'Gemm', 'Conv'],
        # The products of the scans.
        nodes_to_exclude=[
            node.name
            for node in model.graph.node
            if node.op_type == 'MatMul' and node.input[1] not in constants
        ],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def _weights(model, out, images) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(model, bits=8, block_size=32, is_symmetric=True)
    quantizer.process()
    quantizer.model.save_model_to_file(str(out))


_WRITERS = {'dynamic': _dynamic, 'static': _static, 'weights': _weights}


@contextlib.contextmanager
def _quiet_root_logger() -> Iterator[None]:
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
