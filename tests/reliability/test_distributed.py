"""Several processes do what one does with the joint batch, and none waits for one that is dead."""

import importlib.util
import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip('mmpretrain')

from ports import free_port
from runs import Runs, write_images

HERE = Path(__file__).parent
TOOLS = HERE.parents[1] / 'tools'
SAMPLES = 20  # Not a multiple of the joint batch, 8: the last batches are smaller.

ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason='CPU')


def on_gpus(count: int) -> list:
    """Marks of a test that needs as many GPUs."""
    few = torch.cuda.device_count() < count
    return [pytest.mark.gpu, pytest.mark.skipif(few, reason=f'needs {count} GPUs')]


DEVICES = [pytest.param('gloo', marks=ON_CPU), pytest.param('nccl', marks=on_gpus(2))]

CONFIG = """
default_scope = 'mmpretrain'
custom_imports = dict(imports=['distributed_hooks'], allow_failed_imports=False)
classes = ('a', 'b', 'c')
model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(num_classes=3, mean=[127.5] * 3, std=[127.5] * 3, to_rgb=True),
    backbone=dict(
        type='mmvim.Vim', arch=dict(embed_dims=16, depth=3, d_state=4), img_size=16, patch_size=8),
    head=dict(type='LinearClsHead', num_classes=3, in_channels=16,
              loss=dict(type='CrossEntropyLoss')))
dataset = dict(type='CustomDataset', data_root={data!r}, metainfo=dict(classes=classes),
               data_prefix='train',
               pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')])
train_dataloader = dict(
    batch_size={batch}, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dataset)
val_dataloader = dict(
    batch_size=3, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dataset)
val_evaluator = [dict(type='Accuracy', topk=(1,)), dict(type='SingleLabelMetric')]
test_dataloader, test_evaluator = val_dataloader, val_evaluator
train_cfg = dict(by_epoch=True, max_epochs=2, val_interval=2)
val_cfg, test_cfg = dict(), dict()
# The change of the weights is the gradient.
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1))
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=1),
    checkpoint=dict(type='CheckpointHook', interval=1),
    visualization=dict(type='VisualizationHook', enable=False))
custom_hooks = [dict(type='RecordWeights')]
env_cfg = dict(dist_cfg=dict(backend='nccl'))
visualizer = dict(type='UniversalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
randomness = dict(seed=0)
"""


# What is compared to the last bit; on a CPU it is deterministic as it is.
EXACT = "randomness['deterministic'] = True\n" if torch.cuda.is_available() else ''


@pytest.fixture(scope='module')
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp('images')
    write_images(root, SAMPLES)
    return root


def write_config(path: Path, images: Path, batch: int, extra: str = '') -> Path:
    path.mkdir(exist_ok=True)
    text = CONFIG.format(data=str(images), batch=batch) + extra
    (path / 'config.py').write_text(text)
    return path


def train(runs: Runs, path: Path, processes: int, ddp: bool = False) -> list[list[dict]]:
    """Train with some processes; return the weights that each had after each iteration.

    One process is a run without DDP, unless ``ddp`` asks for it.
    """
    argv = ('config.py', '--work-dir', 'work')
    env = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': free_port(), 'WORLD_SIZE': str(processes)}
    if processes == 1 and not ddp:
        pids = [runs.start(path, *argv)]
    else:
        pids = [
            runs.start(
                path,
                *argv,
                '--launcher',
                'pytorch',
                env={**env, 'RANK': str(rank), 'LOCAL_RANK': str(rank)},
            )
            for rank in range(processes)
        ]
    codes = [runs.wait(pid) for pid in pids]
    assert codes == [0] * processes, (path / 'log').read_text()[-4000:]
    return [torch.load(path / f'weights_{rank}.pth') for rank in range(processes)]


def metrics(path: Path) -> dict[str, float]:
    """The metrics of the validation, as logged."""
    file = next((path / 'work').glob('*/vis_data/scalars.json'))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    found = [line for line in lines if 'accuracy/top1' in line]
    return {k: v for k, v in found[-1].items() if 'time' not in k}


