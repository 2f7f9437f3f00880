"""Where examples come from: every kind of file, folders with splits, several sources with weights; what is held out.

Run: pytest tests/data/test_sources.py
"""

import csv
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from revffn.command_line import load_run_config
from revffn.data import load_conversations, load_split, read_file
from revffn.data.files import SUFFIXES
from revffn.recipe import DataConfig, InputError, Source

RECORDS = [{"question": f"{n} + {n}?", "answer": str(2 * n)} for n in range(20)]


def write(file, records=RECORDS):
    """A file of the kind that its name says."""
    kind = file.name.partition(".")[2]
    if kind.startswith("csv"):
        lines = [list(records[0]), *(record.values() for record in records)]
        with file.with_suffix(".plain").open("w", newline="") as out:
            csv.writer(out).writerows(lines)
        data = file.with_suffix(".plain").read_bytes()
        file.with_suffix(".plain").unlink()
    else:
        text = json.dumps(records) if ".json" in f".{kind}." and "jsonl" not in kind else ""
        data = (text or "\n".join(map(json.dumps, records))).encode()
    if kind == "parquet":
        Dataset.from_list(records).to_parquet(file)
    elif kind == "arrow":
        table = Dataset.from_list(records).data.table
        with pyarrow.OSFile(str(file), "wb") as out, pyarrow.ipc.new_stream(out, table.schema) as stream:
            stream.write_table(table)
    elif kind.endswith(".gz"):
        file.write_bytes(gzip.compress(data))
    elif kind.endswith(".zst"):
        with pyarrow.output_stream(str(file), compression="zstd") as out:
            out.write(data)
    else:
        file.write_bytes(data)
    return file


def load(path, **settings):
    return load_conversations(DataConfig(path=path, **{"heldout": 0, **settings}))


def asked(examples):
    return sorted(int(example["prompt"][0]["content"].partition(" ")[0]) for example in examples)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_kind_of_file(tmp_path, suffix):
    file = write(tmp_path / f"data{suffix}")
    training, _ = load(str(file))
    assert asked(training) == list(range(20)) and all(example.where.startswith(str(file)) for example in training)


@pytest.mark.parametrize("suffix", [*(s for s in SUFFIXES if s.endswith((".gz", ".zst"))), ".parquet", ".arrow"])
def test_a_broken_file_is_one_line(tmp_path, suffix, capfd):
    file = write(tmp_path / f"data{suffix}")
    for data in (b"hello" * 50, file.read_bytes()[:-30]):
        file.write_bytes(data)
        with pytest.raises(InputError) as error:
            load(str(file))
        assert str(error.value).startswith(f"{file}") and "\n" not in str(error.value)
        assert capfd.readouterr().err == ""


def test_what_a_table_has_to_fill_in_is_not_there(tmp_path):
    """In Parquet every object has the keys of all others."""
    call = lambda **arguments: {"function": {"name": "add", "arguments": arguments}}  # noqa: E731
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call(a=1)]}]
    others = [turns[0], {"role": "assistant", "content": "", "tool_calls": [call(b=2)]}]
    records = [{"messages": turns}, {"messages": others}, RECORDS[0]]
    empty = {"messages": None, "question": None, "answer": None}
    file = write(tmp_path / "data.parquet", [empty | record for record in records])
    assert [row for row, _ in read_file(file)] == records


def test_a_large_file_is_read_line_by_line(tmp_path):
    file = write(tmp_path / "data.jsonl.gz", RECORDS * 50)
    reader = read_file(file)
    assert next(reader) == (RECORDS[0], f"{file} line 1")
    assert len([*reader]) == 999


# --- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_is_all_its_files(tmp_path):
    for i, suffix in enumerate(SUFFIXES):
        write(tmp_path / f"part{i}{suffix}", [RECORDS[i]])
    (tmp_path / "README.md").write_text("about it")
    (tmp_path / "more").mkdir()
    write(tmp_path / "more" / "data.jsonl", [RECORDS[19]])
    assert asked(load(str(tmp_path))[0]) == [*range(len(SUFFIXES)), 19]


def test_names_are_names_and_no_patterns(tmp_path):
    folder = tmp_path / "a [b] *?"
    folder.mkdir()
    write(folder / "c[1].parquet", RECORDS[:5])
    write(folder / "d*.jsonl", RECORDS[5:])
    assert asked(load(str(folder))[0]) == list(range(20))
    assert asked(load(str(folder / "c[1].parquet"))[0]) == list(range(5))


