"""Packaging beyond pyproject.toml: compiling csrc, and csrc, configs and tools in the wheel.

Nothing here may stop an installation: without torch or a compiler mmvim installs as pure Python and
keeps the reason for ``mmvim.ops.backend_info()``. ``MMVIM_SKIP_BUILD=1`` requests that;
``MMVIM_FORCE_CUDA=1`` compiles the CUDA kernels without a GPU, 0 leaves them out.

``MMVIM_WHEEL=1`` makes a wheel for other machines (tools/build_wheel.sh): it fails without kernels,
and it requires the torch that they were compiled against and names it in its version.
"""

import importlib.util
import json
import os
import re
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
IGNORED = shutil.ignore_patterns('__pycache__', '*.py[cod]', '*.o', '*.so')
# Name of mmvim/dropin/startup.pth among the installed packages.
STARTUP = 'mmvim_dropin.pth'
# Where OpenMMLab's tools look for the files of a package: `_base_ = 'mmvim::vim/...'`, mim.
FOR_OTHERS = os.environ.get('MMVIM_WHEEL', '0') == '1'
MIM = ('configs', 'tools', 'model-index.yml', 'dataset-index.yml')


def load_builder():
    """Load csrc/build.py, which is not in a package."""
    spec = importlib.util.spec_from_file_location('mmvim_csrc_build', ROOT / 'csrc' / 'build.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class BuildPy(build_py):
    """Adds non-Python files: csrc for compiling later, configs and tools."""

    def run(self):
        """Copy into a wheel; link into the checkout of an editable installation."""
        super().run()
        # Python runs this file when it starts, if it lies among the installed packages.
        startup = ROOT / 'mmvim' / 'dropin' / 'startup.pth'
        if self.editable_mode:
            self._copy(startup, Path(self._folder_of_packages()) / STARTUP)
            self._link()
            return
        self._copy(startup, Path(self.build_lib) / STARTUP)
        package = Path(self.build_lib) / 'mmvim'
        for name in MIM:
            self._copy(ROOT / name, package / '.mim' / name)
        self._copy(ROOT / 'csrc', package / 'csrc')

    def _folder_of_packages(self):
        """What becomes site-packages, in an editable installation."""
        return self.get_finalized_command('install').install_lib

    @staticmethod
    def _copy(source, target):
        if source.is_dir():
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, target, ignore=IGNORED)
        elif source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)

    def _link(self):
        folder = ROOT / 'mmvim' / '.mim'
        try:
            folder.mkdir(exist_ok=True)
            for name in MIM:
                link = folder / name
                if (ROOT / name).exists() and not link.exists():
                    link.unlink(missing_ok=True)
                    link.symlink_to(Path('..') / '..' / name)
        except OSError as error:  # a system without links for users
            self.warn(f'configs are not linked into the package: {error}')


class BuildLibrary(build_ext):
    """Compiles csrc/ with csrc/build.py, into the package; never fails."""

    def run(self):
        """Build, or record the reason why not."""
        in_place = self.inplace or self.editable_mode
        folder = (ROOT if in_place else Path(self.build_lib)) / 'mmvim'
        folder.mkdir(parents=True, exist_ok=True)
        builder = load_builder()
        self.files = [folder / builder.INFO_NAME]
        try:
            if os.environ.get('MMVIM_SKIP_BUILD', '0') == '1':
                raise builder.BuildError('MMVIM_SKIP_BUILD=1 when mmvim was installed')
            builder.build(folder, objects=ROOT / 'build' / 'objects')
            self.files += [folder / builder.LIBRARY_NAME, folder / builder.ONNX_NAME]
        except Exception as error:
            if FOR_OTHERS:
                raise
            self.warn(f'mmvim installs without compiled kernels: {error}')
            library = folder / builder.LIBRARY_NAME
            if in_place and library.is_file():
                return  # an earlier one, which is used only if it still fits
            library.unlink(missing_ok=True)
            builder.write_info(folder, {'error': str(error)})

    def get_outputs(self):
        """Files made, for the wheel's record."""
        return [str(f) for f in getattr(self, 'files', [])]

    def get_output_mapping(self):
        """Nothing has a source to map to: an editable build is made in place."""
        return {}


class Wheel(bdist_wheel):
    """A wheel for every version of Python, which the library does not depend on."""

    def get_tag(self):
        """py3-none-PLATFORM with the library, py3-none-any without."""
        compiled = any((Path(self.bdist_dir) / 'mmvim').glob('_C.*'))
        self.root_is_pure = not compiled
        return 'py3', 'none', super().get_tag()[2] if compiled else 'any'

    def egg2dist(self, egginfo_path, distinfo_path):
        """Write the metadata; the library works with the torch that it was compiled against."""
        super().egg2dist(egginfo_path, distinfo_path)
        if not FOR_OTHERS:
            return
        info = json.loads((Path(self.bdist_dir) / 'mmvim' / '_build_info.json').read_text())
        metadata = Path(distinfo_path) / 'METADATA'
        text, found = re.subn(
            r'^(Requires-Dist: torch)[ (<>=].*$',
            rf'\1=={public(info["torch"])}',
            metadata.read_text(encoding='utf-8'),
            flags=re.MULTILINE,
        )
        if found != 1:
            raise ValueError(f'{metadata} has {found} lines that require torch, not one')
        metadata.write_text(text, encoding='utf-8')


def public(version):
    """A version without its local part: torch 2.14.1+cu130 is 2.14.1 to pip."""
    return version.partition('+')[0]


def version_tag():
    """What the version of a wheel for others says of its library, such as +torch2.14.1.cu130."""
    import torch

    config, _ = load_builder().find_cuda()
    kind = 'cpu' if config is None else f'cu{torch.version.cuda.replace(".", "")}'
    return f'+torch{public(torch.__version__)}.{kind}'


setup(
    options={'egg_info': {'tag_build': version_tag()}} if FOR_OTHERS else {},
    ext_modules=[Extension('mmvim._C', sources=[])],
    cmdclass={'build_py': BuildPy, 'build_ext': BuildLibrary, 'bdist_wheel': Wheel},
)
