#!/usr/bin/env python
"""Mistakes that the tests must notice: python tests/mutants.py [PART OF A NAME ...]

Each is one change of one line, made in a copy of the checkout; the tests named beside it must fail.
Run it by hand after changes of the tests; it takes some seconds for each mistake. Tests are files,
or one test of a file (``file.py::test``).
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import forks
import pytest

ROOT = Path(__file__).resolve().parents[1]
# What is built lies in the package, outside version control.
BUILT = ('mmvim/_C.so', 'mmvim/_build_info.json')

#: file, the right text, the mistake, tests
MUTANTS = (
    # engine
    ('mmvim/engine/batches.py', 'number += len(batch)', 'number += 1', 'engine/test_batches.py'),
    (
        'mmvim/engine/loops.py', 'done = self._iter - self._epoch * then',
        'done = self._iter - self._epoch * length', 'tools/test_loops.py',
    ),
    (
        'mmvim/engine/hooks/checkpoint.py', 'self.best_ckpt_path = here(self.best_ckpt_path)',
        'pass', 'tools/test_checkpoint_hook.py',
    ),
    (
        'mmvim/engine/hooks/checkpoint.py',
        'return step >= self.save_begin and (step - self.save_begin) % self.interval == 0',
        'return step % self.interval == 0', 'tools/test_checkpoint_hook.py',
    ),
    (
        'mmvim/engine/hooks/non_finite.py', 'self._consecutive = 0\n            step',
        'step', 'reliability/test_non_finite_hook.py',
    ),
    (
        'mmvim/engine/hooks/non_finite.py', '_put_back(self._buffers)', 'pass',
        'reliability/test_non_finite_hook.py',
    ),
    (
        'mmvim/engine/hooks/mesa.py', 'self._progress(runner) > self.start',
        'self._progress(runner) >= self.start', 'engine/test_mesa.py',
    ),
    (
        'mmvim/engine/hooks/data_check.py', 'bad = (labels < 0) | (labels >= count)',
        'bad = (labels < 0) | (labels > count)', 'tools/test_tasks.py',
    ),
    (
        'mmvim/engine/hooks/weights.py', 'find_weights(checkpoint, ema=self.ema)',
        'find_weights(checkpoint, ema=not self.ema)', 'tools/test_test.py',
    ),
    (
        'mmvim/engine/optim/layer_decay.py', 'rate ** (layers - 1 - layer)',
        'rate ** (layers - layer)', 'engine/test_layer_decay.py',
    ),
    (
        'mmvim/engine/optim/layer_decay.py', 'key=lambda key: (-len(key), key)',
        'key=lambda key: (len(key), key)', 'engine/test_layer_decay.py',
    ),
    (
        'mmvim/engine/tasks.py', "flips = [{'type': 'RandomFlip', 'prob': 0.0}",
        "flips = [{'type': 'RandomFlip', 'prob': 1.0}", 'tools/test_tasks.py',
    ),
    (
        'mmvim/engine/hooks/parameter_groups.py', 'kept + values[len(groups) :]', 'kept',
        'engine/test_parameter_groups.py',
    ),
    (
        'mmvim/engine/hooks/parameter_groups.py',
        'return clip(sorted(chosen, key=lambda p: place[id(p)]), **kwargs)',
        'return clip(chosen, **kwargs)', 'engine/test_parameter_groups.py',
    ),
    (
        'mmvim/engine/hooks/run_ahead.py', 'return self._pending[-1][0]',
        'return self._pending[0][0]', 'engine/test_run_ahead.py',
    ),
    (
        'mmvim/engine/hooks/data_check.py',
        "if loop == 'train' and not getattr(runner, '_resume', False):", "if loop == 'train':",
        'tools/test_class_names.py',
    ),
    (
        'mmvim/engine/hooks/data_check.py',
        'return bad if ignored is None else bad & (labels != ignored)', 'return bad',
        'tools/test_tasks.py',
    ),
    (
        'mmvim/engine/class_names.py', 'if len(names) != len(others):',
        'if len(names) > len(others):', 'tools/test_class_names.py',
    ),
    (
        'mmvim/engine/loops.py',
        'self._iter % self.val_interval == 0 or self._iter == self._max_iters',
        'self._iter % self.val_interval == 0', 'tools/test_loops.py',
    ),
    (
        'mmvim/engine/hooks/checkpoint.py', 'if path not in written and backend.isfile(path):',
        'if backend.isfile(path):', 'tools/test_checkpoint_hook.py',
    ),
    (
        'mmvim/engine/optim/averaging.py', 'return max(self.momentum, 9 / (10 + updates))',
        'return min(self.momentum, 9 / (10 + updates))', 'engine/test_averaging.py',
    ),
    # cli
    (
        'mmvim/cli/flags.py', "setdefault('loss_scale', {'enabled': False} if is_bf16 else",
        "setdefault('loss_scale', 'dynamic' if is_bf16 else", 'tools/test_train.py',
    ),
    (
        'mmvim/cli/flags.py', "cfg.load_from, cfg.resume = args.checkpoint, False",
        'cfg.load_from = args.checkpoint', 'tools/test_test.py',
    ),
    (
        'mmvim/cli/flags.py', "_set_loaders(cfg, persistent_workers=False)",
        "_set_loaders(cfg, pin_memory=False)", 'tools/test_train.py',
    ),
    (
        'mmvim/cli/launcher.py', 'for i, item in enumerate(outputs, start=seen)',
        'for i, item in enumerate(outputs)', 'tools/test_tasks.py',
    ),
    (
        'mmvim/cli/distributed.py', "cfg.model_wrapper_cfg['device_ids'] = None", 'pass',
        'cli/test_config_tools.py tools/test_scripts.py',
    ),
    (
        'mmvim/cli/distributed.py', 'str(15000 + number % 17000)', "'29500'",
        'cli/test_config_tools.py',
    ),
    (
        'tools/benchmark/data.py', 'if done <= workers:', 'if done <= 1:',
        'tools/test_benchmark_data.py',
    ),
    (
        'mmvim/cli/flags.py', "cfg[key]['pin_memory'] = False", 'pass', 'tools/test_train.py',
    ),
    (
        'mmvim/cli/resuming.py', 'runner._randomness_cfg.update(seed=chosen.seed)', 'pass',
        'cli/test_resuming.py',
    ),
    (
        'mmvim/cli/options.py', 'options = dict(getattr(namespace, self.dest, None) or {})',
        'options = {}', 'cli/test_config_tools.py',
    ),
    (
        'mmvim/cli/checks.py', 'right = 0 <= priority <= 100', 'right = 0 <= priority',
        'cli/test_config_tools.py',
    ),
    (
        'mmvim/cli/samples.py', 'if len(header) < 25 or header[24] <= 8:',
        'if len(header) < 25 or header[24] <= 16:', 'tools/test_tasks.py',
    ),
    (
        'mmvim/cli/console.py', "frozen = '' if trained == count else",
        "frozen = '' if trained else", 'cli/test_console.py::test_what_is_known_about_a_run',
    ),
    (
        'mmvim/cli/diagnosis.py', 'score = (same, -sum(key not in given for key in candidate))',
        'score = (same, 0)', 'cli/test_diagnosis.py',
    ),
    # apis
    (
        'mmvim/apis/inferencers/video.py', 'picture = result.image[..., ::-1] if frame',
        'picture = result.image if frame', 'apis/test_video_demo.py',
    ),
    (
        'mmvim/apis/inferencers/detection.py', 'result.image[..., ::-1]', 'result.image',
        'apis/test_inferencers.py',
    ),
    (
        'mmvim/apis/model_zoo.py', 'return sorted(name for name in names if not pretrained or',
        'return sorted(name for name in names if pretrained or', 'apis/test_model_zoo.py',
    ),
    (
        'mmvim/apis/inferencers/segmentation.py', 'order = np.argsort(-counts)',
        'order = np.argsort(counts)', 'apis/test_inferencers.py',
    ),
    (
        'mmvim/apis/videos.py', 'e.name.lower().endswith(SUFFIXES)', 'e.name.endswith(SUFFIXES)',
        'apis/test_video_demo.py',
    ),
    (
        'mmvim/apis/videos.py', '(side + side % 2 for side in picture.shape[:2])',
        '(side - side % 2 for side in picture.shape[:2])', 'apis/test_video_demo.py',
    ),
    # datasets
    (
        'mmvim/datasets/video/sampling.py', 'np.arange(1, num_clips + 1)', 'np.arange(num_clips)',
        'datasets/test_video_dataset.py',
    ),
    (
        'mmvim/datasets/video/transforms.py', "(0, room_x // 2, room_x)", "(0, room_x // 2, 0)",
        'datasets/test_video_dataset.py',
    ),
    (
        'mmvim/datasets/video/transforms.py',
        'outputs = [self.transforms(dict(results)) for _ in range(self.times)]',
        'outputs = [self.transforms(dict(results))] * self.times', 'datasets/test_video_dataset.py',
    ),
    (
        'mmvim/datasets/video/transforms.py', "inputs = results['frames'].transpose(1, 2)",
        "inputs = results['frames'].flip(2).transpose(1, 2)", 'datasets/test_video_dataset.py',
    ),
    (
        'mmvim/datasets/video/lists.py', 'names = sorted(numbers, key=numbers.get)',
        'names = sorted(numbers)', 'datasets/test_video_dataset.py',
    ),
    (
        'mmvim/datasets/video/sampling.py', 'places = [room / 2] if num_clips == 1',
        'places = [0] if num_clips == 1', 'datasets/test_video_dataset.py',
    ),
    (
        'mmvim/datasets/video/sampling.py', 'times + slack', 'times - slack',
        'datasets/test_video_dataset.py datasets/test_video_reader.py',
    ),
    (
        'mmvim/datasets/skip_failures.py', 'if number > self.max_failures:',
        'if number >= self.max_failures:', 'reliability/test_long_data.py',
    ),
    (
        'mmvim/datasets/video/transforms.py', 'uniform_(-self.log_ratio, self.log_ratio)',
        'uniform_(0, self.log_ratio)', 'datasets/test_video_dataset.py',
    ),
    (
        'mmvim/datasets/video/reader.py', 'picture, a, d = picture.transpose(1, 0, 2), c, b',
        'picture, a, d = picture.transpose(1, 0, 2), b, c', 'datasets/test_video_reader.py',
    ),
    # export
    (
        'mmvim/export/metadata.py', "return 'RGB' if is_rgb != (", "return 'RGB' if is_rgb == (",
        'export/test_export_metadata.py',
    ),
    (
        'mmvim/export/operations.py', 'h = decay * h + drive[:, t]',
        'h = h + drive[:, t]', 'export/test_export.py',
    ),
    (
        'mmvim/export/metadata.py', "'sigmoid' if 'MultiLabelClsHead' in kinds",
        "'softmax' if 'MultiLabelClsHead' in kinds", 'export/test_export_metadata.py',
    ),
    # configs
    (
        'configs/_base_/schedules/coco_100ep_adamw.py', 'layer_decay_rate=0.837',
        'layer_decay_rate=0.873', 'configs/test_recipes.py',
    ),
    (
        'configs/_base_/datasets/kinetics400.py', 'num_clips=4', 'num_clips=2',
        'configs/test_recipes.py',
    ),
    (
        'configs/_base_/datasets/imagenet_deit_224.py', 'to_rgb=True', 'to_rgb=False',
        'configs/test_recipes.py',
    ),
    (
        'configs/_base_/schedules/imagenet_bs4096_lamb_320e.py', "factor=1.0, by_epoch=True",
        "factor=0.1, by_epoch=True", 'configs/test_recipes.py configs/test_mambavision_configs.py',
    ),
    (
        'configs/_base_/datasets/coco_lsj_1024.py', 'ratio_range=(0.1, 2.0)',
        'ratio_range=(0.8, 1.25)', 'configs/test_recipes.py',
    ),
    (
        'configs/_base_/schedules/imagenet_bs1024_adamw_30e.py', 'weight_decay=1e-8',
        'weight_decay=1e-2', 'configs/test_recipes.py',
    ),
    # drop-in
    (
        'mmvim/dropin/convolutions.py', 'dout = dout.masked_fill((seq_idx < 0).unsqueeze(1), 0)',
        'pass', 'dropin/test_compiled_modules.py',
    ),
    (
        'mmvim/dropin/packages/causal_conv1d_cuda.py', 'dweight.add_(grads[1])',
        'dweight.copy_(grads[1])', 'dropin/test_compiled_modules.py',
    ),
    (
        'mmvim/dropin/vmamba.py', 'if dout.dtype == torch.float32 and u.dtype != torch.float32:',
        'if False:', 'dropin/test_compiled_modules.py',
    ),
    (
        'mmvim/dropin/norms.py', 'kept = wide if residual_in_fp32 else x.dtype', 'kept = x.dtype',
        'dropin/test_packages.py',
    ),
    (
        'mmvim/dropin/packages/mamba_ssm/modules/mamba_simple.py',
        '(self.d_conv - u.shape[1], 0)', '(0, self.d_conv - u.shape[1])',
        'dropin/test_packages.py',
    ),
    (
        'mmvim/dropin/packages/csm_triton.py', '2: ((False, False), (False, False), (False, True)',
        '2: ((False, False), (False, True), (False, False)', 'dropin/test_csm_triton.py',
    ),
    (
        'mmvim/dropin/packages/mamba_ssm/ops/triton/ssd_combined.py',
        'limit = dt_softplus if isinstance(dt_softplus, tuple) else (0.0, math.inf)',
        'limit = (0.0, math.inf)', 'dropin/test_mamba2_functions.py',
    ),
    # ops and layers
    (
        'mmvim/ops/cross_scan.py',
        "        check.check_negative('A', A, x)\n", '        pass\n',
        'ops/test_cross_scan.py ops/test_ops_validation.py',
    ),
    (
        'mmvim/ops/cross_scan.py', 'A, D, delta_bias, delta_weight = to_parameter(dtype, A, D, '
        'delta_bias, delta_weight)', 'A, D, delta_bias = to_parameter(dtype, A, D, delta_bias)',
        'ops/test_ops_autocast.py ops/test_cross_scan.py',
    ),
    (
        'mmvim/ops/selective_scan_torch.py',
        'steps = same[:, :-1] if self.reverse else same[:, 1:]', 'steps = same[:, 1:]',
        'ops/test_packed_sequences.py',
    ),
    (
        'mmvim/ops/causal_conv1d.py', "(slice(reach), 0) if mode == 'reverse'",
        "(slice(reach), -1) if mode == 'reverse'", 'ops/test_packed_sequences.py',
    ),
    (
        'mmvim/layers/mamba.py',
        'plain = state is None and not return_state and seq_idx is None',
        'plain = state is None and not return_state', 'layers/test_packed_layers.py',
    ),
    # graphs and parameter groups
    (
        'mmvim/engine/hooks/graph.py', 'if self._evicted >= 4 * self.max_shapes:',
        'if self._evicted >= self.max_shapes:', 'engine/test_graph.py',
    ),
    (
        'mmvim/engine/hooks/graph.py', 'tuple((p.data_ptr(), p.requires_grad) for m in',
        'tuple(p.data_ptr() for m in', 'engine/test_graph.py',
    ),
    (
        'mmvim/engine/hooks/parameter_groups.py',
        'group[key] = wrapper.optimizer.defaults[key]', 'pass', 'engine/test_parameter_groups.py',
    ),
    (
        'mmvim/engine/hooks/parameter_groups.py',
        'states = {place.get(key, key): value for', 'states = {key: value for',
        'engine/test_parameter_groups.py',
    ),
    # export of new operators
    (
        'mmvim/export/operations.py', 'delta_softplus, discretization, route >= 2)',
        'delta_softplus, discretization, route >= 1)',
        'export/test_export.py export/test_onnx_scan.py',
    ),
    (
        'mmvim/export/operations.py', '(0, 1) if reverse else (1, 0), value=1.0)',
        '(1, 0), value=1.0)', 'export/test_export.py export/test_onnx_scan.py',
    ),
    (
        'mmvim/export/processing.py', "self.is_reversed = order == 'BGR'",
        'self.is_reversed = False', 'export/test_processing.py',
    ),
    # own data
    (
        'configs/_base_/schedules/own_50e.py', 'lr=1e-4, betas', 'lr=1e-3, betas',
        'configs/test_recipes.py',
    ),
    (
        'configs/own_data/vim-tiny_images.py',
        'train_cfg=dict(_delete_=True),', 'train_cfg=dict(),',
        'configs/test_recipes.py',
    ),
    # tools
    (
        'tools/converters/convert_checkpoint.py', 'else False if args.no_ema',
        'else None if args.no_ema', 'checkpoints/test_weights.py',
    ),
    (
        'tools/analysis/get_flops.py', 'return int(sides[0]), int(sides[-1])',
        'return int(sides[-1]), int(sides[0])', 'analysis/test_flops.py',
    ),
    (
        'tools/export/evaluate.py', 'total += len(labels)', 'total = len(labels)',
        'export/test_export_tools.py',
    ),
    (
        'tools/quickstart/report.py', "return np.asarray(Image.open(path)).astype(int) - 1",
        'return np.asarray(Image.open(path)).astype(int)', 'quickstart/test_report.py',
    ),
    (
        'tools/demo/stream.py', "given is None else given", "given is None else frames",
        'tools/test_stream_demo.py',
    ),
    (
        'tools/analysis/analyze_logs.py', 'if args.smooth < 1:', 'if args.smooth < 0:',
        'analysis/test_curves.py',
    ),
)  # fmt: skip


def copy(target: Path) -> None:
    """Copy what is under version control, or would be, and what is built."""
    listed = ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard']
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in (*filter(None, names.split('\0')), *BUILT):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def noticed(root: Path, file: str, right: str, wrong: str, tests: str) -> bool:
    """Whether the tests fail with the mistake."""
    path = root / file
    text = path.read_text()
    path.write_text(text.replace(right, wrong))
    try:
        env = {**os.environ, 'PYTHONPATH': str(root), 'PYTHONDONTWRITEBYTECODE': '1'}
        done = forks.call(run_pytest, str(root), tests.split(), cwd=root, env=env)
    finally:
        path.write_text(text)
    if done.returncode not in (0, 1):
        raise SystemExit(f'{tests} cannot be run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}')
    return done.returncode == 1


def run_pytest(root: str, tests: list[str]) -> None:
    """Run tests of the copy, in a process that has imported nothing of the checkout."""
    sys.path[:] = [root, *(path for path in sys.path if not path.startswith(str(ROOT)))]
    sys.exit(
        pytest.main(['-q', '-x', '-m', 'not slow', '-p', 'no:cacheprovider',
                     *(f'tests/{name}' for name in tests)])
    )  # fmt: skip


def main() -> int:
    """Try every mistake whose file or text has one of the words of the command line."""
    words = sys.argv[1:]
    chosen = [m for m in MUTANTS if not words or any(word in part for word in words for part in m)]
    survivors = outdated = 0
    with tempfile.TemporaryDirectory() as folder:
        copy(Path(folder))
        for mutant in chosen:
            file, right, wrong, tests = mutant
            if (ROOT / file).read_text().count(right) != 1:
                print(f'OUTDATED  {file} does not have {right!r} once', flush=True)
                outdated += 1
                continue
            found = noticed(Path(folder), *mutant)
            survivors += not found
            print(f'{"noticed" if found else "SURVIVED"}  {file}: {wrong!r}  ({tests})', flush=True)
    print(f'{survivors} of {len(chosen) - outdated} mistakes survive; {outdated} are outdated')
    return int(survivors > 3 or outdated > 0)


if __name__ == '__main__':
    sys.exit(main())