VARIANTS = {
    'plain': '',
    'with_cp': 'model["backbone"]["with_cp"] = True\n',
    'compile with_cp': 'model["backbone"]["with_cp"] = True\n'
    "compile = dict(backend='aot_eager')\n",
    'flexible runner': "runner_type = 'FlexibleRunner'\nstrategy = dict(type='DDPStrategy')\n",
    'accumulation': "optim_wrapper['accumulative_counts'] = 2\n",
    'options of DDP': (
        'model_wrapper_cfg = dict(\n'
        '    static_graph=True, gradient_as_bucket_view=True, bucket_cap_mb=1)\n'
    ),
}
# The single process beside a FlexibleRunner: Runner draws the weights of the head on the GPU, a
# FlexibleRunner before it moves the model there, and so others from the same seed. On a CPU both
# draw the same, and Runner it is.
ONE_OF_FLEXIBLE = {
    'gloo': '',
    'nccl': "runner_type = 'FlexibleRunner'\nstrategy = dict(type='SingleDeviceStrategy')\n",
}


CASES = [
    pytest.param(name, backend, processes, id=f'{name}-{backend}-{processes}', marks=marks)
    for name in VARIANTS
    for processes in (2, 4)
    for backend, marks in (
        ('gloo', [ON_CPU] if (name, processes) == ('plain', 2) else [ON_CPU, pytest.mark.slow]),
        ('nccl', on_gpus(processes)),
    )
]


