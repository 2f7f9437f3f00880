"""The benchmark harness: every method runs or says why not, counts are right, what must not be recorded is refused.

Run: pytest tests/test_benchmarks.py; the dry run of the whole GPU list (a minute or two) with -m slow.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from revffn import reversible_report

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # scripts that import each other
dispatches, figures, gpu_profile, gpu_suite, gpu_tables, methods = map(
    importlib.import_module,
    ("dispatches", "figures", "gpu_profile", "gpu_suite", "gpu_tables", "methods"),
)
quality, quality_tables, report, run, workloads = map(
    importlib.import_module,
    ("quality", "quality_tables", "report", "run", "workloads"),
)

TINY = workloads.WORKLOADS["qwen1.5_16x2048"].tiny()
SETTINGS = methods.OptimizerSettings()
CLEAN = {"git": {"commit": "abc", "dirty": False, "changed": []}, "versions": {}}


def started(name: str, workload=TINY, **settings):
    try:
        return methods.start(
            name,
            workload.hf_config(),
            "cpu",
            workload.dtype,
            methods.OptimizerSettings(**settings),
            workload.tile_tokens,
        )
    except methods.NotAvailable as reason:
        pytest.skip(f"{name} {reason}")


def losses_of(training, number: int = 2) -> list[float]:
    torch.manual_seed(0)
    return [float(training.step(batch)) for batch in TINY.batches(number)]


# --- methods ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_trains(name):
    """Two steps move every trainable parameter, no gradient is left, and shared parameters start with equal values."""
    training = started(name, lr=1e-2)
    plain = dict(methods.plain_model(TINY.hf_config(), "cpu", TINY.dtype).named_parameters())
    before = {n: p.detach().clone() for n, p in training.model.named_parameters()}
    if methods.METHODS[name].trains_everything:
        assert plain.keys() <= before.keys()
        assert all(torch.equal(before[n], p) for n, p in plain.items())
    if name == "galore":
        with pytest.raises(RuntimeError, match="size mismatch"):  # galore-torch 1.0 projects matrices only
            losses_of(training)
        return
    assert all(0 < loss < 10 for loss in losses_of(training))
    trained = [(n, p) for n, p in training.model.named_parameters() if p.requires_grad]
    # Norms of attention that is nearly uniform, and DoRA's single magnitude of a gate, have hardly a gradient.
    stuck = [n for n, p in trained if torch.equal(p, before[n]) and p.dim() > 1 and p.numel() > 1]
    assert trained and not stuck
    assert all(p.grad is None for _, p in trained)
    frozen = [n for n, p in training.model.named_parameters() if not p.requires_grad]
    assert all(torch.equal(before[n], p) for n, p in training.model.named_parameters() if n in frozen)


@pytest.mark.parametrize("name", [n for n in report.SAME_FUNCTION if n != "hf_plain"])
def test_losses_of_one_function_agree(name):
    torch.testing.assert_close(losses_of(started(name), 3), losses_of(started("hf_plain"), 3), rtol=1e-5, atol=0)


def test_losses_of_another_function_do_not():
    """The comparison above can fail: the innovation coupling perturbs the function by a share of a quarter."""
    assert abs(losses_of(started("ours_innovation"))[0] / losses_of(started("hf_plain"))[0] - 1) > 1e-5


def test_checkpointing_of_every_second_layer_and_on_the_host(monkeypatch):
    layers = started("hf_checkpointing_n").model.model.layers
    assert [layer.gradient_checkpointing for layer in layers] == [True, False] * (len(layers) // 2)
    training, seen, on_cpu = started("hf_checkpointing_offload"), [], torch.autograd.graph.save_on_cpu
    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", lambda **kwargs: seen.append(1) or on_cpu(**kwargs))
    losses_of(training, 1)
    assert len(seen) == len(layers)


def test_a_missing_package_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    result = run.outcome(run.measure, "lora", TINY, SETTINGS, 1, 1)
    assert result["status"] == "skipped" and "pip install peft" in result["reason"]


# --- operations ------------------------------------------------------------------------------------------------------


def test_operations_of_the_plain_model():
    """Against the count by hand: forward, and twice that in backward but for the first gradient and attention."""
    config = TINY.hf_config()
    tokens, D, L = TINY.batch * TINY.tokens, config.hidden_size, config.num_hidden_layers
    attention = 4 * D * D
    experts = config.num_experts_per_tok * 3 * D * config.moe_intermediate_size
    shared = 3 * D * config.shared_expert_intermediate_size + D
    per_token = L * (attention + experts + shared + config.num_experts * D) + D * config.vocab_size
    # Two products of T x T x D a sequence in forward and, recomputing the scores, five in backward.
    scores = L * TINY.batch * 7 * TINY.tokens**2 * D
    assert run.step_flops("hf_plain", TINY, SETTINGS) == 2 * (3 * tokens * per_token + scores)


def test_operations_are_linear_in_depth_and_tiles(monkeypatch):
    name, depth = "ours_innovation_tiles", 5
    workload = replace(TINY, overrides={**TINY.overrides, "num_hidden_layers": depth})
    direct, count, calls = run.count_step_flops(name, workload, SETTINGS, depth), run.count_step_flops, []
    monkeypatch.setattr(run, "count_step_flops", lambda *args: calls.append(args[1:]) or count(*args))
    assert run.step_flops(name, workload, SETTINGS) == direct
    assert [(w.batch, layers) for w, _, layers in calls] == [(1, 3), (1, 4)]


def test_which_depths_are_counted(monkeypatch):
    """Few layers of the same remainder by the period of the layers, and the whole model where it has no more."""
    calls = []
    monkeypatch.setattr(run, "count_step_flops", lambda name, w, s, layers: calls.append(layers) or 7 + 5 * layers)
    for depth, name, counted in ((24, "hf_checkpointing_n", [4, 6]), (7, "hf_checkpointing_n", [3, 5]),
                                 (24, "hf_plain", [3, 4]), (4, "hf_plain", [4])):  # fmt: skip
        calls.clear()
        workload = replace(TINY, overrides={**TINY.overrides, "num_hidden_layers": depth})
        assert run.step_flops(name, workload, SETTINGS) == 7 + 5 * depth
        assert calls == counted


# --- one result ------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_counting(monkeypatch):
    """Operations are not what is looked at, and counting them takes seconds."""
    monkeypatch.setattr(run, "step_flops", lambda *_: 10**6)


@pytest.fixture
def recordable(monkeypatch):
    """A clean tree and green tests."""
    monkeypatch.setattr(run, "provenance", lambda: CLEAN)
    monkeypatch.setattr(run, "green_tests", lambda: {"commit": "abc"})
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        run.main(list(arguments))
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    return text


def test_a_result(recordable, tmp_path, capsys):
    arguments = "--workload qwen1.5_16x2048 --method ours_innovation_tiles --tiny --steps 3"
    folder = tmp_path / "new" / "results"
    assert run.main([*arguments.split(), "--out", str(folder)]) == 0
    (file,) = folder.iterdir()
    assert file.name == "run_cpu_qwen1.5_16x2048_ours_innovation_tiles.json"
    result = json.loads(file.read_text())
    time = result["step_time_ms"]
    assert len(time["all"]) == 3 and len(result["losses"]) == 4
    assert min(time["all"]) <= time["quartiles"][0] <= time["median"] <= time["quartiles"][1] <= max(time["all"])
    assert result["tokens_per_second"] * time["median"] / 1000 == pytest.approx(TINY.batch * TINY.tokens)
    assert result["git"] == CLEAN["git"] and result["tests"] == {"commit": "abc"}
    assert result["versions"]["torch"] == torch.__version__ and result["device"]["num_threads"] == 1
    assert sum(result["live"]["parts"].values()) == result["live"]["peak_bytes"] > 0
    assert result["live"]["leaked_bytes"] == 0
    weights = 4 * result["num_parameters"]
    assert weights <= result["live"]["parts"]["weights"] < 1.01 * weights
    assert 1 < result["hardware_flops_per_step"] / result["model_flops_per_step"] < 2
    assert result["model_flops_share"] == pytest.approx(
        result["model_flops_per_step"] / (time["median"] / 1000) / result["matrix_flops_per_second"]
    )
    assert result["reversible"]["verified_states"] > 0 == result["reversible"]["mismatched_states_total"]
    assert "tokens/s" in capsys.readouterr().out


def test_live_tensors_of_a_peer():
    """Without `run_step`: at least weights and optimizer state, at most those and a model's worth more."""
    result = run.live_bytes(training := started("lomo"), TINY)
    weights = sum(p.nbytes for p in training.model.parameters())
    assert weights < result["peak_bytes"] < 3 * weights and result["parts"] is None


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--method hf_plane --workload cpu_float32", ("'hf_plane'", "hf_plain")),
        ("--pair hf_plain mine --workload cpu_float32", ("'mine'", "ours_innovation")),
        ("--method hf_plain --workload cpu_float23", ("'cpu_float23'", "cpu_float32")),
        ("--workload cpu_float32", ("None", "--method")),
    ],
)
def test_unknown_names_are_refused(arguments, words, capsys):
    text = refused(capsys, *arguments.split())
    assert all(word in text for word in words)


