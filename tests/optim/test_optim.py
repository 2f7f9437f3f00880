"""Optimizer in backward: bit for bit the update made after backward (test_update_rules.py: the updates themselves);
clipping, non-finite gradients, resume, memory, HF Trainer and FSDP2.

Run: pytest tests/optim/test_optim.py (adamw8bit needs torchao)
"""

import copy
import math
import os
import socket
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from helpers import (
    COMMON,
    SETTINGS,
    assert_same,
    assert_same_state,
    build,
    coupled,
    rules,
    tiny_batch,
    tiny_model,
    train_steps,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from revffn.models.losses import use_linear_cross_entropy
from revffn.optim import NonFiniteGradientError, OptimizerInBackward, parameter_groups
from revffn.optim import rules as rules_of_optim

# --- in backward = after backward ---------------------------------------------------------------------------------


@rules
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_in_backward_equals_after_backward(rule, tied):
    models, optimizers = [], []
    for in_backward in (True, False):
        model = tiny_model("qwen2_moe", torch.bfloat16, tie_word_embeddings=tied).train()
        groups = parameter_groups(model, weight_decay=0.1)
        optimizer = build(rule, groups, in_backward=in_backward, max_grad_norm=0.5)
        before = copy.deepcopy(model)
        train_steps(model, optimizer)
        assert all(p.grad is None for p in model.parameters())
        moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True)]
        assert sum(moved) > 0.9 * len(moved)  # a norm's 32 weights of 1 may all round back
        models.append(model), optimizers.append(optimizer)
    assert_same(*models)
    assert_same_state(*optimizers)
    assert optimizers[0].grad_norm == optimizers[1].grad_norm > 0.5


@pytest.mark.parametrize("rule", ["sgd", "adamw", "adafactor"])
@pytest.mark.parametrize("tiles", [1, 8])
def test_reversible_model_in_tiles(rule, tiles):
    """The walk rebuilds each layer before the layer below it is touched, so stepping under way changes nothing."""
    models = []
    for in_backward in (True, False):
        model = coupled("qwen2_moe", torch.bfloat16, tile_tokens=8 * 11 // tiles)
        use_linear_cross_entropy(model)
        optimizer = build(rule, parameter_groups(model, 0.1), in_backward=in_backward)
        train_steps(model, optimizer, num_steps=2)
        models.append(model)
    assert_same(*models)


def test_equality_is_noticed_to_fail():
    """Another seed rounds otherwise: the comparison above is of bits."""
    models = []
    for seed in (0, 1):
        model = tiny_model("llama", torch.bfloat16).train()
        train_steps(model, build("adafactor", model.parameters(), seed=seed), num_steps=1)
        models.append(model)
    with pytest.raises(AssertionError):
        assert_same(*models)


def test_tied_parameter_waits_for_its_whole_gradient():
    """Autograd sums both uses before the one accumulation that the hook sees."""
    model = use_linear_cross_entropy(tiny_model("llama", tie_word_embeddings=True).train())
    weight = model.model.embed_tokens.weight
    assert weight is model.lm_head.weight
    model(**tiny_batch()).loss.backward()
    expected = weight.grad.clone()
    model.zero_grad()
    seen, order = [], []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, n=name: order.append(n))
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    optimizer = build("sgd", model.parameters())
    model(**tiny_batch()).loss.backward()
    optimizer.step()
    assert len(seen) == 1 and torch.equal(seen[0], expected)
    assert order[-1] == "model.embed_tokens.weight"


def test_head_steps_first_and_one_layer_is_alive_at_a_time():
    model = use_linear_cross_entropy(tiny_model("qwen2_moe").train())
    optimizer = build("sgd", model.named_parameters())
    alive, order = [], []
    for name, parameter in model.named_parameters():

        def note(p, name=name):
            order.append(name)
            alive.append(sum(q.grad is not None for q in model.parameters()))

        parameter.register_post_accumulate_grad_hook(note)
    model(**tiny_batch()).loss.backward()
    optimizer.step()
    assert order[0] == "lm_head.weight"
    layers = [name.split(".")[2] for name in order if ".layers." in name]
    assert layers == sorted(layers, reverse=True)
    assert max(alive) == 0


