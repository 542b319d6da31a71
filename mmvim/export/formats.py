"""Model files, each checked against the model before it gets its name."""

import contextlib
import copy
import json
import os
import time
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import onnx_scan
from .operations import portable_ops

#: format: (suffix, runtime)
FORMATS = MappingProxyType(
    {
        'onnx': '.onnx',
        'torchscript': '.ts',
        'program': '.pt2',
        'aoti': '.aoti.pt2',
    }
)
DYNAMIC = ('none', 'batch', 'size')
#: Largest difference from the float32 model, relative to outputs above 1.
TOLERANCES = MappingProxyType({'float32': 1e-4, 'float16': 1e-2, 'bfloat16': 1e-1})
METADATA = 'mmvim.json'
#: Version of the ONNX operators. In 20 a model may have Gelu, which fewer runtimes know.
OPSET = 18


class ExportError(RuntimeError):
    """A model that cannot be exported in this way, or a file with different results."""


@dataclass(frozen=True)
class ExportReport:
    """Report on an exported file.

    Attributes:
        path: The file.
        format: One of :data:`FORMATS`.
        seconds: Duration of the export.
        differences: For each tested input shape, the largest absolute difference between
            the file's outputs and the model's.
    """

    path: Path
    format: str
    seconds: float
    differences: dict[tuple[int, ...], float] = field(default_factory=dict)


class Exportable(nn.Module):
    """The inference part of a model, from preprocessed images to tensors.

    A classifier returns logits (batch, classes), a segmentor the logits of its decode head (batch,
    classes, rows, columns), a detector the feature maps of its neck, a backbone its features.
    Post-processing is not included. Inputs and outputs are float32.

    Args:
        model: The model; it is put into evaluation mode without gradients.
        dtype: That of the parameters and activations; scans are float32. Defaults to float32.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False).to(dtype)
        self.dtype = dtype
        self.kind = 'plain'
        if hasattr(model, 'data_preprocessor') and hasattr(model, 'test_step'):
            is_detector = any('mmdet' in c.__module__ for c in type(model).__mro__)
            self.kind = 'features' if is_detector else 'tensor'

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Compute the outputs of preprocessed images (batch, channels, height, width)."""
        images = images.to(self.dtype)
        if self.kind == 'features':
            out = self.model.extract_feat(images)
        elif self.kind == 'tensor':
            out = self.model(images, mode='tensor')
        else:
            out = self.model(images)
        if isinstance(out, list | tuple):
            return out[0].float() if len(out) == 1 else tuple(x.float() for x in out)
        return out.float()


