"""The import machinery, each case in a fresh interpreter."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mmvim
from mmvim.dropin import NAMES, PACKAGES

REPO = Path(__file__).parents[2]
USE = """
import torch
from mamba_ssm import Mamba
from causal_conv1d import causal_conv1d_fn
import selective_scan_cuda, selective_scan_cuda_core, selective_scan_cuda_oflex, causal_conv1d_cuda
assert Mamba(8, bimamba_type='v2')(torch.randn(1, 5, 8)).shape == (1, 5, 8)
"""


def start(*arguments, path=(), check=True, **environment):
    env = {k: v for k, v in os.environ.items() if k != 'MMVIM_DROPIN'} | environment
    env['PYTHONPATH'] = os.pathsep.join([str(REPO), *map(str, path)])
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=env,
        cwd='/',
        check=False,
    )
    if check:
        assert result.returncode == 0, result.stderr
    return result


def evaluate(code, **options):
    """The ``result`` of code, and what it wrote to stderr."""
    done = start('-c', f'{code}\nimport json; print(json.dumps(result))', **options)
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def package(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


SUFFIX = '.' + '.'.join(Path(torch._C.__file__).name.split('.')[1:])


@pytest.fixture
def broken(tmp_path):
    """An installation of causal_conv1d whose extension does not load."""
    folder = tmp_path / 'site-packages'
    package(folder, {'causal_conv1d/__init__.py': 'import causal_conv1d_cuda\nVERSION = 1\n'})
    (folder / f'causal_conv1d_cuda{SUFFIX}').write_bytes(b'not a library')
    return folder


def test_nothing_changes_for_those_who_do_not_ask():
    result, _ = evaluate("""
import sys
before = list(sys.path), list(sys.meta_path)
import mmvim, mmvim.ops, mmvim.layers, mmvim.dropin
result = [before[0] == sys.path, [f for f in sys.meta_path if 'dropin' in type(f).__module__]]
try:
    import mamba_ssm
except ImportError as error:
    result.append(error.name)
""")
    assert result == [True, [], 'mamba_ssm']


def test_names_can_be_imported_after_install():
    start('-c', 'import mmvim.dropin\nmmvim.dropin.install()\nmmvim.dropin.install()\n' + USE)


def test_install_imports_nothing_heavy(tmp_path):
    package(tmp_path, {'net/__init__.py': '', 'net/layer_norm.py': 'OWN = True'})
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location('finder', {str(REPO / 'mmvim/dropin/finder.py')!r})
finder = importlib.util.module_from_spec(spec)
spec.loader.exec_module(finder)
finder.install()
import net.layer_norm
result = sorted(sys.modules)
"""
    result, _ = evaluate(code, path=[tmp_path])
    assert not {'torch', 'mmvim', 'numpy'} & set(result)


def test_torch_is_enough():
    start(
        '-c',
        """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('einops', 'triton', 'transformers', 'mmengine', 'timm'):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda n, p=None: None if n in ('mmengine', 'triton') else find(n, p)
import mmvim.dropin
mmvim.dropin.install()
"""
        + USE,
    )


def test_uninstall_leaves_no_trace():
    result, _ = evaluate(f"""
import sys, torch, mmvim.dropin, mmvim.ops, mmvim.layers
paths, finders = list(sys.path), list(sys.meta_path)
mmvim.dropin.install()
{USE}
from mamba_ssm import Mamba2
import mamba_ssm.modules.mamba2
layer = Mamba(8)
mmvim.dropin.uninstall()
mmvim.dropin.uninstall()
names = [n for n in sys.modules if n.partition('.')[0] in mmvim.dropin.NAMES]
result = [paths == sys.path, finders == sys.meta_path, names, list(sys.path_importer_cache)]
layer(torch.randn(1, 5, 8)).sum().backward()
for name in mmvim.dropin.NAMES:
    try:
        __import__(name)
    except ImportError as error:
        result.append(error.name)
""")
    assert result[:3] == [True, True, []]
    assert not [entry for entry in result[3] if entry.startswith(PACKAGES)]
    assert result[4:] == list(NAMES)