def test_a_gpu_workload_without_a_gpu_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--tiny" in refused(capsys, "--method", "hf_plain", "--workload", "olmoe_16x2048")


@pytest.mark.parametrize("commit", [None, "abc"])
def test_nothing_is_recorded_from_a_dirty_tree(recordable, no_counting, capsys, monkeypatch, tmp_path, commit):
    dirty = {"commit": commit, "dirty": commit and True, "changed": ["revffn/optim/in_backward.py"] if commit else []}
    monkeypatch.setattr(run, "provenance", lambda: {"git": dirty})
    call = ["--method", "hf_plain", "--workload", "cpu_float32", "--tiny", "--out", str(tmp_path)]
    assert "--allow-dirty" in refused(capsys, *call)
    assert run.main([*call, "--allow-dirty"]) == 0
    assert json.loads(next(tmp_path.iterdir()).read_text())["git"] == dirty


def test_nothing_is_recorded_without_green_tests(recordable, no_counting, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "green_tests", lambda: None)
    call = ["--method", "hf_plain", "--workload", "cpu_float32", "--tiny", "--out", str(tmp_path)]
    assert "--tests" in refused(capsys, *call)
    assert run.main([*call, "--allow-untested"]) == 0
    assert json.loads(next(tmp_path.iterdir()).read_text())["tests"] is None


