"""The table of discretizations in C++: against its own formulas, Python's, and a new method."""

import shutil
import subprocess

import pytest
import torch
from csrc_support import load_module

from mmvim.ops import DISCRETIZATIONS, TWO_TAP
from mmvim.ops.discretization import coefficients

STEPS = (0.25, 1.5)
RATES = (-1e-4, -0.3, -1.0, -2.5, -17.0)

# For every method: name, taps, what it says of its decay, and the coefficients at each point.
PRINT = """
#include "common/discretization.h"
#include <cmath>
#include <cstdio>
#include <initializer_list>

struct Plain {
  using Scalar = double;
  using V = double;
  static V set(double x) { return x; }
  static V fma(V a, V b, V c) { return a * b + c; }
  static V exp(V x) { return std::exp(x); }
  static V exp2(V x) { return std::exp2(x); }
  static V reciprocal(V x) { return 1 / x; }
  static bool abs_less(V x, double limit) { return std::fabs(x) < limit; }
  static V select(bool m, V yes, V no) { return m ? yes : no; }
  static bool all(bool m) { return m; }
  static bool any(bool m) { return m; }
};

int main() {
  using namespace mmvim;
  for (const Method& m : kMethods) {
    with_discretization(static_cast<Discretization>(&m - kMethods), [&](auto tag) {
      using R = Rule<decltype(tag)::value, Plain>;
      std::printf("%s %d %d", m.name, R::kTwoTap ? 2 : 1, R::kDecaysExponentially);
      for (const double delta : {STEPS}) {
        for (const double A : {RATES}) {
          const auto s = R::step(delta, R::kRateScale * A);
          std::printf(" %.17g %.17g %.17g", s.a, s.w0, R::kTwoTap ? s.w1 : 0.);
        }
      }
      std::printf("\\n");
    });
  }
}
"""

ROW = '  _(kTustin, "tustin", 2, kOther)'
# Backward Euler, in a row and a rule and no more.
NEW_ROW = ROW + ' \\\n  _(kEuler, "euler", 1, kOther)'
NEW_RULE = """
template <class Math>
struct Rule<Discretization::kEuler, Math> : Traits<Discretization::kEuler> {
  using V = typename Math::V;
  static MMVIM_HD Step<V> step(V delta, V rate) {
    const V a = Math::reciprocal(Math::set(1) - delta * rate);
    return {a, delta * a, delta * a};
  }
  static MMVIM_HD StepWithGrad<V> step_with_grad(V delta, V rate) {
    StepWithGrad<V> s;
    s.a = s.w0_d = Math::reciprocal(Math::set(1) - delta * rate);
    s.a_z = s.a * s.a;
    s.w0 = delta * s.a;
    s.w0_z = delta * s.a_z;
    return s;
  }
};

// Chain rule of one"""


def table(builder, csrc, tmp_path):
    """Output of the program: {name: (taps, decays exponentially, [(a, w0, w1)])}."""
    steps, rates = (', '.join(map(str, values)) for values in (STEPS, RATES))
    (tmp_path / 'print.cpp').write_text(PRINT.replace('STEPS', steps).replace('RATES', rates))
    program = tmp_path / 'print'
    compiler = builder.find_cxx().split()
    source = [str(tmp_path / 'print.cpp'), '-o', str(program)]
    subprocess.run([*compiler, '-std=c++17', f'-I{csrc}', *source], check=True)
    lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    result = {}
    for line in lines.splitlines():
        name, taps, decays, *values = line.split()
        values = torch.tensor([float(v) for v in values], dtype=torch.float64).view(-1, 3)
        result[name] = int(taps), bool(int(decays)), values
    return result


def with_new_method(csrc):
    header = csrc / 'common' / 'discretization.h'
    text = header.read_text()
    assert ROW in text
    text = text.replace(ROW, NEW_ROW).replace('\n// Chain rule of one', NEW_RULE)
    header.write_text(text)


def points():
    delta, A = torch.meshgrid(
        torch.tensor(STEPS, dtype=torch.float64),
        torch.tensor(RATES, dtype=torch.float64),
        indexing='ij',
    )
    return delta.flatten(), (delta * A).flatten()


@pytest.mark.skipif(shutil.which('c++') is None, reason='needs a C++ compiler')
def test_the_table_is_that_of_python_and_true_of_the_formulas(builder, csrc, tmp_path):
    methods = table(builder, csrc, tmp_path)
    assert tuple(methods) == DISCRETIZATIONS
    delta, z = points()
    for name, (taps, decays, values) in methods.items():
        assert (taps == 2) == (name in TWO_TAP), name
        a, w0, w1 = coefficients(name, delta, z)
        expected = torch.stack((a, w0, torch.zeros_like(a) if w1 is None else w1), 1)
        torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-15)
        # Long scans on a GPU multiply the decays of a chunk by one exponential where this says so.
        assert decays == torch.allclose(values[:, 0], z.exp(), rtol=1e-12, atol=0), name


@pytest.mark.skipif(shutil.which('c++') is None, reason='needs a C++ compiler')
def test_a_new_method_is_a_row_and_a_rule(builder, csrc, tmp_path):
    with_new_method(csrc)
    methods = table(builder, csrc, tmp_path)
    assert set(methods) == {*DISCRETIZATIONS, 'euler'}
    taps, decays, values = methods['euler']
    delta, z = points()
    assert (taps, decays) == (1, False)
    torch.testing.assert_close(values[:, 0], 1 / (1 - z), rtol=1e-12, atol=0)
    torch.testing.assert_close(values[:, 1], delta / (1 - z), rtol=1e-12, atol=0)


@pytest.mark.slow
def test_a_new_method_compiles_for_gpus_without_quick_steps(csrc, tmp_path):
    builder = load_module('mmvim_build_copy', csrc / 'build.py')
    toolkit = builder.find_cuda_home()
    if toolkit is None:
        pytest.skip('no nvcc')
    with_new_method(csrc)
    source = csrc / 'selective_scan' / 'cuda_new.cu'
    source.write_text("""
#include "cuda_backward_launch.cuh"
#include "cuda_forward_launch.cuh"

namespace mmvim {
namespace scan {
constexpr Discretization kNew = Discretization::kEuler;
static_assert(!kHasQuickSteps<__half, kNew> && !Rule<kNew, GpuMath>::kDecaysExponentially);
template int launch_forward_as<__half, kNew, 1>(const Plan&, Forward, CUstream_st*);
template int launch_backward_as<__half, kNew, 1>(const Plan&, Backward, CUstream_st*);
}  // namespace scan
}  // namespace mmvim
""")
    subprocess.run(
        [toolkit[0], '-std=c++17', '-arch=sm_90', '-c', source, '-o', tmp_path / 'new.o'],
        check=True,
    )
