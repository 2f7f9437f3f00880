"""What the planner keeps on disk: the same numbers again, sooner; whatever is wrong with it, worked out anew.

Run: pytest tests/memory/test_disk.py
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from revffn.__main__ import main
from revffn.memory import disk, measure, predict
from revffn.memory.fake import RememberingFakeTensorMode
from revffn.memory.plan import plan
from revffn.memory.simulation import Method
from revffn.models.known import load_config

KEY, VALUE = ["step", {"batch": 2}], {"forward": {"weights": 12}}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("REVFFN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def entries(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.json"))


def test_kept_and_found(cache):
    with disk.in_use():
        assert disk.recall(KEY) is None
        disk.remember(KEY, VALUE)
        assert disk.recall(KEY) == VALUE and disk.recall([*KEY, 1]) is None
    # A caller's own program may have changed what is measured.
    assert disk.recall(KEY) is None
    assert len(entries(cache)) == 1 and not list(cache.rglob(".*"))


DAMAGES = {
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "another value": lambda text: text.replace("12", "13"),
    "another key": lambda text: text.replace('"batch": 2', '"batch": 3'),
    "no mapping": lambda text: "[1]",
    "no digest": lambda text: json.dumps({"key": KEY, "value": VALUE}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_not_trusted(cache, damage):
    with disk.in_use():
        disk.remember(KEY, VALUE)
        (entry,) = entries(cache)
        entry.write_text(DAMAGES[damage](entry.read_text()))
        assert disk.recall(KEY) is None
        disk.remember(KEY, VALUE)
        assert disk.recall(KEY) == VALUE


@pytest.mark.parametrize("where", [os.devnull, "{tmp}/file", "{tmp}/file/below"])
def test_a_place_that_cannot_be_written_is_done_without(where, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("REVFFN_CACHE", where.format(tmp=tmp_path))
    with disk.in_use():
        disk.remember(KEY, VALUE)
        assert disk.recall(KEY) is None


def test_other_code_does_not_find_it(cache, monkeypatch):
    with disk.in_use():
        disk.remember(KEY, VALUE)
        monkeypatch.setattr(disk, "surroundings", lambda: "another")
        assert disk.recall(KEY) is None
        # Unknown surroundings: nothing is kept.
        monkeypatch.setattr(disk, "surroundings", lambda: None)
        disk.remember(KEY, VALUE)
    assert len(entries(cache)) == 1


def test_surroundings_are_code_packages_and_kernels(tmp_path, monkeypatch):
    """A byte in a source, a package's files and a variable each make others; an editable package makes none."""
    find = disk.surroundings.__wrapped__
    before = find()
    assert before == find()
    monkeypatch.setenv("REVFFN_KERNELS", "torch")
    assert find() != before
    monkeypatch.delenv("REVFFN_KERNELS")
    package = tmp_path / "revffn"
    (package / "memory").mkdir(parents=True)
    (package / "memory" / "disk.py").write_text("x = 1")
    monkeypatch.setattr(disk, "__file__", str(package / "memory" / "disk.py"))
    copied = find()
    (package / "memory" / "disk.py").write_text("x = 2")
    assert len({before, copied, find()}) == 3

    class Installed:
        version, files = "1", {"RECORD": "a.py,sha256=1,2"}

        def read_text(self, name):
            return self.files.get(name)

    monkeypatch.setattr(disk, "distribution", lambda name: Installed())
    installed = find()
    Installed.files = {"RECORD": "a.py,sha256=2,2"}
    assert installed and find() not in (None, installed)
    Installed.files |= {"direct_url.json": '{"dir_info": {"editable": true}}'}
    assert find() is None


def test_only_the_newest_folders_stay(cache, monkeypatch):
    with disk.in_use():
        for i in range(disk.NUM_FOLDERS + 2):
            monkeypatch.setattr(disk, "surroundings", lambda i=i: f"code{i}")
            disk.remember(KEY, VALUE)
            folder = cache / "plan" / f"code{i}"
            os.utime(folder, (time.time() - 1000 + i,) * 2)
    assert sorted(path.name for path in (cache / "plan").iterdir()) == ["code2", "code3", "code4", "code5"]