@pytest.mark.parametrize("green", [True, False])
def test_the_stamp_of_the_tests(monkeypatch, tmp_path, green):
    """Green tests leave a stamp, red ones remove the old one, and other code has none."""
    (tmp_path / "test_it.py").write_text(f"def test_it():\n    assert {green}\n")
    monkeypatch.setattr(run, "TESTS", (str(tmp_path / "test_it.py"),))
    monkeypatch.setattr(run, "STAMP", tmp_path / "stamp.json")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run.STAMP.write_text("{}")
    assert (run.run_tests() == 0) is green
    assert run.STAMP.exists() is green and (run.green_tests() is not None) is green
    (tmp_path / "revffn" / "ops").mkdir(parents=True)
    (tmp_path / "revffn" / "ops" / "changed.py").write_text("")
    assert run.green_tests() is None


def test_out_of_memory_is_a_result_and_fit_halves_the_batch(recordable, monkeypatch, tmp_path):
    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 55 GiB.\nMore words.")

    monkeypatch.setattr(run, "measure", too_large)
    call = "--method hf_plain --workload cpu_float32 --tiny".split()
    assert run.main([*call, "--out", str(tmp_path)]) == run.FAILED
    result = json.loads(next(tmp_path.iterdir()).read_text())
    assert result["status"] == "out_of_memory" and result["reason"].endswith("55 GiB.")

    class Replaced(Exception):
        pass

    def execv(_, command):
        raise Replaced(command[2:])

    monkeypatch.setattr(run.os, "execv", execv)
    with pytest.raises(Replaced) as again:
        run.main([*call, "--fit", "--batch", "8", "--tried", "16"])
    arguments = run.parser().parse_args(again.value.args[0])
    assert (arguments.batch, arguments.tried, arguments.method, arguments.fit) == (4, [16, 8], "hf_plain", True)


