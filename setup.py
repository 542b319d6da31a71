"""Build hook: compiles the kernels where that is possible, and packs configs, tools and sources.

All metadata is in pyproject.toml. A build of the kernels that fails, for want of torch, a compiler
or anything else, never fails the installation: the reason is written beside the package, where
``mmvim.ops.backend_info()`` finds it.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.build import build as _build
from setuptools.command.build_py import build_py as _build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel as _bdist_wheel
except ImportError:
    from wheel.bdist_wheel import bdist_wheel as _bdist_wheel

ROOT = Path(__file__).resolve().parent
# What OpenMMLab's tools look for in an installed package, and the sources for a build at first use.
PACKED = {
    'configs': '.mim/configs',
    'tools': '.mim/tools',
    'model-index.yml': '.mim/model-index.yml',
    'csrc': 'csrc',
}
NOT_PACKED = shutil.ignore_patterns('__pycache__', '*.pyc', '*.o', '*.so')


def kernels_builder():
    """Return csrc/build.py as a module."""
    spec = importlib.util.spec_from_file_location('mmvim_csrc_build', ROOT / 'csrc' / 'build.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def why_not_built() -> str | None:
    """Return why the kernels are not to be built, or None."""
    if os.environ.get('MMVIM_SKIP_BUILD') == '1':
        return 'MMVIM_SKIP_BUILD=1 was set when mmvim was installed'
    if importlib.util.find_spec('torch') is None:
        return (
            'there was no torch when mmvim was installed; pip install --no-build-isolation lets '
            'the build see an installed one'
        )
    return None


class build_kernels(Command):
    """Compile csrc into ``mmvim/_C.so``."""

    user_options = []  # noqa: RUF012
    editable_mode = False

    def initialize_options(self):
        """Set defaults."""
        self.build_lib = None

    def finalize_options(self):
        """Take the folder of the command ``build``."""
        self.set_undefined_options('build_py', ('build_lib', 'build_lib'))

    def run(self):
        """Build, or note why not."""
        builder = kernels_builder()
        folder = ROOT / 'mmvim' if self.editable_mode else Path(self.build_lib) / 'mmvim'
        folder.mkdir(parents=True, exist_ok=True)
        reason = why_not_built()
        if reason is None:
            try:
                objects = ROOT / 'build' / 'kernels' if self.editable_mode else None
                builder.build(folder, report=self._report, objects=objects)
                return
            except (builder.BuildError, OSError) as error:
                reason = str(error)
        builder.write_info(folder, {'error': reason})
        self._report(f'mmvim is installed without compiled kernels: {reason}')

    @staticmethod
    def _report(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def get_source_files(self):
        """Files that belong into a source distribution."""
        csrc = ROOT / 'csrc'
        return [str(p.relative_to(ROOT)) for p in csrc.rglob('*') if p.suffix not in ('.o', '.pyc')]

    def get_outputs(self):
        """Files that the build made."""
        if self.editable_mode:
            return []
        folder = Path(self.build_lib) / 'mmvim'
        return [str(p) for p in (*folder.glob('_C.*'), folder / '_build_info.json') if p.exists()]

    def get_output_mapping(self):
        """No output is a copy of a source."""
        return {}


class build(_build):
    """The usual build, then the kernels."""

    sub_commands = [*_build.sub_commands, ('build_kernels', None)]  # noqa: RUF012


class build_py(_build_py):
    """The usual build of Python files, and what is packed with them."""

    def run(self):
        """Copy the package and, unless the checkout itself is used, configs, tools and csrc."""
        super().run()
        if self.editable_mode:
            return
        for source, name in PACKED.items():
            target = Path(self.build_lib) / 'mmvim' / name
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, target, ignore=NOT_PACKED, dirs_exist_ok=True)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / source, target)


class BinaryDistribution(Distribution):
    """A distribution that may hold a compiled library."""

    def has_ext_modules(self):
        """Tell whether the wheel belongs to a platform."""
        return why_not_built() is None


class bdist_wheel(_bdist_wheel):
    """The library knows nothing of Python's ABI: one wheel serves all versions of Python 3."""

    def get_tag(self):
        """Return the tag of the wheel."""
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ('py3', 'none', platform)


setup(
    distclass=BinaryDistribution,
    cmdclass={
        'build': build,
        'build_py': build_py,
        'build_kernels': build_kernels,
        'bdist_wheel': bdist_wheel,
    },
)