def test_real_packages_are_left_alone(tmp_path):
    files = {f'site-packages/{name}.py': 'REAL = True' for name in NAMES}
    package(tmp_path, files)
    code = f"""
import importlib, mmvim.dropin
mmvim.dropin.install({{}})
result = ['REAL' in vars(importlib.import_module(name)) for name in {NAMES!r}]
result += [s.state for s in mmvim.dropin.status()]
"""
    path = [tmp_path / 'site-packages']
    result, errors = evaluate(code.format(''), path=path)
    assert result == [True] * len(NAMES) + ['installed'] * len(NAMES)
    assert 'Warning' not in errors
    result, _ = evaluate(code.format('override=True'), path=path)
    assert result == [False] * len(NAMES) + ['provided'] * len(NAMES)


def test_override_after_an_import_is_refused(tmp_path):
    package(tmp_path, {'mamba_ssm.py': ''})
    result = start(
        '-c',
        'import mamba_ssm, mmvim.dropin; mmvim.dropin.install(override=True)',
        path=[tmp_path],
        check=False,
    )
    assert 'RuntimeError: mamba_ssm: imported before' in result.stderr
    with pytest.raises(TypeError, match='override must be True or False'):
        mmvim.dropin.install(override=1)


def test_extension_that_fails_to_load_counts_as_absent(broken):
    result, errors = evaluate(
        """
import mmvim.dropin
mmvim.dropin.install()
import torch, causal_conv1d, causal_conv1d_cuda
x, w = torch.randn(1, 4, 5), torch.randn(4, 3)
y = causal_conv1d.causal_conv1d_fn(x, w, activation='silu')
result = [
    (y - causal_conv1d_cuda.causal_conv1d_fwd(x, w, None, True)).abs().max().item(),
    [s.detail for s in mmvim.dropin.status() if s.state == 'provided' and 'causal' in s.name],
]
""",
        path=[broken],
    )
    assert result[0] == 0
    assert len(result[1]) == 2
    assert all('fails to load' in detail for detail in result[1])
    assert re.search(r'causal_conv1d is installed .* but fails to load, so mmvim stands in', errors)


def test_extension_that_loads_is_used(tmp_path):
    """One of Python's own stands for it."""
    import _ctypes_test

    folder = tmp_path / 'site-packages'
    folder.mkdir()
    source = Path(_ctypes_test.__file__)
    shutil.copy(source, folder / source.name)
    result, errors = evaluate(
        """
import mmvim.dropin.finder as finder
finder._EXTENSIONS = finder.NAMES = ('_ctypes_test',)
finder.install()
import sys, _ctypes_test
result = [_ctypes_test.__file__, [s.state for s in finder.status()]]
""",
        path=[folder],
    )
    assert result == [str(folder / source.name), ['installed']]
    assert 'Warning' not in errors


FORK = {
    'mamba_ssm/__init__.py': 'from .modules.own import Own',
    'mamba_ssm/modules/__init__.py': '',
    'mamba_ssm/modules/own.py': """
import torch, selective_scan_cuda, causal_conv1d_cuda
from mamba_ssm.ops.triton.layernorm import RMSNorm, rms_norm_fn
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
from mamba_ssm.ops.triton.plain import OWN
assert OWN is True
class Own(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = RMSNorm(4)
    def forward(self, x):
        x = causal_conv1d_cuda.causal_conv1d_fwd(x, torch.ones(4, 3), None, None, None, None, True)
        return rms_norm_fn(x.transpose(1, 2), self.norm.weight, self.norm.bias, eps=1e-5)
""",
    'mamba_ssm/ops/__init__.py': '',
    'mamba_ssm/ops/triton/__init__.py': '',
    'mamba_ssm/ops/triton/layernorm.py': 'import torch\nimport triton\n1 / 0',
    'mamba_ssm/ops/triton/ssd_combined.py': 'from triton import jit\n1 / 0',
    'mamba_ssm/ops/triton/plain.py': 'OWN = True  # without Triton',
}