def test_a_pair_is_taken_in_turns(recordable, monkeypatch, tmp_path, capsys):
    order = []
    start = run.start

    def followed(name, *args, **kwargs):
        training = start(name, *args, **kwargs)
        if kwargs.get("seed", 0) is not None:
            step = training.step
            training.step = lambda batch: order.append(name) or step(batch)
        return training

    monkeypatch.setattr(run, "start", followed)
    call = "--pair ours_none hf_checkpointing --workload cpu_float32 --tiny --steps 3 --out"
    assert run.main([*call.split(), str(tmp_path)]) == 0
    a, b = "ours_none", "hf_checkpointing"
    assert order == [a, b, a, b, b, a, a, b]  # a warm-up step each, then rounds
    result = json.loads(next(tmp_path.iterdir()).read_text())
    times = [x["all"] for x in result["step_time_ms"]]
    assert result["ratio"]["all"] == [x / y for x, y in zip(*times, strict=True)]
    assert result["flops_ratio"] == 1.0


# --- the suite for a GPU ---------------------------------------------------------------------------------------------


def suite(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, BENCHMARKS / "gpu_suite.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def test_the_list_names_all_rows(capsys, tmp_path):
    assert gpu_suite.main(["--list", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == [row.name for row in gpu_suite.ROWS]
    assert {row.arm for row in gpu_suite.ROWS} == set(gpu_suite.ARMS)
    assert {arm.method for arm in gpu_suite.ARMS.values()} <= set(methods.METHODS)
    assert all(workloads.WORKLOADS[row.workload].device == "cuda" for row in gpu_suite.ROWS)
    with pytest.raises(SystemExit, match="2"):
        gpu_suite.main(["--only", "nothing", "--out", str(tmp_path)])


def test_dry_run_of_a_row(tmp_path):
    """Without the packages that a bare GPU machine lacks; a second call finds the record and makes no other."""
    for name in ("trl", "datasets", "tyro"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not on this machine')")
    call = ("--dry-run", "--out", str(tmp_path), "--commit", "abc", "--only", "^qwen1.5_16x2048-innovation_m2-whole")
    done = suite(*call, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("*.json")
    record, written = json.loads(file.read_text()), file.stat().st_mtime_ns
    assert record["status"] == "ok" and record["tiny"] and record["commit"] == "abc"
    assert len(record["step_time_ms"]["all"]) == 3 and len(record["losses"]) == 4
    assert record["tokens_per_second"] * record["step_time_ms"]["median"] / 1000 == pytest.approx(32)
    assert record["reversible"]["verified_states"] > 0 == record["reversible"]["mismatched_states_total"]
    assert record["kernels"]["cpu"] == "torch" and record["versions"]["torch"] == torch.__version__
    profile = record["profile"]
    assert set(profile["ms"]) == set(gpu_profile.CATEGORIES) and 0 < profile["busy_ms"] <= profile["wall_ms"]
    assert len(file.with_suffix(".kernels.txt").read_text().splitlines()) == 60
    assert "1 ok" in suite(*call).stdout and file.stat().st_mtime_ns == written


def test_a_row_that_kills_its_process_is_recorded_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    commands = []

    def killed(command, env):
        names = [b for a, b in zip(command, command[1:], strict=False) if a == "--row"]
        commands.append((env["REVFFN_KERNELS"], names))
        row = gpu_suite.BY_NAME[names[0]]
        arguments = argparse.Namespace(commit="abc", dry_run=False)
        head = gpu_suite.head(row, arguments)
        gpu_suite.write_json(gpu_suite.record_file(row, tmp_path), {**head, "status": "running"})
        return subprocess.CompletedProcess(command, -9)

    monkeypatch.setattr(gpu_suite.subprocess, "run", killed)
    call = ["--only", "^olmoe", "--out", str(tmp_path), "--commit", "abc"]
    assert gpu_suite.main(call) == 1
    names = [row.name for row in gpu_suite.ROWS if row.name.startswith("olmoe")]
    assert [done[0] for _, done in commands] == names
    torch_only = [kernels == "torch" for kernels, _ in commands]
    assert torch_only == [gpu_suite.ARMS[gpu_suite.BY_NAME[name].arm].kernels == "torch" for name in names]
    records = [json.loads(file.read_text()) for file in tmp_path.glob("*.json")]
    assert all(r["status"] == "failed" and r["reason"] == "the process ended with status -9" for r in records)
    assert gpu_suite.main([*call, "--again", "--budget", "10"]) == 1 and len(commands) == len(names)


@pytest.mark.parametrize(
    "error, status, goes_on",
    [
        (gpu_suite.TooLong("took more than 9 s"), "failed", False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "failed", False),
        (ValueError("shapes"), "failed", True),
        (torch.OutOfMemoryError("Tried to allocate"), "out_of_memory", True),
        (methods.NotAvailable("needs it"), "skipped", True),
    ],
)
def test_what_a_row_leaves_when_it_fails(error, status, goes_on, monkeypatch):
    def fails(*_):
        raise error

    monkeypatch.setattr(gpu_suite, "measure", fails)
    written = []
    arguments = argparse.Namespace(commit="abc", dry_run=True, no_profile=True)
    call = (gpu_suite.ROWS[0], arguments, written.append, {})
    if goes_on:
        gpu_suite.run_row(*call)
    else:
        with pytest.raises(gpu_suite.Unusable):
            gpu_suite.run_row(*call)
    (record,) = written
    assert record["status"] == status and str(error) in record["reason"] and record["left_bytes"] == 0


@pytest.mark.parametrize(
    "kernel, expected",
    [
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NTT", "matrix products"),
        ("_ZN7cutlass13device_kernelIN2at4cuda6detail25enable_3x_kernel_for_sm9xINS_4gemm6kernel", "matrix products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4>>", "attention"),
        ("liger_cross_entropy_kernel", "loss"),
        ("_rms_norm_backward_kernel", "norms, RoPE"),
        ("_triton_rope", "norms, RoPE"),
        ("void at::native::(anonymous namespace)::distribution_elementwise_grid_stride_kernel<unsigned>", "optimizer"),
        ("void at_cuda_detail::cub::detail::radix_sort::DeviceRadixSortOnesweepKernel<policy_hub<>>", "experts' glue"),
        ("void at::native::kernelHistogram1D<int, int, int, 1, 2, -1>", "experts' glue"),
        ("void (anonymous namespace)::indexing_backward_kernel<c10::BFloat16, 4>(long const*)", "experts' glue"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<MinMaxOps<c10::BFloat16>>>", "streams"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "other elementwise"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("_gate", "experts' glue"),
        ("_gate_unknown", "other elementwise"),
    ],
)
def test_categories_of_kernels(kernel, expected, tmp_path):
    """By a table of names; kernels of our own by the folder they are in."""
    (tmp_path / "experts").mkdir()
    (tmp_path / "experts" / "kernels.py").write_text(
        "@triton.jit\ndef _gate(x): ...\n@triton.jit(do_not_specialize=['n'])\ndef _other(n): ...\ndef call(): ...\n"
    )
    own = gpu_profile.own_kernels(tmp_path)
    assert set(own) == {"_gate", "_other"}
    assert gpu_profile.category(kernel, own) == expected


def test_busy_time_counts_overlapping_kernels_once():
    assert gpu_profile.busy_us([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4 and gpu_profile.busy_us([]) == 0


def test_ligers_kernels_go_with_the_model(monkeypatch):
    """Stand-ins that compute the same: losses are those without them, and RoPE of the class is the old one after."""
    from transformers.models.qwen2_moe import modeling_qwen2_moe as module

    calls, rope = [], module.apply_rotary_pos_emb

    class Norm:
        @staticmethod
        def apply(x, weight, eps, *_):
            calls.append("norm")
            return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))

    class Mul:
        @staticmethod
        def apply(gate, up):
            calls.append("mul")
            return torch.nn.functional.silu(gate) * up

    def other_rope(*args):
        calls.append("rope")
        return rope(*args)

    for name, values in {
        "ops.rms_norm": dict(LigerRMSNormFunction=Norm),
        "ops.swiglu": dict(LigerSiLUMulFunction=Mul),
        "transformers.rope": dict(liger_rotary_pos_emb=other_rope),
    }.items():
        monkeypatch.setitem(sys.modules, f"liger_kernel.{name}", types.SimpleNamespace(**values))
    training = started("hf_same_kernels")
    torch.testing.assert_close(losses_of(training), losses_of(started("hf_plain")), rtol=1e-5, atol=0)
    assert {"norm", "mul", "rope"} == set(calls)
    training.stop()
    assert module.apply_rotary_pos_emb is rope


@pytest.mark.parametrize("name", ["qwen1.5_16x2048", "qwen3_16x2048", "olmoe_16x2048"])
def test_a_model_made_in_host_memory_has_the_same_values(name):
    workload = workloads.WORKLOADS[name].tiny()
    made, expected = (
        make(workload.hf_config(), "cpu", torch.bfloat16)
        for make in (methods.plain_model_on_host, methods.plain_model)
    )
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = (dict(getattr(model, kind)()) for model in (made, expected))
        assert ours.keys() == theirs.keys() and ours
        assert all(torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in ours)
    assert made.training and not any(p.is_meta for p in made.parameters())


def test_dispatches():
    """What a GPU's host issues does not grow; a layer with its optimizer is the layer and the optimizer, operations
    add up, and views launch nothing."""
    pytest.importorskip("triton", reason="without Triton the reference is counted")
    # The choice of kernels is a process's.
    command = [sys.executable, dispatches.__file__, "--json"]
    result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert result["kernels"] == "triton"
    assert result["further_tile"]["launching"] <= 120 and result["further_tile"]["all"] <= 325
    assert result["layer"]["launching"] <= 180 and result["layer"]["all"] <= 395
    for key in ("all", "launching"):
        assert result["layer"][key] == result["layer_without_optimizer"][key] + result["optimizer_of_a_layer"][key]
    for name in (*dispatches.NAMES, "step"):
        found = result[name]
        assert found["all"] == sum(row["number"] for row in found["by_operation"]) + found["other_operations"]
        assert 0 < found["launching"] <= found["all"]
    assert f"{result['further_tile']['all']:,}, launching" in dispatches.as_text(result)
    aten = torch.ops.aten
    launch = {aten.mm.default: True, aten.add_.Tensor: True, aten.view.default: False, aten.empty_like.default: False}
    assert {function: dispatches.launches(function) for function in launch} == launch


def test_results_rest_on_the_kernels_too():
    """A kernel that changed makes the tests' stamp void, like any other module."""
    files = {str(file.relative_to(run.ROOT)) for file in run.tested_files()}
    assert {f"revffn/ops/{folder}/kernels.py" for folder in ("dense", "experts", "streams", "update")} <= files
    assert {"revffn/engine/recompute.py", "tests/helpers.py", *run.TESTS} <= files


@pytest.mark.slow
def test_dry_run_of_the_suite(tmp_path):
    done = suite("--dry-run", "--out", str(tmp_path))
    found = [json.loads(file.read_text())["status"] for file in tmp_path.glob("*.json")]
    assert done.returncode == 0 and len(found) == len(gpu_suite.ROWS), done.stdout + done.stderr
    assert set(found) <= {"ok", "skipped"}


# --- the tables ------------------------------------------------------------------------------------------------------


def test_tables_of_the_suite(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_tables, "RESULTS", tmp_path)
    assert gpu_tables.gpu() == gpu_tables.gpu_kernels() == gpu_tables.NO_RESULTS
    arguments = argparse.Namespace(commit="abcdefgh", dry_run=False)
    for row in gpu_suite.ROWS[:4]:
        record = gpu_suite.head(row, arguments) | {"device": {"name": "H100"}}
        if row.arm.startswith("hf"):
            record |= {"status": "skipped", "reason": "needs | it\nand more"}
        else:
            record |= {"status": "ok", "tokens_per_second": 2e4 + (row.tile or 0), "peak_allocated_bytes": 2**30}
            record |= {"step_time_ms": {"median": 1400.0}, "issue_time_ms": {"median": 300.0}}
            record |= {"peak_reserved_bytes": None}
            record["reversible"] = {"verified_states": 26, "mismatched_states_total": 0}
        if row.profile and record["status"] == "ok":
            record["profile"] = {"ms": {"attention": 70.0}, "idle_ms": 5.0, "wall_ms": 1400.0, "num_kernels": 9000}
        gpu_suite.write_json(gpu_suite.record_file(row, tmp_path), record)
    gpu_suite.write_json(tmp_path / "gpu_tiny.json", {**record, "tiny": True})
    title, _, *table = gpu_tables.gpu().splitlines()
    assert title == "**qwen1.5_16x2048, H100** (abcdefg)"
    assert "tiles of 16,384 | 36,384 | 1,400 | 1.0 | – | 0 of 26 |" in table[2]
    assert all("whole batch" in line for line in table[3:5]) and "the last 15 layers" in table[4]
    assert "skipped: needs \\| it and more" in table[5] and len(table) == 6
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1
    kernels = gpu_tables.gpu_kernels().splitlines()
    assert "| attention | 70 |" in kernels and "| step | 1,400 |" in kernels


def test_tables_of_results(recordable, no_counting, monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.speed() == report.losses() == report.pairs() == report.NO_RESULTS
    for name in ("hf_plain", "ours_none"):
        assert run.main(f"--method {name} --workload cpu_float32 --tiny --out {tmp_path}".split()) == 0
    assert run.main(f"--pair hf_plain ours_none --workload cpu_float32 --tiny --out {tmp_path}".split()) == 0
    assert report.speed() == report.NO_RESULTS  # tiny runs are no results
    for file in tmp_path.iterdir():
        result = json.loads(file.read_text())
        result["settings"]["tiny"] = False
        if result.get("method") == "ours_none":
            result["losses"][1] *= 1.01
            result["git"]["dirty"] = True
        file.write_text(json.dumps(result))
    result["git"]["dirty"] = False
    failed = {**result, "kind": "run", "status": "failed", "reason": "it | crashed", "descriptions": ["a peer"]}
    (tmp_path / "run_cpu_peer.json").write_text(json.dumps({**failed, "method": "galore"}))
    table = report.speed()
    assert "| a peer | 2×16 | failed: it \\| crashed |" in table and "uncommitted changes" in table
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    columns = {line.replace("\\|", "").count("|") for line in rows}
    assert len(rows) == 4 and len(columns) == 1
    assert report.losses().splitlines()[-1].endswith("| 3 | 1.0e-02 |")
    assert "| 2 | **" in report.pairs()


# --- on the device ---------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["ours_innovation_tiles", "ours_cross_branch_right_tiles"])
def test_a_walk_in_bf16_with_fused_experts_rebuilds_every_state(name):
    """At the true width: a state that is off by one bit raises."""
    workload = workloads.WORKLOADS["qwen1.5_4x512"]
    hf_config = replace(workload, overrides={"num_hidden_layers": 6}).hf_config()
    training = methods.start(name, hf_config, "cuda", torch.bfloat16, SETTINGS, tile_tokens=1024)
    assert training.model.config._experts_implementation == "revffn"
    for batch in workload.batches(3):
        training.step(batch)
        found = reversible_report(training.model)
        assert found["verified_states"] >= 2 * 5 and found["mismatched_states_total"] == 0
    assert found["walks"] == 3


@pytest.mark.gpu
def test_losses_of_one_function_agree_in_bf16():
    """The first loss has the same weights; rounding of logits and sums is all that differs."""
    workload = workloads.WORKLOADS["qwen1.5_4x512"]
    hf_config = replace(workload, overrides={"num_hidden_layers": 4}).hf_config()
    batch = workload.batches(1)[0]
    first, second = (
        float(methods.start(name, hf_config, "cuda", torch.bfloat16, SETTINGS).step(batch))
        for name in ("hf_checkpointing", "ours_none_tiles")
    )
    assert first == pytest.approx(second, rel=2e-3)