def test_a_folder_s_files_are_of_the_split_that_their_names_say(tmp_path):
    write(tmp_path / "train-00000-of-00002.parquet", RECORDS[:8])
    write(tmp_path / "train-00001-of-00002.parquet", RECORDS[8:12])
    write(tmp_path / "test-00000-of-00001.jsonl", RECORDS[12:])
    assert asked(load(str(tmp_path))[0]) == list(range(12))
    assert asked(load(str(tmp_path), split="test")[0]) == list(range(12, 20))
    training, heldout = load(str(tmp_path), heldout=Source(path=str(tmp_path), split="test"))
    assert asked(training) == list(range(12)) and asked(heldout) == list(range(12, 20))
    with pytest.raises(InputError, match="no files of the split 'dev'. Found splits: train, test"):
        load(str(tmp_path), split="dev")


def test_a_folder_that_datasets_saved(tmp_path):
    parts = {"train": Dataset.from_list(RECORDS[:9]), "test": Dataset.from_list(RECORDS[9:])}
    DatasetDict(parts).save_to_disk(tmp_path / "both")
    parts["train"].shuffle(seed=0).select(range(5)).save_to_disk(tmp_path / "one")
    assert asked(load(str(tmp_path / "both"))[0]) == list(range(9))
    assert asked(load(str(tmp_path / "both"), split="test")[0]) == list(range(9, 20))
    assert len(load(str(tmp_path / "one"))[0]) == 5


def test_a_folder_without_data_is_one_line(tmp_path):
    (tmp_path / "notes.md").write_text("nothing")
    with pytest.raises(InputError, match="Found no file of .jsonl"):
        load(str(tmp_path))