def export_model(
    model: nn.Module,
    out: str | Path,
    format: str,
    input_shape: Sequence[int],
    *,
    dynamic: str = 'batch',
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    tolerance: float | None = None,
    opset: int | None = None,
    dtype: str = 'float32',
    custom_ops: bool = False,
) -> ExportReport:
    """Export a model on the CPU, and compare the file's outputs with the model's.

    Args:
        model: A classifier, segmentor, detector or backbone; it is put into evaluation mode and its
            parameters no longer require gradients afterwards.
        out: File to write.
        format: 'onnx', 'torchscript', 'program' (of ``torch.export``) or 'aoti' (compiled for this
            machine by AOTInductor; needs a C++ compiler).
        input_shape: (batch, channels, [frames,] height, width) of the inputs.
        dynamic: The variable dimensions: 'none', the 'batch', or the batch and the 'size' of the
            images. 'aoti' supports only 'none'. Defaults to 'batch'.
        metadata: Stored in the file. Defaults to None.
        overwrite: Whether ``out`` may exist. Defaults to False.
        tolerance: Largest difference from the model in float32, relative to outputs above 1.
            Defaults to None: that of :data:`TOLERANCES`.
        opset: Version of the ONNX operators, 18 or later. Defaults to None: 18.
        dtype: 'float32', 'float16' or 'bfloat16', that of weights and activations; inputs, outputs
            and scans are float32. onnxruntime has no bfloat16 on a CPU. Defaults to 'float32'.
        custom_ops: Whether the file contains mmvim's compiled operators, which are as fast as in
            the model. onnxruntime finds that of an ONNX file in the library of
            :func:`mmvim.export.onnx_scan.custom_library`; programs and 'aoti' need ``import
            mmvim.ops``; 'torchscript' has none. Defaults to False.

    Raises:
        ValueError: An argument is invalid.
        FileExistsError: ``out`` exists.
        ExportError: The model cannot be exported, or the file's outputs differ; no file remains.
    """
    out = Path(out)
    if format not in FORMATS:
        raise ValueError(f'format must be one of {tuple(FORMATS)}, got {format!r}')
    if dynamic not in DYNAMIC:
        raise ValueError(f'dynamic must be one of {DYNAMIC}, got {dynamic!r}')
    if format == 'aoti' and dynamic != 'none':
        raise ValueError("format 'aoti' is compiled for one shape: dynamic must be 'none'")
    if opset is not None and (format != 'onnx' or not isinstance(opset, int) or opset < 18):
        raise ValueError(f"opset={opset!r} must be an integer from 18 on, for format 'onnx' only")
    if custom_ops and format == 'torchscript':
        raise ValueError("format 'torchscript' has no custom_ops")
    if len(input_shape) not in (4, 5) or any(side < 1 for side in input_shape):
        raise ValueError(
            'input_shape must be (batch, channels, [frames,] height, width), '
            f'got {tuple(input_shape)}'
        )
    if out.exists() and not overwrite:
        raise FileExistsError(f'{str(out)!r} exists; it is not overwritten unless you say so')
    if not out.parent.is_dir():
        raise FileNotFoundError(f'the directory {str(out.parent)!r} does not exist')
    if dtype not in TOLERANCES:
        raise ValueError(f'dtype must be one of {tuple(TOLERANCES)}, got {dtype!r}')
    tolerance = TOLERANCES[dtype] if tolerance is None else tolerance
    module = original = Exportable(model.cpu())
    if dtype != 'float32':
        module = Exportable(copy.deepcopy(original.model), getattr(torch, dtype))
    shapes = trial_shapes(input_shape, dynamic)
    # Traced at its native size, a model would not resize its position embedding.
    example = torch.rand(shapes[-1] if dynamic == 'size' else shapes[0])
    temporary = out.with_name(f'.{uuid.uuid4().hex[:8]}{FORMATS[format]}')
    start = time.perf_counter()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            chosen = {'opset': opset} if format == 'onnx' else {}
            if format != 'torchscript':
                chosen['custom_ops'] = custom_ops
            _WRITERS[format](module, example, dynamic, dict(metadata or {}), temporary, **chosen)
        seconds = time.perf_counter() - start
        differences = compare(original, open_exported(temporary), shapes)
        worst = max(differences.values())
        if not worst <= tolerance:
            raise ExportError(
                f'the exported file differs from the model by {worst:.2g}, more than '
                f'{tolerance:.2g}: {differences}'
            )
        os.replace(temporary, out)
    except (ExportError, ImportError):
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or ['']
        hint = ''
        if 'CppCompileError' in lines[0] and not custom_ops:
            hint = '; with custom_ops (--custom-ops) less code is generated, which compiles'
        raise ExportError(
            f'the model cannot be exported as {format} with dynamic={dynamic!r}: '
            f'{type(error).__name__}: {lines[0]}{hint}'
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return ExportReport(out, format, seconds, differences)


def trial_shapes(shape: Sequence[int], dynamic: str) -> list[tuple[int, ...]]:
    """The input shape, and others for which a file must also be correct."""
    batch, *middle, height, width = shape
    # A batch of one would be treated as a constant.
    batch = max(batch, 2) if dynamic != 'none' else batch
    shapes = [(batch, *middle, height, width)]
    if dynamic != 'none':
        shapes.append((batch + 1, *middle, height, width))
    if dynamic == 'size':
        # Other numbers of patches and of windows, padding included.
        shapes.append((batch, *middle, height + 32, width + 80))
        shapes.append((batch, *middle, height + 16, width + 48))
    return shapes


def compare(
    module: nn.Module, exported: Callable[[np.ndarray], list], shapes: Sequence[tuple[int, ...]]
) -> dict[tuple[int, ...], float]:
    """Largest difference between two models' outputs, relative to outputs above 1, per shape."""
    differences = {}
    generator = torch.Generator().manual_seed(0)
    for shape in shapes:
        images = torch.randn(shape, generator=generator)
        with torch.no_grad():
            expected = module(images)
        expected = [expected] if isinstance(expected, Tensor) else list(expected)
        given = exported(images.numpy())
        if [tuple(x.shape) for x in given] != [tuple(x.shape) for x in expected]:
            raise ExportError(
                f'for an input {shape} the exported file gives {[x.shape for x in given]}, the '
                f'model {[tuple(x.shape) for x in expected]}'
            )
        differences[shape] = max(
            float(np.max(np.abs(x - y.numpy()) / np.maximum(1, np.abs(y.numpy())), initial=0))
            for x, y in zip(given, expected, strict=True)
        )
    return differences


def exported_program(
    module: nn.Module, inputs: tuple[Tensor, ...], dynamic: str, kind: str = 'graph'
) -> torch.export.ExportedProgram:
    """The program of a module, with mmvim's operators in standard ones.

    Args:
        module: The module.
        inputs: Example inputs, with the batch first; of two axes or more, so that a number is none.
        dynamic: One of :data:`DYNAMIC`; 'size' concerns the last two axes of a single input.
        kind: As for :func:`mmvim.export.operations.portable_ops`, or 'mmvim' to keep our operators.
            Defaults to 'graph'.
    """
    shapes: list[dict[int, Any]] = [{} for _ in inputs]
    if dynamic != 'none':
        for x, dims in zip(inputs, shapes, strict=True):
            if x.dim() > 1:
                dims[0] = torch.export.Dim.DYNAMIC
    options = {}
    if dynamic == 'size':
        (dims,), rank = shapes, inputs[0].dim()
        dims[rank - 2] = dims[rank - 1] = torch.export.Dim.AUTO
        # The test for the native size becomes a check in the program instead of an error here.
        options['prefer_deferred_runtime_asserts_over_guards'] = True
    with contextlib.nullcontext() if kind == 'mmvim' else portable_ops(kind):
        return torch.export.export(
            module,
            inputs,
            dynamic_shapes=None if dynamic == 'none' else tuple(shapes),
            strict=False,
            **options,
        )


def _without_size_checks(program: torch.export.ExportedProgram) -> None:
    """Drop the program's checks that a size is not the native one, where resizing is exact."""
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_scalar.default:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()


def _write_onnx(
    module: nn.Module,
    example: Tensor,
    dynamic: str,
    metadata: dict,
    path: Path,
    opset: int | None,
    custom_ops: bool,
) -> None:
    write_onnx(module, {'images': example}, None, dynamic, metadata, path, opset, custom_ops)


def write_onnx(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str] | None,
    dynamic: str,
    metadata: Mapping[str, Any],
    path: Path,
    opset: int | None = None,
    custom_ops: bool = False,
) -> None:
    """Write an ONNX file, unchecked; names of inputs and outputs, the rest as for exports.

    Raises:
        ExportError: PyTorch is too old, or exports another version of the operators.
    """
    require('onnxscript', 'the ONNX exporter')
    require('onnxruntime', 'checking the exported ONNX file')
    if not hasattr(torch.onnx, 'ops'):
        raise ExportError(f'exports to ONNX need torch 2.8 or later; this is {torch.__version__}')
    examples = tuple(inputs.values())
    if custom_ops:
        onnx_scan.custom_library()
    program = exported_program(module, examples, dynamic, 'onnx_custom' if custom_ops else 'onnx')
    opset = OPSET if opset is None else opset
    with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere):
        exported = torch.onnx.export(
            program,
            examples,
            dynamo=True,
            input_names=list(inputs),
            output_names=outputs,
            verbose=False,
            opset_version=opset,
        )
    model = onnx_scan.expand(exported.model_proto)
    written = next(entry.version for entry in model.opset_import if not entry.domain)
    if opset != written:
        raise ExportError(f'PyTorch exports this model in opset {written} and not in {opset}')
    del model.metadata_props[:]
    _strip(model.graph)
    model.metadata_props.add(key=METADATA, value=json.dumps(metadata))
    path.write_bytes(model.SerializeToString())