@pytest.mark.skipif(torch.cuda.is_available(), reason='Triton can run here')
def test_fork_keeps_its_files_and_gets_extensions_and_norms(tmp_path):
    package(tmp_path, FORK)
    (tmp_path / 'train.py').write_text("""
import torch, mamba_ssm, mmvim.dropin
from mamba_ssm import Own
print(mamba_ssm.__file__, Own()(torch.randn(1, 4, 5)).shape)
print({s.name: s.state for s in mmvim.dropin.status() if s.state != 'provided'})
mmvim.dropin.uninstall()
import sys
print([n for n in sys.modules if n.startswith('mamba_ssm.ops.triton.')])
""")
    lines = start('-m', 'mmvim.dropin', tmp_path / 'train.py').stdout.splitlines()
    assert lines[0] == f'{tmp_path}/mamba_ssm/__init__.py torch.Size([1, 5, 4])'
    assert eval(lines[1]) == {'mamba_ssm': 'shadowed'}
    assert lines[2] == "['mamba_ssm.ops.triton.plain']"


# VMamba's file in a package of a project, and a fork whose file fits another transformers.
PROJECT = {
    'net/__init__.py': '',
    'net/csm_triton.py': 'import triton.language as tl\nOWN = tl',
    'net/plain/__init__.py': '',
    'net/plain/csm_triton.py': 'OWN = True',
    'mamba_ssm/__init__.py': '',
    'mamba_ssm/utils/__init__.py': '',
    'mamba_ssm/utils/generation.py': 'BEFORE = 1\nfrom torch import no_such_name',
    'mamba_ssm/utils/hf.py': 'OWN = True',
}


@pytest.mark.skipif(torch.cuda.is_available(), reason='Triton can run here')
def test_files_of_a_project_that_cannot_run_are_replaced(tmp_path):
    package(tmp_path, PROJECT)
    code = """
import mmvim.dropin
mmvim.dropin.install({})
import sys, torch, net.csm_triton, net.plain.csm_triton, csm_triton
import mamba_ssm.utils.generation as generation
import mamba_ssm.utils.hf
x = torch.randn(1, 2, 3, 4)
result = [
    net.csm_triton.cross_scan_fn(x).equal(csm_triton.cross_scan_fn(x)),
    net.csm_triton.__name__,
    'OWN' in vars(net.plain.csm_triton),
    generation.InferenceParams(1, 2).max_batch_size,
    'BEFORE' in vars(generation),
    generation.__file__ == mmvim.dropin.PACKAGES + '/mamba_ssm/utils/generation.py',
    'OWN' in vars(mamba_ssm.utils.hf),
]
mmvim.dropin.uninstall()
result.append([n for n in sys.modules if n.startswith(('net.', 'mamba_ssm.utils.'))])
"""
    result, errors = evaluate(code.format(''), path=[tmp_path])
    assert result[:7] == [True, 'net.csm_triton', True, 2, False, True, True]
    assert set(result[7]) == {'net.plain', 'net.plain.csm_triton', 'mamba_ssm.utils.hf'}
    assert 'generation.py fails to load, so mmvim stands in' in errors
    assert 'no_such_name' in errors
    # With override all of these names are mmvim's.
    result, _ = evaluate(code.format('override=True'), path=[tmp_path])
    assert result == [True, 'net.csm_triton', False, 2, False, True, False, ['net.plain']]


# mamba_ssm's files in Triton in packages of other names.
COPIES = {
    'net/__init__.py': '',
    'net/ssd_combined.py': 'import triton\ndef mamba_chunk_scan_combined(): 1 / 0',
    'net/layer_norm.py': 'import triton  # a norm of another kind\nOWN = True',
    'net/layernorm.py': 'def rms_norm_fn(): pass  # without Triton\nOWN = True',
    'mamba/__init__.py': '',
    'mamba/mamba_ssm/__init__.py': '',
    'mamba/mamba_ssm/utils/__init__.py': '',
    'mamba/mamba_ssm/utils/generation.py': 'from torch import no_such_name',
    'mamba/mamba_ssm/ops/__init__.py': '',
    'mamba/mamba_ssm/ops/triton/__init__.py': '',
    'mamba/mamba_ssm/ops/triton/layernorm.py': 'import triton\n1 / 0',
    'mamba/mamba_ssm/ops/triton/own.py': 'import triton\n1 / 0',
    'mamba/mamba_ssm/ops/triton/plain.py': 'OWN = True',
}


