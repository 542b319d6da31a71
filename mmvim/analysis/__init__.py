"""Cost of a model, curves of a training run, and a look inside a model."""

from mmvim import _names

_NAMES = {
    'count': 'mmvim.analysis.flops',
    'count_config': 'mmvim.analysis.flops',
    'Run': 'mmvim.analysis.curves',
    'draw_runs': 'mmvim.analysis.curves',
    'read_run': 'mmvim.analysis.curves',
    'class_activation_map': 'mmvim.analysis.saliency',
    'effective_receptive_field': 'mmvim.analysis.saliency',
    'Scan': 'mmvim.analysis.scans',
    'hidden_attention': 'mmvim.analysis.scans',
    'record_scans': 'mmvim.analysis.scans',
    'state_norms': 'mmvim.analysis.scans',
}
__getattr__, __dir__, __all__ = _names.lazily(__name__, _NAMES)