def _strip(graph: Any) -> None:
    """Drop each node's stack trace: half of a small file, and full of local paths."""
    for thing in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del thing.metadata_props[:]
        thing.doc_string = ''
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField('g'):
                _strip(attribute.g)


def _write_torchscript(
    module: nn.Module, example: Tensor, dynamic: str, metadata: dict, path: Path
) -> None:
    with portable_ops('script'):
        traced = torch.jit.trace(module, example, check_trace=False)
    torch.jit.save(traced, str(path), _extra_files={METADATA: json.dumps(metadata)})


def _write_program(
    module: nn.Module,
    example: Tensor,
    dynamic: str,
    metadata: dict,
    path: Path,
    custom_ops: bool,
) -> None:
    program = exported_program(module, (example,), dynamic, 'mmvim' if custom_ops else 'graph')
    _without_size_checks(program)
    torch.export.save(program, str(path), extra_files={METADATA: json.dumps(metadata)})


def _write_aoti(
    module: nn.Module,
    example: Tensor,
    dynamic: str,
    metadata: dict,
    path: Path,
    custom_ops: bool,
) -> None:
    program = exported_program(module, (example,), dynamic, 'mmvim' if custom_ops else 'graph')
    torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(path),
        inductor_configs={
            'aot_inductor.metadata': {METADATA: json.dumps(metadata)},
            'freezing': True,  # packed weights: on a CPU oneDNN's products
        },
    )