@pytest.mark.skipif(torch.cuda.is_available(), reason='Triton can run here')
@pytest.mark.parametrize('override', [False, True])
def test_copies_in_packages_of_other_names(tmp_path, override):
    package(tmp_path, COPIES)
    code = f"""
import mmvim.dropin
mmvim.dropin.install({override})
import torch, mamba_ssm, net.layer_norm, net.layernorm, net.ssd_combined
from mamba_ssm.ops.triton import layernorm, ssd_combined
from mamba.mamba_ssm.utils.generation import InferenceParams
import mamba.mamba_ssm.ops.triton.layernorm as copy
import mamba.mamba_ssm.ops.triton.own as own
import mamba.mamba_ssm.ops.triton.plain as plain
x = torch.randn(2, 4)
try:
    own.function()
except NotImplementedError as error:
    print(error)
result = [
    [net.layer_norm.OWN, net.layernorm.OWN, plain.OWN, InferenceParams(1, 2).max_seqlen],
    net.ssd_combined.__file__ == ssd_combined.__file__,
    copy.rms_norm_fn(x, torch.ones(4), None).equal(layernorm.rms_norm_fn(x, torch.ones(4), None)),
    isinstance(copy.RMSNorm(4), torch.nn.Module),
]
mmvim.dropin.uninstall()
import sys
result.append({{n for n in sys.modules if n.startswith(('net.', 'mamba.mamba_ssm.ops.triton.'))}})
result[-1] = sorted(result[-1])
"""
    result, _ = evaluate(code, path=[tmp_path])
    assert result == [
        [True, True, True, 1],
        True,
        True,
        True,
        ['mamba.mamba_ssm.ops.triton.plain', 'net.layer_norm', 'net.layernorm'],
    ]


def test_folder_without_code_is_no_package(tmp_path):
    """Such as causal_conv1d's sources in the folder of a project."""
    (tmp_path / 'mamba_ssm' / 'csrc').mkdir(parents=True)
    start('-c', 'import mmvim.dropin\nmmvim.dropin.install()\n' + USE, path=[tmp_path])


SCRIPT = """
import os, sys, multiprocessing, helper
def work(queue):
    from mamba_ssm import Mamba
    queue.put(Mamba.__module__)
if __name__ == '__main__':
    import mamba_ssm, selective_scan_cuda
    context = multiprocessing.get_context('spawn')
    queue = context.Queue()
    child = context.Process(target=work, args=(queue,))
    child.start()
    print(sys.argv[1:], queue.get(timeout=60), os.environ['MMVIM_DROPIN'], __file__)
    child.join()
    sys.exit(3)
"""


def test_script_is_run_unchanged_with_its_children(tmp_path):
    package(tmp_path, {'script.py': SCRIPT, 'helper.py': ''})
    result = start('-m', 'mmvim.dropin', tmp_path / 'script.py', '-m', '--check', check=False)
    assert result.returncode == 3, result.stderr
    assert result.stdout.split() == [
        "['-m',",
        "'--check']",
        'mamba_ssm.modules.mamba_simple',
        '1',
        str(tmp_path / 'script.py'),
    ]


def test_module_is_run(tmp_path):
    code = 'import sys, mamba_ssm; print(__name__, sys.argv[1:], mamba_ssm.__file__)'
    package(tmp_path, {'own/__init__.py': '', 'own/run.py': code})
    out = start('-m', 'mmvim.dropin', '-m', 'own.run', '--flag', path=[tmp_path]).stdout
    assert out.startswith("__main__ ['--flag'] ")
    assert PACKAGES in out
    out = start('-m', 'mmvim.dropin', '-mown.run', 'word', path=[tmp_path]).stdout
    assert out.startswith("__main__ ['word'] ")