# --- torch.optim.Optimizer -----------------------------------------------------------------------------------------


@rules
@pytest.mark.parametrize("rounding", ["stochastic", "master"])
def test_resume_is_exact(rule, rounding, tmp_path):
    model = tiny_model("qwen2_moe", torch.bfloat16).train()
    options = dict(rounding=rounding, max_grad_norm=0.3, norm_decay=0.5)
    optimizer = build(rule, parameter_groups(model, 0.1), **options)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=4)
    train_steps(model, optimizer, 2), schedule.step(), schedule.step()
    torch.save([model.state_dict(), optimizer.state_dict(), schedule.state_dict()], tmp_path / "checkpoint")
    resumed = tiny_model("qwen2_moe", torch.bfloat16, seed=5).train()
    second = build(rule, parameter_groups(resumed, 0.1), seed=99, **options)
    second_schedule = torch.optim.lr_scheduler.LinearLR(second, 1.0, 0.1, total_iters=4)
    saved = torch.load(tmp_path / "checkpoint", weights_only=True)
    for target, state in zip((resumed, second, second_schedule), saved, strict=True):
        target.load_state_dict(state)
    assert_same_state(optimizer, second)
    assert train_steps(model, optimizer, 2, start=2) == train_steps(resumed, second, 2, start=2)
    assert_same(model, resumed)
    assert_same_state(optimizer, second)


def test_state_keeps_its_dtype_where_torch_would_cast():
    weight = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer = OptimizerInBackward([weight], rule="adamw")
    weight.sum().backward(), optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.state[weight]["exp_avg_sq"].dtype == torch.float32
    other = OptimizerInBackward([weight], rule="sgd")
    with pytest.raises(ValueError, match="saved by rule='adamw'"):
        other.load_state_dict(optimizer.state_dict())


