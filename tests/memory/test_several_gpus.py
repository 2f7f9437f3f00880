"""One rank of several: fake processes and fake tensors against real ones, the plan against the simulated step, what is
sent against what was counted, and what the planner says to do.

Run: pytest tests/memory/test_several_gpus.py; real processes, what would fit and benchmarks/several_gpus.py's cases
with -m slow (about a quarter of an hour). Run as a script this file is a worker of its own test:
python tests/memory/test_several_gpus.py RENDEZVOUS RANK
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from test_memory import benchmark, held
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as fsdp
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor import zeros as sharded_zeros
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig

from revffn import ReversibleConfig
from revffn.__main__ import main
from revffn.memory import measure as memory
from revffn.memory import plan as planner
from revffn.memory.answers import ACCEPTED_ERROR
from revffn.memory.live_bytes import LiveBytes
from revffn.memory.plan import changed_method, choose_tile, plan, what_would_fit
from revffn.memory.ranks import one_of
from revffn.memory.simulation import Method, build, run_step, simulate_step
from revffn.memory.wire import wire
from revffn.models.known import load_config
from revffn.optim.rules import local_part
from revffn.parallel.shard import all_ranks

CASES = benchmark("several_gpus")
KIB = 1024
STRATEGIES = ("fsdp", "ep")


def method(parallel: str = "fsdp", gpus: int = 2, **settings) -> Method:
    other = {name: settings.pop(name) for name in ("dtype", "optimizer", "received") if name in settings}
    reversible = ReversibleConfig.from_dict({"tile_tokens": 256, **settings})
    return Method(**{"optimizer": "sgd", **other}, reversible=reversible, gpus=gpus, parallel=parallel)


def config(num_layers: int = 5, **overrides):
    return load_config("olmoe-1b-7b", num_hidden_layers=num_layers, **overrides)


# --- counting --------------------------------------------------------------------------------------------------------


def test_a_storage_that_is_resized_dies_and_is_born_again():
    """As FSDP2 frees and fills gathered parameters; its peak is in the phase in which it was large."""
    with FakeTensorMode(), LiveBytes() as counter:
        counter.begin("gathered")
        tensor = torch.empty(4 * KIB, dtype=torch.uint8)
        counter.tag(tensor, "gathered")
        view = tensor.view(2, -1)
        tensor.untyped_storage().resize_(0)
        assert counter.live_bytes == 0
        counter.begin("free")
        other = torch.empty(KIB, dtype=torch.uint8)
        counter.begin("again")
        view.untyped_storage().resize_(4 * KIB)
        assert counter.live_bytes == 5 * KIB
        counter.begin("after")
    assert counter.parts("gathered")["gathered"] == counter.parts("again")["gathered"] == 4 * KIB
    assert counter.parts("free")["gathered"] == 0 and sum(counter.parts("free").values()) == KIB
    assert torch.UntypedStorage.resize_.__name__ == "resize_"  # as it was
    del other


def test_no_process_group_stays():
    for size in (1, 2):
        with one_of(size) as mesh:
            assert dist.is_initialized() == (size > 1) and (mesh is None) == (size == 1)
            if size > 1:
                assert mesh.size() == size and dist.get_rank() == 0
                with pytest.raises(RuntimeError, match="Plan first"), one_of(size):
                    pass
        assert not dist.is_initialized()
    with pytest.raises(KeyError), one_of(2):
        raise KeyError
    assert not dist.is_initialized()
    simulate_step(tiny(), 2, 32, method("ep"))
    assert not dist.is_initialized()


# --- fake against real -----------------------------------------------------------------------------------------------


def tiny():
    sizes = dict(hidden_size=64, intermediate_size=48, num_experts=8, num_experts_per_tok=2, vocab_size=96)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3, pad_token_id=None)
    return AutoConfig.for_model("olmoe", **sizes, **heads)


def real(parallel: str, received: float = 1.0) -> Method:
    sizes = dict(dtype=torch.float32, tile_tokens=32, optimizer="adafactor")
    return method(parallel, received=received, **sizes)


def least(phase: str, results: list[dict]) -> dict[str, int]:
    return min((result["phases"][phase] for result in results), key=lambda parts: sum(parts.values()))


def worker(rendezvous: str, rank: int) -> None:
    from revffn.engine.exchange import Exchange
    from revffn.parallel.shard import all_ranks

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    shares = set()
    sizes = Exchange.sizes

    def noted(*args):
        sent, received = sizes(*args)
        shares.add(sum(received) / sum(sent))
        return sent, received

    Exchange.sizes = noted
    for parallel in STRATEGIES:
        results = []
        for _ in range(4):
            torch.manual_seed(0)
            model = build(tiny(), real(parallel), all_ranks("cpu"))
            for layer in model.model.layers:  # routers then see no difference between tokens
                local_part(layer.mlp.gate.weight.detach()).zero_()
            results.append(run_step(model, 2, 32, real(parallel)))
        # A thread of gloo's may hold what it has sent for a moment more than the step does.
        result = results[-1] | {"phases": {p: least(p, results) for p in results[0]["phases"]}}
        found = {name: result[name] for name in ("phases", "sent", "leaked_bytes")} | {"shares": [*shares]}
        if rank == 0:
            print("result", json.dumps(found), flush=True)
    dist.destroy_process_group()


@pytest.mark.slow
def test_fake_processes_take_what_real_ones_take(tmp_path):
    """The same step of two real processes on gloo, on real tensors, has the same bytes alive in every phase."""
    command = [sys.executable, __file__, str(tmp_path / "rendezvous")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    settings = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    workers = [subprocess.Popen([*command, str(rank)], **settings) for rank in range(2)]
    try:
        outputs = [process.communicate(timeout=300) for process in workers]
    finally:
        for process in workers:
            process.kill()
    lines = [line.removeprefix("result ") for line in outputs[0][0].splitlines() if line.startswith("result ")]
    assert len(lines) == 2, outputs[0][1][-2000:] + outputs[1][1][-2000:]
    for parallel, line in zip(STRATEGIES, lines, strict=True):
        found = json.loads(line)
        (share,) = found["shares"] or [1.0]  # all tokens chose the same experts
        fake = simulate_step(tiny(), 4, 32, real(parallel, share))
        assert found["leaked_bytes"] == fake["leaked_bytes"] == 0
        for name in ("gathers", "reductions"):
            assert found["sent"][name] == fake["sent"][name], name
        assert set(found["phases"]) == set(fake["phases"])
        for phase, parts in fake["phases"].items():
            expected = pytest.approx(sum(found["phases"][phase].values()), abs=4 * KIB)
            assert sum(parts.values()) == expected, (parallel, phase)


# --- predicted against simulated -------------------------------------------------------------------------------------

SMALL = {
    "fsdp": ("olmoe-1b-7b", 5, 10, 128, method("fsdp")),
    "ep": ("olmoe-1b-7b", 5, 10, 128, method("ep")),
    # A dense layer first, routers in float32, shared experts; a number of ranks that divides few dimensions.
    "leading dense layer": ("deepseek-v2-lite", 6, 8, 256, method("ep", gpus=8, optimizer="adafactor")),
    "uneven": ("qwen1.5-moe-a2.7b", 5, 7, 256, method("fsdp", gpus=7, coupling="none")),
}


@pytest.mark.parametrize("case", SMALL)
def test_prediction_against_simulation(case):
    """Bytes at the peak within 3 %, and what is sent as it was counted, operation by operation."""
    *_, batch, _, way = SMALL[case]
    answer = held(*SMALL[case])
    assert answer.batch == batch and answer.gpus == way.gpus


@pytest.mark.parametrize("parallel", STRATEGIES)
def test_what_is_sent_is_what_was_counted(parallel):
    way = method(parallel)
    sent = simulate_step(config(2), 4, 256, way)["sent"]
    told = wire(config(2), 4, 256, way)[0]
    assert told.strategy == parallel and told.tokens == 2 * 256
    for name in ("gathers", "reductions", "rows"):
        assert getattr(told, name) == pytest.approx(sent.get(name, 0), rel=CASES.ACCEPTED_WIRE), name
    assert sum(sent.values()) == pytest.approx(told.num_bytes, rel=CASES.ACCEPTED_WIRE)


def test_ep_sends_less_up_to_the_break_even():
    first, second = wire(config(2), 2, 64, method("ep"))
    assert (first.strategy, second.strategy) == ("ep", "fsdp") and first.num_bytes < second.num_bytes
    even = first.break_even_tokens
    for tokens, less in ((even, True), (even + 1, False)):
        ep, fsdp = wire(config(2), 2, tokens, method("ep"))
        assert (ep.num_bytes <= fsdp.num_bytes) == less, tokens


@pytest.mark.parametrize("parallel", STRATEGIES)
def test_computing_hides_sending_from_the_tokens_it_says(parallel):
    """Seconds are bytes over the link, and at that number of tokens computing takes as long."""
    link, rate = 50e9, 100e12
    first = wire(config(2), 2, 4096, method(parallel), link, rate)[0]
    assert first.seconds == pytest.approx(first.num_bytes / link)
    at = wire(config(2), 2, first.hidden_tokens, method(parallel), link, rate)[0]
    of_token = sum(
        8 * (p.numel() * 8 / 64 if p.dim() == 3 else p.numel())
        for p in build_on_meta(config(2)).model.layers.parameters()
    )
    assert at.seconds == pytest.approx(of_token * first.hidden_tokens / rate, rel=1e-3)
    assert wire(config(2), 2, 4096, method("ep"), 1e3, 1e18)[0].hidden_tokens is None


def build_on_meta(hf_config):
    with torch.device("meta"):
        return build(hf_config, Method())


def test_a_second_part_of_the_rows():
    """What the plan says of a rank that receives twice its part is what such a step takes; a third takes as much."""
    way = method("ep", tile_tokens=None)
    answer = plan(config(4), 8, 512, way, with_alternatives=False)
    one, two, three = (
        simulate_step(config(4), 8, 512, method("ep", tile_tokens=None, received=share))["peak_bytes"]
        for share in (1, 2, 3)
    )
    assert answer.peak_bytes == pytest.approx(one, rel=1e-6)
    assert answer.second_part_bytes == pytest.approx(two - one, rel=0.01) and two > one
    assert three - two == pytest.approx(two - one, rel=0.01)


FAULTS = {
    "memory of gathered parameters is not given back": (LiveBytes, "resize", lambda *_: None),
    "the layer on its way is forgotten": (fsdp.FSDPParamGroup, "_backward_prefetch", lambda *_: None),
    "what is being summed is forgotten": (
        fsdp, "ReduceScatterState", lambda tensor, event: SimpleNamespace(reduce_scatter_input=None, event=event),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def truth() -> int:
    return simulate_step(config(4), 4, 192, method())["peak_bytes"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_plan_that_is_wrong_is_found_out(fault, truth, monkeypatch):
    """Each of what FSDP2 holds shows, if the plan leaves it out."""
    monkeypatch.setattr(*FAULTS[fault])
    # Another key of the cache for each, the same step.
    told = plan(config(4), 4, 192, method(num_iterations=11 + len(fault)), with_alternatives=False).peak_bytes
    assert abs(told / truth - 1) > ACCEPTED_ERROR


# --- what to do ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_would_fit_names_more_gpus_and_the_other_strategy():
    hf_config, way = config(4), method("fsdp")
    limit = plan(hf_config, 8, 256, way, with_alternatives=False).total_bytes - 64 * 2**20
    changes = what_would_fit(hf_config, 8, 256, way, gpu_bytes=limit)
    assert {"parallel": "ep"} in [change.settings for change in changes]
    assert any(change.settings.keys() == {"gpus"} for change in changes)
    for change in changes:
        batch, changed = change.settings.get("batch", 8), changed_method(way, change.settings)
        assert batch % changed.gpus == 0
        tokens = change.settings.get("tokens", 256)
        total = plan(hf_config, batch, tokens, changed, with_alternatives=False).total_bytes
        assert total == change.total_bytes <= limit, change


@pytest.mark.slow
def test_the_largest_batch_is_of_all_ranks():
    hf_config, way = config(4), method("ep")
    limit = plan(hf_config, 40, 256, way, with_alternatives=False).total_bytes
    assert plan(hf_config, 4, 256, way, gpu_bytes=limit, with_alternatives=False).largest_batch == 40


def test_a_tile_has_room_for_a_rank_that_receives_more(monkeypatch):
    monkeypatch.setattr(planner, "SMALLEST_TILE", 1024)
    hf_config, way = config(4), method("ep", tile_tokens=None)
    even = plan(hf_config, 8, 1024, way, with_alternatives=False)
    limit = even.total_bytes + even.second_part_bytes
    assert choose_tile(hf_config, 8, 1024, way, limit_bytes=limit).tile_tokens is None
    assert choose_tile(hf_config, 8, 1024, way, limit_bytes=limit - 1).tile_tokens is not None


# --- the command -----------------------------------------------------------------------------------------------------

QUESTION = ["plan", "--model", "olmoe-1b-7b", "--batch", "4", "--tokens", "64", "--gpus", "2"]
BAD = {
    "a batch that cannot be divided": (["--batch", "3"], "got 3. Give a multiple of 2."),
    "experts that cannot be divided": (["--parallel", "ep", "--gpus", "3", "--batch", "3"], "the 64 experts"),
    "weights on the host": (["--weights", "host"], "are for one GPU"),
    "no GPU": (["--gpus", "0"], "gpus must be at least 1, got 0"),
    "no link": (["--gpu_link_gb_per_s", "0"], "gpu_link_gb_per_s must be a number above 0, got 0.0"),
    "another strategy": (["--parallel", "ddp"], "fsdp"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, capsys, monkeypatch):
    monkeypatch.setattr(memory, "run_step", None)
    words, message = BAD[name]
    assert main([*QUESTION, *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("revffn plan: ") and error.count("\n") == 1
    assert message in error
    assert not dist.is_initialized()


def test_command(tmp_path, capsys):
    config(2).save_pretrained(tmp_path)
    words = ["plan", "--model", str(tmp_path), "--batch", "4", "--tokens", "64", "--tile_tokens", "64"]
    words += ["--gpus", "2", "--parallel", "ep"]
    assert main([*words, "--gpu_link_gb_per_s", "100", "--gpu", "80GiB", "--no-alternatives"]) == 0
    text = capsys.readouterr().out
    for said in ("one of 2 GPUs", "gathered", "exchange", "2 x tokens", "ep sends less than fsdp", "At 100 GB/s"):
        assert said in text
    assert "twice its part" in text and "ep, 2 layers kept fits 80GiB" in text
    assert main([*words, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    labels = [way["label"] for way in answer["alternatives"]]
    assert len(labels) == 4 and sum("fsdp" in label for label in labels) == 3
    assert [way["strategy"] for way in answer["wire"]] == ["ep", "fsdp"]
    assert answer["wire"][0]["seconds"] is None
    for way in (answer, *answer["alternatives"]):
        assert way["gpus"] == 2 and way["peak_bytes"] == sum(way["parts"].values())


# --- full size -------------------------------------------------------------------------------------------------------


def test_the_file_holds_the_plan_to_its_word():
    results = json.loads(CASES.FILE.read_text())
    assert list(results) == [CASES.name_of(case) for case in (*CASES.CASES, *CASES.NODE)]
    for case in CASES.CASES:
        found = results[CASES.name_of(case)]
        told = CASES.errors(found["predicted"], found["simulated"])
        assert told == {name: found[name] for name in told}
        assert abs(told["relative_error"]) <= ACCEPTED_ERROR
        assert abs(told["relative_error_sent"]) <= CASES.ACCEPTED_WIRE
        assert found["simulated"]["leaked_bytes"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.CASES, ids=CASES.name_of)
def test_full_size(case):
    found = CASES.run_case(case)
    assert abs(found["relative_error"]) <= ACCEPTED_ERROR
    assert abs(found["relative_error_sent"]) <= CASES.ACCEPTED_WIRE
    # As the file has it.
    known = json.loads(CASES.FILE.read_text())[CASES.name_of(case)]
    assert found["simulated"]["peak_bytes"] == pytest.approx(known["simulated"]["peak_bytes"], rel=ACCEPTED_ERROR)


def test_no_trace_is_left_of_a_rank_that_was_planned():
    """DTensor remembers results by mesh, and a later group of as many ranks has an equal one: as another rank of it
    this process has other rows."""

    def rows(mesh) -> int:
        sharded = distribute_tensor(torch.zeros(97, 4), mesh, [Shard(0)], src_data_rank=None)
        mesh = (sharded.detach() + 1).device_mesh
        return sharded_zeros(97, device_mesh=mesh, placements=[Shard(0)]).to_local().numel()

    with one_of(2) as mesh:
        assert rows(mesh) == 49
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    try:
        assert rows(all_ranks("cpu")) == 48
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    worker(sys.argv[1], int(sys.argv[2]))