def test_measurements_are_kept(cache, monkeypatch):
    """The second time nothing is run; a caller's own coupling or a place out of use has it run."""
    hf_config = load_config("olmoe-1b-7b", num_hidden_layers=3, hidden_size=96)
    method = Method(optimizer="sgd")
    with disk.in_use():
        first = plan(hf_config, 2, 64, method, with_alternatives=False)
        assert entries(cache)
        fresh = {name: measure.cached(kind)(getattr(measure, name).__wrapped__) for name, kind in KEPT.items()}
        for name, function in fresh.items():
            monkeypatch.setattr(measure, name, function)
        monkeypatch.setattr(predict, "count", fresh["count"])
        monkeypatch.setattr(measure, "run_step", None)
        assert plan(hf_config, 2, 64, method, with_alternatives=False) == first
        monkeypatch.setitem(measure.COUPLINGS, "innovation", object())
        assert not measure.is_shipped(hf_config, method)
    assert measure.is_shipped(hf_config, replace(method, name="plain", reversible=None))


KEPT = {"count": measure.Counts, "small_step": measure.SmallStep}


def test_the_command_answers_the_second_time_without_torch(cache, tmp_path, capsys):
    """The same text, without importing what takes seconds; another config is another question."""
    folder = tmp_path / "model"
    load_config("olmoe-1b-7b", num_hidden_layers=2, hidden_size=96, vocab_size=512).save_pretrained(folder)
    words = ["plan", "--model", str(folder), "--batch", "2", "--tokens", "64", "--gpu", "1GiB", "--no-alternatives"]
    assert main(words) == 0
    first = capsys.readouterr().out
    code = (
        "import sys; sys.argv[0] = 'revffn'; from revffn.__main__ import main; status = main(sys.argv[1:]); "
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules], status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stdout == f"{first}[] 0\n"
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 96', '"hidden_size": 128'))
    assert main(words) == 0
    assert capsys.readouterr().out != first


# --- fake tensors, sooner --------------------------------------------------------------------------------------------


def operations(mode) -> list:
    """Metadata of what a few operations give, twice: fresh, views, in place, several, changed metadata."""
    found = []
    with mode:
        for dtype in (torch.bfloat16, torch.float32) * 2:
            x = torch.empty(3, 4, dtype=dtype)
            rows, parts = x.view(12)[2:8], torch.split(x, [1, 2])
            x.add_(1)
            values, order = x.t().sort(-1)
            results = [x, rows, *parts, values, order, x @ x.t(), x.sum(), x.to(torch.int32)[..., None]]
            grown = torch.empty(2, dtype=dtype)
            grown.resize_(5)
            for tensor in (*results, grown):
                shares = [i for i, other in enumerate(results) if same_storage(tensor, other)]
                bytes_of_it = tensor.untyped_storage().nbytes()
                found.append(
                    (tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, shares, bytes_of_it)
                )
    return found


def same_storage(a, b) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def test_remembered_operations_are_as_fake_tensors_have_them():
    expected = operations(FakeTensorMode())
    for _ in range(2):
        assert operations(RememberingFakeTensorMode()) == expected


def test_remembered_operations_know_aliases_devices_and_default_types():
    with RememberingFakeTensorMode():
        a, b = torch.ones(2), torch.ones(2)
        for _ in range(2):
            assert torch.add(a, b, out=b) is b and a.add_(a) is a and a.add_(b) is a
            assert torch.zeros(2).dtype == torch.float32
            torch.set_default_dtype(torch.float64)
            try:
                assert torch.zeros(2).dtype == torch.float64
            finally:
                torch.set_default_dtype(torch.float32)
            with pytest.raises(Exception, match="data-dependent|DataDependent|Dynamic|nonzero"):
                a.nonzero()