def test_a_name_on_the_hub_is_asked_for_with_its_subset_and_split(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return Dataset.from_list(RECORDS)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    source = Source(path="openai/gsm8k", name="main")
    training, heldout = load(source, heldout=Source(path="openai/gsm8k", name="main", split="test"))
    assert calls == [(("openai/gsm8k", "main"), {"split": split}) for split in ("train", "test")]
    assert len(training) == len(heldout) == 20 and training[0].where.startswith("openai/gsm8k record ")


# --- several sources -------------------------------------------------------------------------------------------------


@pytest.fixture
def sources(tmp_path):
    """Of 20, 6 and 10 records: questions below 20, from 100 on and from 200 on."""
    sizes = {"a.jsonl": range(20), "b.csv": range(100, 106), "c.parquet": range(200, 210)}
    return [
        str(write(tmp_path / name, [{"question": f"{n} ?", "answer": "x"} for n in numbers]))
        for name, numbers in sizes.items()
    ]


def shares(examples):
    numbers = asked(examples)
    assert len(set(numbers)) == len(numbers)  # none twice
    return [sum(n // 100 == source for n in numbers) for source in range(3)]


def test_without_weights_all_of_all_sources_is_drawn(sources):
    training, heldout = load(sources, heldout=6)
    assert shares(training + heldout) == [20, 6, 10] and len(heldout) == 6
    assert [e.where for e in training] != [e.where for e in load(sources, heldout=6, seed=1)[0]]
    assert load(sources, heldout=6) == (training, heldout)


def test_weights_are_shares_up_to_the_source_that_runs_out_first(sources):
    def weighted(*weights, **settings):
        paths = [Source(path=path, weight=weight) for path, weight in zip(sources, weights, strict=True)]
        return load_split(DataConfig(path=paths, **{"heldout": 0, **settings}))

    assert shares(weighted(1, 1, 1).training) == [6, 6, 6]
    assert shares(weighted(20, 6, 10).training) == [20, 6, 10]
    assert shares(weighted(0.5, 0.125, 0.25).training) == [20, 5, 10]
    assert shares(weighted(0.3, 0.1, 0.1).training) == [18, 6, 6] == shares(weighted(3e-320, 1e-320, 1e-320).training)
    split = weighted(3, 1, 1)
    assert shares(split.training) == [18, 6, 6]
    said = [str(source).partition(": ")[2] for source in split.sources]
    assert said == ["20 records, 18 drawn", "6 records", "10 records, 6 drawn"]
    # What is held out is of the same mixture, and the same whatever is trained on.
    part = weighted(3, 1, 1, heldout=10, num_examples=5)
    assert part.heldout == weighted(3, 1, 1, heldout=10).heldout and len(part.training) == 5
    assert not [e for e in part.heldout if e in part.training]
    assert sum(source.drawn for source in part.sources) == 15
    with pytest.raises(InputError, match=r"a.jsonl: weight 0.01 is too small: it gives no example"):
        weighted(0.01, 1, 1)


# --- what is held out ------------------------------------------------------------------------------------------------


def test_held_out_is_a_number_a_share_or_a_source(tmp_path, sources):
    file = str(write(tmp_path / "all.jsonl"))
    assert [len(part) for part in load(file, heldout=5)] == [15, 5]
    assert load(file, heldout=0.25) == load(file, heldout=5)
    assert [len(part) for part in load(file, heldout=0.001)] == [19, 1]
    training, heldout = load(file, heldout=sources[1])
    assert asked(training) == list(range(20)) and asked(heldout) == list(range(100, 106))
    with pytest.raises(InputError, match=r"20 records, but 21 are needed: 20 for data.heldout=20 and at least 1 to"):
        load(file, heldout=20)
    with pytest.raises(InputError, match="^data.heldout 'nothing.jsonl': no such file"):
        load(file, heldout="nothing.jsonl")


def test_what_is_trained_on_is_not_held_out(tmp_path, monkeypatch):
    """However it is written; a file has no splits."""
    file = write(tmp_path / "all.jsonl")
    monkeypatch.chdir(tmp_path)
    for heldout in (str(file), "all.jsonl", "./all.jsonl", Source(path="all.jsonl", split="test")):
        with pytest.raises(InputError, match="^data.heldout .*all.jsonl.*: this is trained on"):
            load([str(file)], heldout=heldout)
    with pytest.raises(InputError, match="this is trained on"):
        load(str(tmp_path), heldout=".")


WRONG = {
    "a share of all": ({"heldout": 1.0}, "heldout must be a whole number of examples"),
    "a negative number": ({"heldout": "-1"}, "heldout must be a whole number of examples"),
    "no number": ({"heldout": "nan"}, "heldout must be a whole number of examples"),
    "no source": ({"path": []}, "path is an empty list"),
    "a weight for some": ({"path": [Source(path="a", weight=1), "b"]}, "1 of 2 sources have a weight. Give all one"),
    "a weight that is none": ({"path": Source(path="a", weight=float("nan"))}, "weights must be numbers above 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_settings_that_mean_nothing_are_refused(name):
    settings, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"path": "a.jsonl", **settings})


# --- in a recipe -----------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path):
    def config(data, *words):
        (tmp_path / "recipe.yaml").write_text(f"model: {{path: x}}\ndata:\n{data}")
        return load_run_config(tmp_path / "recipe.yaml", [*words]).data

    return config


def test_sources_in_a_recipe_and_on_the_command_line(recipe):
    listed = "  path:\n    - {path: a/b, name: main, split: validation, weight: 0.5}\n    - {path: c.csv, weight: 2}\n"
    first = Source(path="a/b", name="main", split="validation", weight=0.5)
    second = Source(path="c.csv", split="train", weight=2.0)
    assert recipe(listed).sources() == [first, second]
    assert recipe("  path: {path: c.csv, weight: 2}\n").sources() == [second]
    assert recipe(listed, "--data.path", "a.csv", "b.csv").path == ["a.csv", "b.csv"]
    for written, meant in (("16", 16), ("0.1", 0.1), ("a.csv", "a.csv"), ("{path: a.csv}", Source(path="a.csv"))):
        found = recipe(f"  path: b.csv\n  heldout: {written}\n").heldout
        assert found == meant and type(found) is type(meant)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("  path:\n    - {file: a.csv}\n", "line 4: data.path: the key 'file' is unknown. Accepted keys: path,"),
        ("  path:\n    - {path: a, path: b}\n", "line 4: data.path: the key 'path' is there twice"),
        ("  path:\n    - weight: 2\n", "line 4: data.path: a source has no path"),
        ("  path: {path: [a]}\n", "line 3: data.path: path takes one value, got a nested structure"),
        ("  path: [[a]]\n", "line 3: data.path takes a value or a list of values, got a nested structure"),
        ("  path: {path: a, weight: b}\n", "line 3: data.path: expected a text, a mapping with some of path, name"),
        ("  path: []\n", "line 3: data: path is an empty list"),
        ("  path: [null]\n", "line 3: data.path: expected a text, a mapping"),
        ("  heldout: 1.5\n", "line 3: data: heldout must be a whole number of examples"),
        ("  max_length: {path: a}\n", "line 3: data.max_length takes a value or a list of values"),
    ],
)
def test_mistakes_in_sources_are_one_line(recipe, tmp_path, data, message):
    with pytest.raises(InputError) as error:
        recipe(data)
    assert str(error.value).startswith(f"{tmp_path / 'recipe.yaml'} {message}") and "\n" not in str(error.value)


def test_the_name_of_before_is_taken_with_a_line(recipe, capsys):
    assert recipe("  num_heldout: 3\n").heldout == 3
    assert capsys.readouterr().err.endswith("line 3: data.num_heldout is called data.heldout now.\n")
    assert recipe("", "--data.num_heldout", "4").heldout == 4
    with pytest.warns(FutureWarning, match="num_heldout is called heldout now"):
        assert DataConfig(num_heldout=5).heldout == 5