@pytest.mark.parametrize(('variant', 'backend', 'processes'), CASES)
def test_several_processes_are_one_with_the_joint_batch(
    runs, images, tmp_path, variant, backend, processes, count
):
    """The same weights after every iteration, hence gradients, and the same metrics.

    20 samples are 10 for each of two processes, in batches of 4, 4 and 2; one process has the same
    samples in batches of 8, 8 and 4.
    """
    extra = VARIANTS[variant]
    one = write_config(tmp_path / 'one', images, 8, extra)
    two = write_config(tmp_path / 'two', images, 8 // processes, extra)
    if variant == 'flexible runner':
        one = write_config(tmp_path / 'one', images, 8, ONE_OF_FLEXIBLE[backend])
    joint = train(runs, one, 1)[0]
    each = train(runs, two, processes)
    assert len(joint) == len(each[0]) == 7
    for step, (wanted, ours, *others) in enumerate(zip(joint, *each, strict=True)):
        assert all(wanted.keys() == weights.keys() for weights in (ours, *others))
        for name, value in wanted.items():
            assert all(torch.equal(ours[name], theirs[name]) for theirs in others), (step, name)
            assert_close(ours[name], value, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f'{n}: {m}')
    moved = max(float((joint[-1][n] - joint[0][n]).abs().max()) for n in joint[0])
    assert moved > 1e-2
    assert metrics(one) == pytest.approx(metrics(two), rel=1e-4)
    count('cases')


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('variant', ['plain', 'options of DDP', 'accumulation'])
def test_graphs_within_ddp(runs, images, tmp_path, variant):
    """One process is enough for NCCL's threads, DDP's buckets and graphs to meet."""
    wanted = train(runs, write_config(tmp_path / 'eager', images, 8, VARIANTS[variant]), 1)[0]
    graphs = VARIANTS[variant] + 'graph = True\n'
    path = write_config(tmp_path / 'graphs', images, 8, graphs)
    ours = train(runs, path, 1, ddp=True)[0]
    log = next((path / 'work').glob('*/*.log')).read_text()
    # Batches of 8 and of 4.
    assert '(2 of at most 8 recordings)' in log
    for a, b in zip(wanted, ours, strict=True):
        for name, value in a.items():
            assert_close(b[name], value, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f'{n}: {m}')


@pytest.mark.parametrize('backend', DEVICES)
@pytest.mark.parametrize(
    'samples',
    [19, pytest.param(17, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow)],
)
def test_metrics_of_sample_counts_that_do_not_divide(
    runs, images, tmp_path, samples, backend, count
):
    """The sample that is added to make the processes even is not counted."""
    extra = "train_cfg['val_interval'] = 1\n"
    extra += f"val_dataloader['dataset'] = dict(dataset, indices={samples})\n"
    found = []
    for processes in (1, 2):
        path = write_config(tmp_path / str(processes), images, 8 // processes, extra)
        train(runs, path, processes)
        found.append(metrics(path))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    share = found[0]['accuracy/top1'] / 100 * samples
    assert share == pytest.approx(round(share), abs=1e-3)
    count('cases')


@pytest.mark.slow
@pytest.mark.parametrize('backend', DEVICES)
def test_sharded_training(runs, images, tmp_path, backend, count):
    """FSDP through FlexibleRunner: the same weights, and a run that resumes."""
    extra = (
        "runner_type = 'FlexibleRunner'\n"
        "strategy = dict(type='FSDPStrategy', state_dict_cfg='full', model_wrapper=dict(\n"
        "    type='MMFullyShardedDataParallel', use_orig_params=True))\n"
    )
    joint = train(runs, write_config(tmp_path / 'one', images, 8, ONE_OF_FLEXIBLE[backend]), 1)[0]
    path = write_config(tmp_path / 'two', images, 4, extra)
    each = train(runs, path, 2)
    for wanted, ours, theirs in zip(joint, *each, strict=True):
        assert wanted.keys() == ours.keys()
        for name, value in wanted.items():
            assert torch.equal(ours[name], theirs[name])
            assert_close(ours[name], value, rtol=1e-4, atol=2e-6)
    saved = torch.load(path / 'work' / 'epoch_2.pth', weights_only=False)
    assert saved['state_dict'].keys() >= joint[0].keys()
    # From the first epoch's checkpoint, as if the second had been lost.
    (path / 'work' / 'epoch_2.pth').unlink()
    with (path / 'config.py').open('a') as file:
        file.write('resume = True\n')
    again = train(runs, path, 2)[0]
    assert len(again) == 4
    for name, value in joint[-1].items():
        assert_close(again[-1][name], value, rtol=1e-4, atol=2e-6)
    count('cases', 2)


@pytest.mark.slow
@pytest.mark.parametrize('backend', DEVICES)
def test_distributed_resume_is_exact(runs, images, tmp_path, backend, count):
    """Random states of both processes, and the data of an epoch that was half done."""
    extra = EXACT + (
        "model['backbone']['drop_path_rate'] = 0.3\n"
        "default_hooks['checkpoint'].update(by_epoch=False, interval=2)\n"
        "optim_wrapper['optimizer'] = dict(type='AdamW', lr=1e-2)\n"
    )
    whole = write_config(tmp_path / 'whole', images, 4, extra)
    wanted = train(runs, whole, 2)[0]
    half = write_config(tmp_path / 'half', images, 4, extra)
    (half / 'work').mkdir()
    os.link(whole / 'work' / 'iter_2.pth', half / 'work' / 'iter_2.pth')
    with (half / 'config.py').open('a') as file:
        file.write('resume = True\n')
    ours = train(runs, half, 2)[0]
    assert len(ours) == 5
    for a, b in zip(wanted[2:], ours, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    count('cases')


def script(name: str, *args: str, cwd: Path, **env: str) -> subprocess.Popen:
    environment = {
        **os.environ,
        'PYTHONPATH': os.pathsep.join((str(HERE), os.environ.get('PYTHONPATH', ''))),
        'PYTHON': sys.executable,
        'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}',
        'OMP_NUM_THREADS': '1',
        'CUBLAS_WORKSPACE_CONFIG': ':4096:8',
        **env,
    }
    return subprocess.Popen(
        ['bash', str(TOOLS / name), *args],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    try:
        # Importing alone takes minutes where many others compute.
        output, _ = process.communicate(timeout=500)
    except subprocess.TimeoutExpired:
        # torchrun ends its processes.
        process.terminate()
        process.communicate(timeout=60)
        raise
    return output


def launch(path: Path, nodes: int, *args: str, **env: str) -> list[subprocess.Popen]:
    """Start ``dist_train.sh`` on some "nodes", with two processes each, or the GPUs there are."""
    gpus = torch.cuda.device_count()
    each = min(2, gpus // nodes) if gpus else 2
    env['PORT'] = free_port()
    started = []
    for rank in range(nodes):
        if gpus:
            own = range(rank * each, (rank + 1) * each)
            env['CUDA_VISIBLE_DEVICES'] = ','.join(map(str, own))
        env.update(NNODES=str(nodes), NODE_RANK=str(rank))
        argv = ('config.py', str(each), '--work-dir', 'work', *args)
        started.append(script('dist_train.sh', *argv, cwd=path, **env))
    return started


def processes_with(mark: str) -> list[int]:
    """Process ids of those with a word in their environment."""
    found = []
    for folder in Path('/proc').iterdir():
        try:
            if folder.name.isdigit() and mark.encode() in (folder / 'environ').read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def joint_batch(nodes: int) -> int:
    """The batch of each process of `launch`, so that together they have 8."""
    gpus = torch.cuda.device_count()
    return 8 // (nodes * (min(2, gpus // nodes) if gpus else 2))


@pytest.mark.slow
@pytest.mark.parametrize('backend', DEVICES)
def test_shell_scripts_on_two_nodes(runs, images, tmp_path, backend, count):
    """``dist_train.sh`` with two processes on each of two nodes, and ``dist_test.sh``."""
    joint = train(runs, write_config(tmp_path / 'one', images, 8), 1)[0]
    path = write_config(tmp_path / 'two', images, joint_batch(2))
    nodes = launch(path, 2)
    outputs = [finish(node) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    assert 'Warning' not in ''.join(outputs) or backend == 'nccl', outputs
    ours = torch.load(path / 'weights_0.pth')
    for a, b in zip(joint, ours, strict=True):
        for name in a:
            assert_close(a[name], b[name], rtol=1e-4, atol=2e-6)
    trained = metrics(path)
    tested = script(
        'dist_test.sh', 'config.py', 'work/epoch_2.pth', '2', '--out', 'metrics.json',
        '--out-item', 'metrics', cwd=path, PORT=free_port(),
    )  # fmt: skip
    output = finish(tested)
    assert tested.returncode == 0, output[-3000:]
    again = json.loads((path / 'metrics.json').read_text())
    for name, value in again.items():
        assert value == pytest.approx(trained[name], rel=1e-5), name
    count('cases', 2)


ENDS = {'kill': 'SIGKILL', 'raise': 'told to fail', 'exit': 'exitcode  : 3'}


@pytest.mark.slow
@pytest.mark.parametrize('backend', DEVICES)
@pytest.mark.parametrize(('how', 'nodes'), [('kill', 1), ('raise', 1), ('exit', 1), ('kill', 2)])
def test_a_dead_process_ends_the_job(runs, images, tmp_path, how, nodes, backend, count):
    """Within a minute, with an error, on every node, with its loaders; ``--resume`` goes on.

    NCCL notices only by its timeout that a process of another node is dead.
    """
    extra = EXACT + (
        "default_hooks['checkpoint'].update(by_epoch=False, interval=2)\n"
        'train_dataloader.update(num_workers=1, persistent_workers=True)\n'
        "env_cfg['dist_cfg']['timeout'] = 20\n"
    )
    batch = joint_batch(nodes)
    whole = train(runs, write_config(tmp_path / 'whole', images, batch, extra), 8 // batch)[0]
    # The last process is on the last node.
    hook = f"custom_hooks.append(dict(type='Die', rank=-1, how={how!r}, at=4))\n"
    path = write_config(tmp_path / 'run', images, batch, extra + hook)
    mark = f'run-{uuid.uuid4().hex}'
    started = launch(path, nodes, MMVIM_TEST_MARK=mark)
    outputs = [finish(node) for node in started]
    taken = time.time() - float((path / 'died').read_text())
    assert all(node.returncode != 0 for node in started)
    assert taken < 60
    assert ENDS[how] in outputs[-1]
    assert 'it is a bug' not in ''.join(outputs) or how == 'raise'
    if backend == 'gloo':
        assert 'the connection to another process of the run is lost' in ''.join(outputs)
    assert processes_with(mark) == []
    assert (path / 'work' / 'iter_4.pth').exists()

    write_config(path, images, batch, extra)
    for node in launch(path, nodes, '--resume'):
        output = finish(node)
        assert node.returncode == 0, output[-3000:]
    ours = torch.load(path / 'weights_0.pth')
    # DDP arranges its buckets anew, and the sum of four gradients depends on their order.
    tolerance = dict(rtol=0, atol=0) if 8 // batch == 2 else dict(rtol=1e-5, atol=1e-7)
    for a, b in zip(whole[4:], ours, strict=True):
        for name in a:
            assert_close(b[name], a[name], **tolerance, msg=lambda m, n=name: f'{n}: {m}')
    count('faults')


@pytest.mark.slow
@pytest.mark.parametrize('backend', DEVICES)
def test_torchrun_passes_sigterm_on(runs, images, tmp_path, backend, count):
    """Both processes save the same iteration, which a resumed run continues from."""
    wanted = train(runs, write_config(tmp_path / 'whole', images, 4, EXACT), 2)[0]
    pause = "custom_hooks += [dict(type='Pause'), dict(type='SlowSave')]\n"
    path = write_config(tmp_path / 'run', images, 4, EXACT + pause)
    process = script(
        'dist_train.sh', 'config.py', '2', '--work-dir', 'work', cwd=path, PORT=free_port()
    )
    while not (path / 'iterations').exists() and process.poll() is None:
        time.sleep(0.1)
    time.sleep(0.3)
    process.terminate()
    since = time.monotonic()
    output = finish(process)
    assert process.returncode != 0
    assert time.monotonic() - since < 30
    assert 'terminated by SIGTERM: saved' in output
    (saved,) = (path / 'work').glob('iter_*.pth')
    # Slurm would end the process that saves as soon as another has ended.
    assert (path / 'seen_1').read_text() == saved.name
    write_config(path, images, 4, EXACT + 'resume = True\n')
    ours = train(runs, path, 2)[0]
    done = int(saved.stem.removeprefix('iter_'))
    assert len(ours) == len(wanted) - done
    for a, b in zip(wanted[done:], ours, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    count('SIGTERMs')


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec('deepspeed') is None
    or importlib.util.find_spec('deepspeed.runtime.fp16.onebit') is None,
    reason='needs a deepspeed that mmengine can import',
)
@pytest.mark.parametrize('backend', DEVICES)
def test_deepspeed(images, tmp_path, backend, count):
    extra = (
        "runner_type = 'FlexibleRunner'\n"
        "strategy = dict(type='DeepSpeedStrategy', zero_optimization=dict(stage=1),\n"
        '    gradient_clipping=1.0)\n'
        "optim_wrapper = dict(type='DeepSpeedOptimWrapper',\n"
        "    optimizer=dict(type='AdamW', lr=1e-3))\n"
        'custom_hooks = []\n'
    )
    path = write_config(tmp_path / 'run', images, 4, extra)
    process = script(
        'dist_train.sh', 'config.py', '2', '--work-dir', 'work', cwd=path, PORT=free_port()
    )
    output = finish(process)
    assert process.returncode == 0, output[-4000:]
    assert (path / 'work' / 'epoch_2.pth').is_dir()