_WRITERS = {
    'onnx': _write_onnx,
    'torchscript': _write_torchscript,
    'program': _write_program,
    'aoti': _write_aoti,
}


def format_of(path: str | Path) -> str:
    """The format of a file, by its suffix.

    Raises:
        ValueError: No format has this suffix.
    """
    for name in sorted(FORMATS, key=lambda name: -len(FORMATS[name])):
        if str(path).endswith(FORMATS[name]):
            return name
    raise ValueError(f'{str(path)!r} must end with one of {", ".join(FORMATS.values())}')


def open_exported(path: str | Path, threads: int | None = None) -> Callable[[np.ndarray], list]:
    """Open an exported file: a function from images (float32 array) to a list of arrays.

    That of an ONNX file with several inputs takes a dict of them.

    Args:
        path: A file of :func:`export_model`; its suffix determines the format.
        threads: Threads of onnxruntime. Defaults to None: its own choice.

    Raises:
        ValueError: The suffix is unknown.
        ImportError: onnxruntime is not installed.
    """
    kind = format_of(path)
    if kind == 'onnx':
        session = _onnx_session(path, threads)
        name = session.get_inputs()[0].name
        return lambda images: session.run(
            None, images if isinstance(images, dict) else {name: images}
        )
    if kind == 'torchscript':
        function = torch.jit.load(str(path))
    elif kind == 'program':
        function = torch.export.load(str(path)).module()
    else:
        function = torch._inductor.aoti_load_package(str(path))

    return as_function(function)


def _onnx_session(path: str | Path, threads: int | None = None) -> Any:
    onnxruntime = require('onnxruntime', 'running ONNX files')
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = threads
    # Most files need no library.
    with contextlib.suppress(RuntimeError):
        options.register_custom_ops_library(str(onnx_scan.custom_library()))
    return onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])


def as_function(module: Callable) -> Callable[[np.ndarray], list]:
    """A function from an array to a list of arrays, of a module that takes and gives tensors."""

    def run(images: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            out = module(torch.from_numpy(images))
        return [x.numpy() for x in ([out] if isinstance(out, Tensor) else out)]

    return run


def latency(function: Callable[[np.ndarray], list], images: np.ndarray, repeats: int) -> float:
    """Median milliseconds of a call, after a warm-up."""
    function(images)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function(images)
        times.append(time.perf_counter() - start)
    return 1000 * float(np.median(times))


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata of a file of :func:`export_model`.

    Raises:
        ValueError: The suffix is unknown.
        ImportError: onnxruntime is not installed.
    """
    kind = format_of(path)
    files = {METADATA: ''}
    if kind == 'onnx':
        files.update(_onnx_session(path).get_modelmeta().custom_metadata_map)
    elif kind == 'torchscript':
        torch.jit.load(str(path), _extra_files=files)
    elif kind == 'program':
        torch.export.load(str(path), extra_files=files)
    else:
        files.update(torch._inductor.aoti_load_package(str(path)).get_metadata())
    return json.loads(files[METADATA] or '{}')


def require(module: str, purpose: str) -> Any:
    """Import an optional module, or say how to install it."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} is needed for {purpose}: pip install 'mmvim[export]'", name=module
        ) from error
