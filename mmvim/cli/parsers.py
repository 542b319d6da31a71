"""The flags of ``tools/train.py`` and ``tools/test.py``, the union of the task libraries'."""

import argparse

from mmvim.engine.tasks import TASKS

from .options import ConfigOptions

_EPILOG = (
    'Wrong configs, data and checkpoints end with one line and exit code 2; with MMVIM_DEBUG=1 in '
    'the environment the traceback is shown too.'
)


def build_train_parser() -> argparse.ArgumentParser:
    """Return the parser of ``tools/train.py``."""
    parser = argparse.ArgumentParser(
        prog='train.py', description='Train the model of a config.', epilog=_EPILOG
    )
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='PATH',
        help='continue the run of the checkpoint PATH, or, without PATH, of the last checkpoint '
        'in the work directory; if there is none, start as the config says',
    )
    parser.add_argument(
        '--amp',
        action='store_true',
        help="automatic mixed precision, in the config's optim_wrapper.dtype, else float16 "
        '(bfloat16 on a CPU)',
    )
    parser.add_argument('--no-validate', action='store_true', help='train without validation')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by batch size x processes / auto_scale_lr.base_batch_size',
    )
    parser.add_argument(
        '--no-persistent-workers',
        action='store_true',
        help='set persistent_workers=False in all dataloaders',
    )
    _add_common_arguments(parser)
    return parser


def build_test_parser() -> argparse.ArgumentParser:
    """Return the parser of ``tools/test.py``."""
    parser = argparse.ArgumentParser(
        prog='test.py', description='Test a checkpoint of the model of a config.', epilog=_EPILOG
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint: a path or an address such as https://…')
    outputs = '; '.join(f'{scope}: {task.out_help}' for scope, task in TASKS.items())
    parser.add_argument(
        '--out', metavar='PATH', help=f'write results to PATH. Predictions ({outputs}), or metrics'
    )
    parser.add_argument(
        '--out-item',
        choices=('pred', 'metrics'),
        help='what --out writes: predictions (default), or the metrics as .json, .yaml or .pkl',
    )
    parser.add_argument('--show', action='store_true', help='show painted images in a window')
    parser.add_argument(
        '--show-dir',
        metavar='DIR',
        help='write painted images into DIR (mmseg: into DIR/vis_data/vis_image)',
    )
    parser.add_argument(
        '--wait-time',
        type=float,
        default=2.0,
        metavar='SECONDS',
        help='how long --show shows an image; default: 2',
    )
    parser.add_argument(
        '--interval',
        type=int,
        default=1,
        metavar='N',
        help='paint every N-th image with --show and --show-dir; default: 1',
    )
    parser.add_argument(
        '--amp', action='store_true', help='automatic mixed precision: float16 (bfloat16 on a CPU)'
    )
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        '--ema', action='store_true', help="test the checkpoint's averaged weights"
    )
    weights.add_argument(
        '--no-ema',
        action='store_true',
        help='test the trained weights (default: what mmengine loads, which is the averaged ones '
        'of its EMAHook and the trained ones of official files)',
    )
    parser.add_argument(
        '--tta',
        action='store_true',
        help='test-time augmentation: tta_model and tta_pipeline of the config, else mirroring',
    )
    _add_common_arguments(parser)
    return parser


def _add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that ``train.py`` and ``test.py`` share."""
    parser.add_argument(
        '--work-dir',
        help='directory for logs, checkpoints and metrics; default: work_dir of the config, else '
        'work_dirs/<name of the config>',
    )
    parser.add_argument(
        '--amp-dtype',
        choices=('float16', 'bfloat16'),
        help='automatic mixed precision in this dtype (implies --amp)',
    )
    parser.add_argument(
        '--verbose',
        action='store_true',
        help='show on the terminal all that goes into the log file, such as the whole config',
    )
    parser.add_argument(
        '--no-pin-memory', action='store_true', help='set pin_memory=False in all dataloaders'
    )
    parser.add_argument(
        '--no-checks',
        action='store_true',
        help='do not check, before the run, that data paths exist and that the classes of data '
        'and model agree',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=ConfigOptions,
        default={},
        metavar='KEY=VALUE',
        help='change the config, after everything else, so these win: train_cfg.max_epochs=3 '
        'key="[a,b]" key="[(a,b),(c,d)]" custom_hooks="[dict(type=\'EMAHook\')]"; no spaces '
        'outside quotes',
    )
    parser.add_argument(
        '--launcher',
        choices=('none', 'pytorch', 'slurm', 'mpi'),
        default='none',
        help='what started the processes (none: this is the only one); default: none',
    )
    # torchrun's predecessors pass one or the other.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
