"""Distributed runs: what the launcher gives, and gloo instead of NCCL without a GPU."""

import atexit
import datetime
import gc
import os
import subprocess

import torch

# Its functions keep the default group that exists when DDP imports it, forever.
import torch.distributed.nn.functional
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device

from mmvim._configs import type_name
from mmvim.errors import UserError

# Each launcher's variables: rank, number of processes, rank on the machine.
_ENVIRONMENT = {
    'pytorch': ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'),
    'slurm': ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID'),
    'mpi': ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK'),
}
_STARTERS = {
    'pytorch': 'torchrun (tools/dist_train.sh, tools/dist_test.sh)',
    'slurm': 'srun (tools/slurm_train.sh, tools/slurm_test.sh)',
    'mpi': 'mpirun',
}


def prepare(cfg: Config, launcher: str, notes: list[str]) -> None:
    """Check the launcher's environment; on a CPU also start the process group.

    mmengine's own start of a process group needs a CUDA device. On a machine with none, the group
    is started here, with gloo where the config says NCCL, and the config is adapted: the wrapper of
    the model gets no device, and SyncBN becomes BN.

    Args:
        cfg: The config, changed in place.
        launcher: ``'none'``, ``'pytorch'``, ``'slurm'`` or ``'mpi'``.
        notes: Receives a line for the log for each change.

    Raises:
        UserError: The environment is not the launcher's, or there are more processes than GPUs.
    """
    if launcher == 'none':
        return
    names = _ENVIRONMENT[launcher]
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise UserError(
            f'--launcher {launcher} expects the environment of {_STARTERS[launcher]}, '
            f'in which {missing[0]} is set'
        )
    rank, world_size, local_rank = (int(os.environ[name]) for name in names)
    cfg.env_cfg = cfg.get('env_cfg') or ConfigDict()
    settings = cfg.env_cfg.setdefault('dist_cfg', ConfigDict(backend='nccl'))
    _choose_port(launcher, settings)
    if torch.cuda.is_available():
        _check_gpus(launcher, local_rank, torch.cuda.device_count())
        if cfg.get('model_wrapper_cfg'):
            _complete_wrapper(cfg)
        return
    if get_device() != 'cpu':
        return
    if settings.get('backend', 'nccl') == 'nccl':
        settings['backend'] = 'gloo'
        notes.append('There is no GPU: the distributed backend is gloo instead of nccl.')
    if _complete_wrapper(cfg):
        cfg.model_wrapper_cfg['device_ids'] = None
    _fit_strategy(cfg)
    if _replace_sync_bn(cfg.model):
        notes.append('There is no GPU: SyncBN becomes BN.')
    _set_rendezvous(launcher, settings)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(local_rank))
    torch.distributed.init_process_group(
        backend=settings['backend'],
        timeout=datetime.timedelta(seconds=settings.get('timeout', 1800)),
    )
    atexit.register(_end_threads)


def _check_gpus(launcher: str, local_rank: int, count: int) -> None:
    """Refuse more processes than GPUs.

    Raises:
        UserError: There are.
    """
    if local_rank < count:
        return
    if launcher == 'slurm' and count == 1:
        raise UserError(
            f'process {local_rank} of this machine sees one GPU only, as --gpus-per-task and '
            '--gpu-bind of srun have it, and needs all of its processes: request them with '
            '--gres=gpu:N or --gpus-per-node=N, or add --gpu-bind=none'
        )
    raise UserError(
        f'process {local_rank} of this machine has no GPU: there are {count}; start as many '
        'processes as there are GPUs'
    )


def _choose_port(launcher: str, settings: dict) -> None:
    """Give each Slurm job a port of its own: two jobs may share a node."""
    if launcher == 'slurm' and 'port' not in settings and 'MASTER_PORT' not in os.environ:
        ids = (os.environ.get(name, '') for name in ('SLURM_JOB_ID', 'SLURM_STEP_ID'))
        number = sum(int(text) for text in ids if text.isdecimal())
        # Below the ports that Linux hands out itself.
        os.environ['MASTER_PORT'] = str(15000 + number % 17000)


def _complete_wrapper(cfg: Config) -> bool:
    """Give a wrapper that the config describes in part mmengine's values for one it does not.

    Returns:
        Whether the wrapper is that of DDP.
    """
    cfg.model_wrapper_cfg = cfg.get('model_wrapper_cfg') or ConfigDict()
    wrapper = cfg.model_wrapper_cfg
    wrapper.setdefault('type', 'MMDistributedDataParallel')
    if type_name(wrapper) != 'MMDistributedDataParallel':
        return False
    wrapper.setdefault('broadcast_buffers', False)
    wrapper.setdefault('find_unused_parameters', cfg.get('find_unused_parameters', False))
    return True


def finish() -> None:
    """Leave the process group, if there is one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _end_threads() -> None:
    """Leave the process group and end gloo's threads, before the interpreter ends.

    A thread that drops the last tensor of a collective while the interpreter ends aborts the
    process. The threads end with the last reference to the group, and the wrapper of the model,
    which holds one, is part of a reference cycle.
    """
    finish()
    gc.collect()


def _fit_strategy(cfg: Config) -> None:
    """Give the model wrapper of a ``FlexibleRunner``'s strategy no GPU."""
    strategy = cfg.get('strategy')
    if not isinstance(strategy, dict):
        return
    wrapper = strategy.get('model_wrapper') or ConfigDict()
    if type_name(strategy) == 'DDPStrategy':
        wrapper.setdefault('type', 'MMDistributedDataParallel')
        wrapper.setdefault('broadcast_buffers', False)
        wrapper['device_ids'] = None
    elif type_name(strategy) == 'FSDPStrategy':
        wrapper.setdefault('type', 'MMFullyShardedDataParallel')
        # A number would mean a GPU.
        wrapper['device_id'] = torch.device('cpu')
    else:
        return
    strategy['model_wrapper'] = wrapper


def _set_rendezvous(launcher: str, settings: dict) -> None:
    os.environ.setdefault('MASTER_PORT', str(settings.get('port', 29500)))
    if 'MASTER_ADDR' in os.environ:
        return
    if launcher != 'slurm':
        raise UserError(f'--launcher {launcher} needs the environment variable MASTER_ADDR')
    nodes = os.environ['SLURM_NODELIST']
    hosts = subprocess.run(
        ['scontrol', 'show', 'hostnames', nodes], capture_output=True, text=True, check=True
    )
    os.environ['MASTER_ADDR'] = hosts.stdout.split()[0]


def _replace_sync_bn(node: object) -> int:
    """Return how many norm configs were changed."""
    if isinstance(node, dict):
        found = int(type_name(node) in ('SyncBN', 'SyncBatchNorm'))
        if found:
            node['type'] = 'BN'
        return found + sum(_replace_sync_bn(value) for value in node.values())
    if isinstance(node, list | tuple):
        return sum(_replace_sync_bn(value) for value in node)
    return 0
