"""What a process takes of a batch, what a launcher says, and when another process counts as gone.

Run: pytest tests/parallel/test_parts.py
"""

import subprocess
import sys

import pytest
import torch
from test_runs import free_port
from torch.distributed import PrefixStore, TCPStore
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from revffn.__main__ import main
from revffn.command_line import load_run_config
from revffn.models.router_choices import counted_tokens
from revffn.parallel import peers
from revffn.parallel.launch import check_launch, is_first
from revffn.recipe import InputError
from revffn.training import several
from revffn.training.heldout import part_of
from revffn.training.preflight import check


def example(length: int, begin: int) -> dict[str, list[int]]:
    ids = list(range(begin, begin + length))
    return {"input_ids": ids, "labels": [-100, *ids[1:]], "seq_lengths": [length]}


def parts(examples, size, monkeypatch, flat=False):
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=flat)
    monkeypatch.setattr(several, "size", lambda: size)
    found = []
    for rank in range(size):
        monkeypatch.setattr(several, "rank", lambda rank=rank: rank)
        found.append(several.Part(collate, flat)(examples))
    return found


@pytest.mark.parametrize("lengths", [(5, 2, 7, 3), (5, 2, 7), (4,)])
@pytest.mark.parametrize("flat", [False, True])
def test_parts_of_a_batch_have_one_shape_and_all_of_it(lengths, flat, monkeypatch):
    examples = [example(length, 100 * (i + 1)) for i, length in enumerate(lengths)]
    whole = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=flat)(examples)
    found = parts(examples, 2, monkeypatch, flat)
    assert len({part["input_ids"].shape for part in found}) == 1
    learnt = lambda batch: batch["input_ids"][batch["labels"] != -100].tolist()  # noqa: E731
    assert [token for part in found for token in learnt(part)] == learnt(whole)
    if not flat:
        counted = [part["input_ids"][part["attention_mask"].bool()].tolist() for part in found]
        assert sum(counted, []) == whole["input_ids"][whole["attention_mask"].bool()].tolist()
        assert found[0]["input_ids"].shape[1] == max(lengths)
    else:
        masks = [counted_tokens(None, part["position_ids"]) for part in found]
        counted = [part["input_ids"][mask].tolist() for part, mask in zip(found, masks, strict=True)]
        assert sum(counted, []) == whole["input_ids"][0].tolist()


def test_parts_of_an_evaluation_batch_have_one_shape_and_all_of_it(monkeypatch):
    batch = {name: torch.arange(1, 13).view(3, 4) for name in ("input_ids", "labels", "attention_mask")}
    monkeypatch.setattr("revffn.training.heldout.size", lambda: 2)
    found = []
    for rank in range(2):
        monkeypatch.setattr("revffn.training.heldout.rank", lambda rank=rank: rank)
        found.append(part_of(batch))
    assert torch.equal(torch.cat([part["input_ids"] for part in found])[:3], batch["input_ids"])
    assert found[1]["labels"][1].tolist() == [-100] * 4 and found[1]["attention_mask"][1].tolist() == [0] * 4


# --- launchers -------------------------------------------------------------------------------------------------------

TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_torchrun_without_a_strategy_is_refused_in_one_line(recipe_file, refused, monkeypatch, capsys, tmp_path):
    for name, value in {**TORCHRUN, "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    recipe = recipe_file()
    line = refused("train", recipe)
    assert "WORLD_SIZE=2" in line and "parallel.strategy: fsdp" in line
    monkeypatch.setenv("RANK", "1")
    assert main(["train", str(recipe)]) == 2  # one of them speaks for all
    assert capsys.readouterr().err == "" and not (tmp_path / "run").exists()


def test_a_strategy_needs_a_launcher_that_says_where_to_meet():
    check_launch("fsdp", TORCHRUN)
    check_launch("fsdp", {})
    with pytest.raises(InputError, match="torchrun or accelerate launch"):
        check_launch("fsdp", {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"})
    assert is_first({}) and not is_first(TORCHRUN)


def test_experts_that_cannot_be_divided_are_refused_by_their_number(recipe_file, monkeypatch):
    for name, value in {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    recipe = recipe_file()
    with pytest.raises(InputError, match="a number of processes that divides the 6 experts of a layer, got 4"):
        check(load_run_config(recipe, ["--parallel.strategy", "ep"]), recipe)
    with pytest.raises(InputError, match="training.batch_size=6 is of all 4 processes together"):
        check(load_run_config(recipe, ["--parallel.strategy", "fsdp", "--training.batch_size", "6"]), recipe)


SETTINGS = {
    "a batch of eight": ["--parallel.strategy", "ddp"],
    "host": ["--parallel.strategy", "fsdp", "--memory.weights", "host"],
    "plain experts": ["--parallel.strategy", "ep", "--reversible.coupling", "null"],
    "comparison": ["--parallel.strategy", "fsdp", "--evaluation.compare_checkpointing", "1"],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_do_not_go_with_several_processes_are_refused(recipe_file, refused, name):
    line = refused("train", recipe_file(), *SETTINGS[name])
    assert "does not go with these settings; " in line


# --- peers -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def watch(monkeypatch):
    """One of two processes, whose thread does not run."""
    port = free_port()
    server = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setattr(peers.threading.Thread, "start", lambda self: None)
    found = peers.Watch(0, 2, lambda: "go on")
    found.server = server
    return found


def be_there(watch, pid: int, host: str) -> PrefixStore:
    watch.store.set("who/1", f"{host} {pid}")
    watch.store.set("alive/1", "0")
    return watch.store


def test_a_process_that_lives_or_is_done_is_not_gone(watch):
    assert watch.look() == {}  # it has not come yet
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    store = be_there(watch, process.pid, watch.host)
    assert watch.look() == {}
    process.kill()  # nobody has waited for it
    while peers.runs(process.pid):
        pass
    assert "has died" in watch.look()[1]
    process.wait()
    assert "has died" in watch.look()[1]
    store.set("done/1", "1")
    assert watch.look() == {}


def test_one_on_another_machine_is_gone_when_it_is_silent(watch, monkeypatch):
    store, now = be_there(watch, 1, "another"), 0.0
    monkeypatch.setattr(peers.time, "monotonic", lambda: now)
    assert watch.look() == {}
    now = peers.SILENCE - 1
    assert watch.look() == {}
    store.set("alive/1", "1")
    assert watch.look() == {}
    now += peers.SILENCE - 1
    assert watch.look() == {}
    now += 2
    assert "not been heard of" in watch.look()[1]


def test_one_that_ended_says_why(watch):
    be_there(watch, 1, "another").set("ended/1", "No space left on device")
    assert watch.look() == {1: "process 1 on another: No space left on device"}


def test_the_first_that_is_left_speaks(watch, monkeypatch, capfd):
    monkeypatch.setattr(peers.os, "_exit", lambda status: (_ for _ in ()).throw(SystemExit(status)))
    with pytest.raises(SystemExit) as ended:
        watch.end({1: "process 7 on m has died"})
    assert ended.value.code == 1
    assert capfd.readouterr().err == "revffn train: rank 1 of 2 is gone (process 7 on m has died); go on\n"
    watch.rank, watch.size = 2, 3
    with pytest.raises(SystemExit):
        watch.end({1: "process 7 on m has died"})
    assert capfd.readouterr().err == ""