def test_check_lists_the_names(broken):
    lines = start('-m', 'mmvim.dropin', '--check', path=[broken]).stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(NAMES)
    assert all(line.split()[1] == 'provided' for line in lines)
    assert [line.split()[0] for line in lines if 'fails to load' in line] == [
        'causal_conv1d_cuda',
        'causal_conv1d',
    ]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], 'name a script, a module with -m, or --check'),
        (['/not/there.py'], 'there is no file /not/there.py'),
        (['--check', 'script.py'], '--check takes no program'),
        (['--overide', 'script.py'], 'unrecognized arguments: --overide'),
        (['-m'], 'expected one argument'),
    ],
)
def test_bad_command_lines(arguments, message):
    result = start('-m', 'mmvim.dropin', *arguments, check=False)
    assert result.returncode == 2
    assert message in result.stderr


@pytest.fixture
def site(tmp_path):
    """A folder for packages as an installation of mmvim leaves it."""
    shutil.copy(REPO / 'mmvim/dropin/startup.pth', tmp_path / 'mmvim_dropin.pth')
    return f'import site; site.addsitedir({str(tmp_path)!r})\n'


@pytest.mark.parametrize('value', ['', '0'])
def test_environment_without_the_variable(site, value):
    code = site + 'import sys; result = [n for n in sys.modules if n.startswith("mmvim")]'
    assert evaluate(code, MMVIM_DROPIN=value)[0] == []
    result = start('-c', site + 'import mamba_ssm', MMVIM_DROPIN=value, check=False)
    assert "No module named 'mamba_ssm'" in result.stderr


def test_environment_variable(site):
    code = site + 'import sys; early = "torch" in sys.modules\n' + USE
    code += """
import mmvim.dropin
mmvim.dropin.install()
finders = [f for f in sys.meta_path if type(f).__name__ == '_Finder']
result = [early, len(finders), [s.state for s in mmvim.dropin.status()]]
mmvim.dropin.uninstall()
result.append('mamba_ssm' in sys.modules)
"""
    result, _ = evaluate(code, MMVIM_DROPIN='1')
    assert result == [False, 1, ['provided'] * len(NAMES), False]
    result = start('-c', site, MMVIM_DROPIN='yes', check=False)
    assert "MMVIM_DROPIN='yes' is unknown; allowed: 0, 1, override" in result.stderr


def test_import_from_many_threads():
    start(
        '-c',
        """
import mmvim.dropin, threading
mmvim.dropin.install()
failures = []
def work():
    try:
        from mamba_ssm.modules.mamba_simple import Mamba
        import selective_scan_cuda, causal_conv1d
    except BaseException as error:
        failures.append(error)
threads = [threading.Thread(target=work) for _ in range(8)]
[t.start() for t in threads]
[t.join() for t in threads]
assert not failures, failures
""",
    )


@pytest.mark.slow
@pytest.mark.skipif(os.name == 'nt', reason='gloo on Linux')
def test_processes_of_torchrun(tmp_path):
    """The variable reaches them, as an installed mmvim's file does; it trains on two processes."""
    shutil.copy(REPO / 'mmvim/dropin/startup.pth', tmp_path / 'mmvim_dropin.pth')
    package(
        tmp_path,
        {
            'sitecustomize.py': f'import site; site.addsitedir({str(tmp_path)!r})',
            'train.py': """
import torch, torch.distributed as dist
from mamba_ssm import Mamba
dist.init_process_group('gloo')
torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(Mamba(8, bimamba_type='v2'))
model(torch.randn(2, 5, 8) + dist.get_rank()).square().sum().backward()
total = sum(p.grad.double().sum() for p in model.parameters())
print('gradient', total.item())
dist.destroy_process_group()
""",
        },
    )
    launch = ('-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2')
    result = start(*launch, tmp_path / 'train.py', path=[tmp_path], MMVIM_DROPIN='1')
    lines = re.findall(r'gradient (\S+)', result.stdout)
    assert len(lines) == 2
    assert len(set(lines)) == 1