def test_learning_rate_schedule_acts_in_backward():
    weight = nn.Parameter(torch.zeros(3))
    optimizer = OptimizerInBackward([weight], rule="sgd", lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for expected in (-1.0, -1.5, -1.75):
        optimizer.zero_grad()
        weight.sum().backward()
        assert weight[0] == expected
        optimizer.step()
        schedule.step()


def test_step_before_any_backward_and_closure():
    weight = nn.Parameter(torch.zeros(3))
    optimizer = OptimizerInBackward([weight], rule="sgd", lr=1.0)
    optimizer.step(), optimizer.zero_grad()
    assert optimizer.grad_norm is None and not weight.any()

    def closure():
        loss = weight.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 0
    assert weight[0] == -1 and optimizer.grad_norm == pytest.approx(3**0.5)


def test_unused_and_frozen_parameters_do_not_step():
    used, unused, frozen = (nn.Parameter(torch.ones(2)) for _ in range(3))
    frozen.requires_grad_(False)
    optimizer = OptimizerInBackward([used, unused, frozen], rule="adamw", weight_decay=0.5)
    (used * frozen).sum().backward()
    optimizer.step()
    assert used[0] != 1 and unused[0] == 1 and frozen[0] == 1
    assert set(optimizer.state) == {used}
    # Stage 2 unfreezes: step() has hooked what needs a gradient by now.
    frozen.requires_grad_(True)
    optimizer.attach()
    (used * frozen).sum().backward()
    assert frozen[0] != 1 and frozen.grad is None


def test_replaced_parameters_and_new_groups():
    old, added, new = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    optimizer = OptimizerInBackward([old], rule="sgd", lr=1.0)
    optimizer.add_param_group({"params": [added], "lr": 2.0})
    optimizer.param_groups[0]["params"] = [new]  # as accelerate does for FSDP2
    optimizer.attach()
    (old + added + new).sum().backward()
    optimizer.step()
    assert old[0] == 0 and old.grad is not None
    assert added[0] == -2 and new[0] == -1


def test_detach_and_deletion_leave_gradients():
    weight = nn.Parameter(torch.zeros(2))
    optimizer = OptimizerInBackward([weight], rule="sgd", lr=1.0)
    optimizer.detach()
    weight.sum().backward()
    assert weight[0] == 0 and weight.grad is not None
    optimizer.step()
    assert weight[0] == -1
    forgotten = OptimizerInBackward([weight], rule="sgd", lr=1.0)
    del forgotten
    weight.sum().backward()
    assert weight[0] == -1 and weight.grad is not None


def test_accelerate_wrapper():
    accelerate = pytest.importorskip("accelerate", reason="optional package accelerate; ends when it is installed")
    models = [tiny_model("qwen2_moe", torch.bfloat16).train() for _ in range(2)]
    optimizers = [build("adafactor", parameter_groups(model, 0.1)) for model in models]
    accelerator = accelerate.Accelerator(cpu=True)
    wrapped, optimizer = accelerator.prepare(models[0], optimizers[0])
    for step in range(2):
        optimizer.zero_grad()
        accelerator.backward(wrapped(**tiny_batch(8, 11, seed=step)).loss)
        optimizer.step()
    train_steps(models[1], optimizers[1], 2)
    assert_same(*models)


def test_trainer(tmp_path):
    """transformers.Trainer, unchanged: the same weights as the bare loop, schedule included; checkpoints resume."""
    from transformers import Trainer, TrainingArguments

    data = [{k: v[0] for k, v in tiny_batch(1, 11, seed=i).items()} for i in range(8)]

    def run(folder, resume=None):
        model = tiny_model("llama", torch.bfloat16).train()
        optimizer = build("adafactor", parameter_groups(model, 0.1))
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=4)
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=2, max_steps=4, save_steps=2, report_to=[], use_cpu=True,
            disable_tqdm=True, train_sampling_strategy="sequential", logging_steps=10,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, schedule))
        trainer.train(resume_from_checkpoint=resume)
        return model, optimizer

    model, optimizer = run(tmp_path / "a")
    resumed, _ = run(tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-2"))
    assert_same(model, resumed)
    bare = tiny_model("llama", torch.bfloat16).train()
    own = build("adafactor", parameter_groups(bare, 0.1))
    schedule = torch.optim.lr_scheduler.LinearLR(own, 1.0, 0.0, total_iters=4)
    for step in range(4):
        batch = {k: torch.stack([d[k] for d in data[2 * step : 2 * step + 2]]) for k in data[0]}
        bare(**batch, num_items_in_batch=(batch["labels"][:, 1:] != -100).sum()).loss.backward()
        own.step(), schedule.step()
    assert_same(model, bare)
    assert optimizer.grad_norm == own.grad_norm


def test_parameter_groups():
    model = tiny_model("gpt_oss", tie_word_embeddings=True)
    model.model.layers[0].mlp.router.weight.requires_grad_(False)
    decayed, plain = parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
    names = {name for group in (decayed, plain) for name, _ in group["params"]}
    assert names == {n for n, p in model.named_parameters() if p.requires_grad}
    assert "model.layers.0.mlp.router.weight" not in names
    assert {n.rsplit(".", 1)[1] for n, _ in decayed["params"]} == {"weight", "gate_up_proj", "down_proj"}
    assert all("norm" in n or n.endswith(("bias", "sinks")) for n, _ in plain["params"])
    optimizer = OptimizerInBackward([decayed, plain])
    bias = model.model.layers[1].mlp.experts.gate_up_proj_bias
    assert optimizer.name_of(bias) == "model.layers.1.mlp.experts.gate_up_proj_bias"
    model(**tiny_batch()).loss.backward()
    assert "exp_avg_sq" in optimizer.state[bias]  # a stack of vectors is not factored
    assert optimizer.state[model.model.layers[1].mlp.experts.gate_up_proj]["row"].shape == (6, 32)


# --- norms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["sgd", "adamw", "adafactor"])
def test_grad_norm_is_that_of_clip_grad_norm(rule):
    model, reference = (tiny_model("qwen2_moe").train() for _ in range(2))
    optimizer = build(rule, model.parameters())
    reference(**tiny_batch()).loss.backward()
    expected = nn.utils.clip_grad_norm_(reference.parameters(), float("inf")).item()
    model(**tiny_batch()).loss.backward()
    assert optimizer.grad_norm == pytest.approx(expected, rel=1e-5)
    optimizer.step()
    assert optimizer.grad_norm == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("norm_decay", [0.0, 0.5])
def test_clipping_by_the_norm_of_past_steps(norm_decay):
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = OptimizerInBackward([a, b], rule="sgd", lr=1.0, max_grad_norm=1.0, norm_decay=norm_decay)
    past = 0.0
    for size_a, size_b in ((0.3, 0.4), (3.0, 0.4), (0.3, 0.4), (0.3, 0.4)):
        before = a.item(), b.item()
        (size_a * a + size_b * b).sum().backward()
        optimizer.step()
        for start, now, own in zip(before, (a.item(), b.item()), (size_a, size_b), strict=True):
            assert start - now == pytest.approx(own * min(1.0, 1.0 / max(past, own)), rel=1e-5)
        norm = math.hypot(size_a, size_b)
        assert optimizer.grad_norm == pytest.approx(norm)
        past = norm if past == 0 else norm_decay * past + (1 - norm_decay) * norm
        assert optimizer.param_groups[0]["past_norm"] == pytest.approx(past)


# --- fake tensors and shards -----------------------------------------------------------------------------------------


@rules
def test_a_whole_model_on_fake_tensors(rule):
    with FakeTensorMode():
        config = AutoConfig.for_model("qwen2_moe", **{**COMMON, **SETTINGS["qwen2_moe"], "num_hidden_layers": 2})
        model = use_linear_cross_entropy(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train())
        optimizer = build(rule, parameter_groups(model, 0.1), max_grad_norm=1.0)
        for _ in range(2):
            model(**tiny_batch()).loss.backward()
            optimizer.step()
        assert all(p.grad is None for p in model.parameters())
        assert len(optimizer.state) == len(list(model.parameters()))


@pytest.fixture
def moves_swap():
    """Module.to() swaps parameters, as it always does where they are DTensors."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("again", [True, False])
def test_a_move_that_takes_the_hooks_is_seen(moves_swap, again):
    """Hooked again by `attach`; else gradients stay for one step, with a warning, and everything is updated."""
    model, untouched = (tiny_model("qwen2_moe").train() for _ in range(2))
    optimizer, other = (build("sgd", parameter_groups(m, 0.0), rounding="nearest") for m in (model, untouched))
    model.model.layers[0].to("cpu")
    if again:
        optimizer.attach()
    moved = {p for p in model.model.layers[0].parameters() if p.requires_grad}
    for step in range(2):
        for m in (model, untouched):
            m(**tiny_batch(2, 11, seed=step)).loss.backward()
        late = {p for p in model.parameters() if p.grad is not None}
        assert late == (moved if step == 0 and not again else set())
        with pytest.warns(RuntimeWarning, match=f"{len(moved)} parameters .* kept") if late else nullcontext():
            optimizer.step()
        other.step()
    for ours, theirs in zip(model.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def sharded_run(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    results = {}
    for rule in ("sgd", "adamw", "adafactor_momentum"):
        model = use_linear_cross_entropy(tiny_model("qwen2_moe").train())
        mesh = init_device_mesh("cpu", (2,))
        for module in (*model.model.layers, model.lm_head):
            fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = build(rule, parameter_groups(model, 0.1), max_grad_norm=0.5, rounding="nearest")
        for step in range(2):
            model(**tiny_batch(8, 11, seed=step)).loss.backward()
            assert all(p.grad is None for p in model.parameters())
            optimizer.step()
        experts = model.model.layers[0].mlp.experts.gate_up_proj
        assert isinstance(experts, DTensor) and experts.to_local().shape[0] == 3
        for key, value in optimizer.state[experts].items():
            assert key == "step" or isinstance(value, DTensor), key
        full = {name: p.full_tensor() for name, p in model.named_parameters()}
        results[rule] = full, optimizer.grad_norm
    # A gradient that is not finite on one rank only stops both at the same parameter.
    ones = partial(distribute_tensor, torch.ones(4, 4), mesh, [Shard(0)])
    weight, last = nn.Parameter(ones()), nn.Parameter(ones())
    optimizer = OptimizerInBackward([("weight", weight), ("last", last)], rule="adamw")
    weight.grad, last.grad = ones(), ones()
    weight.grad.to_local()[0, 0] = float("nan") if rank == 1 else 1.0
    optimizer._step_in_backward(weight), optimizer._step_in_backward(last)
    assert bool((last.to_local() == 1).all())
    with pytest.raises(NonFiniteGradientError, match="weight"):
        optimizer.step()
    # Rounding: a shard has the noise of its rows, whatever their number.
    torch.manual_seed(0)
    full = [torch.randn(shape).bfloat16() for shape in ((7, 6), (3, 4, 5), (5,))]
    for rule in ("adamw", "sgd", "sgd_momentum"):
        ours, whole = [nn.Parameter(distribute_tensor(w, mesh, [Shard(0)])) for w in full], [*map(nn.Parameter, full)]
        for weights in (ours, whole):
            optimizer = build(rule, [w.detach().clone().requires_grad_() for w in weights], weight_decay=0.1)
            for weight, grad in zip(optimizer.param_groups[0]["params"], full, strict=True):
                weight.grad = distribute_tensor(grad, mesh, [Shard(0)]) if weights is ours else grad.clone()
            optimizer.step()
            weights[:] = optimizer.param_groups[0]["params"]
        for weight, expected, start in zip(ours, whole, full, strict=True):
            assert torch.equal(weight.full_tensor(), expected) and not torch.equal(expected, start)
    if rank == 0:
        torch.save(results, folder / "results")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_fsdp2_equals_one_process(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.start_processes(sharded_run, (port, tmp_path), nprocs=2, start_method="fork")
    results = torch.load(tmp_path / "results", weights_only=True)
    for rule, (sharded, norm) in results.items():
        model = tiny_model("qwen2_moe").train()
        optimizer = build(rule, parameter_groups(model, 0.1), max_grad_norm=0.5, rounding="nearest")
        train_steps(model, optimizer, 2)
        assert norm == pytest.approx(optimizer.grad_norm, rel=1e-4)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(sharded[name], parameter.detach(), rtol=1e-3, atol=2e-5, msg=f"{rule} {name}")


def test_other_shardings_are_refused():
    class Column(nn.Parameter):
        placements = (torch.distributed.tensor.Shard(1),)

    weight = Column(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="needs shards along dimension 0"):
        OptimizerInBackward([weight], rule="adafactor")
    OptimizerInBackward([weight], rule="sgd").detach()


class Stream:
    """Stands for a CUDA stream: what it was told."""

    def __init__(self):
        self.waited = []

    def wait_event(self, event):
        self.waited.append(event)

    def record_event(self):
        return self, object()


def test_updates_on_another_stream_wait_for_those_before(monkeypatch):
    """FSDP2's hooks run on a stream of its own; the step's mask is every update's."""
    sharded = type("Sharded", (), {"device": torch.device("cuda")})
    monkeypatch.setattr(rules_of_optim, "DTensor", sharded)
    order, one, other = rules_of_optim.InOrder(), Stream(), Stream()
    for stream in (one, one, other, one):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, stream=stream: stream)
        order.wait(sharded())
        order.note(sharded())
    assert [event[0] for event in one.waited] == [other] and [event[0] for event in other.waited] == [one]
