"""Going on with a run: what its folder holds, and whether it is the run that is asked for now.

run.json records the settings that ran. Those that say how long and how often may differ now, are applied and recorded;
any other that differs would make another run under the same name, and is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from ..data.tokens import Row
from ..files import read_json
from ..recipe import InputError, RunConfig
from .checkpoint import STATES, newest, read_manifest
from .lock import LOCK

MODEL, METRICS, ROUTERS, SUMMARY = "model", "metrics.jsonl", "router.jsonl", "run.json"
MAY_DIFFER = (
    "training.output_dir",
    "training.resume",
    "training.num_steps",
    "training.num_epochs",
    "training.save_steps",
    "training.save_on_interrupt",
    "training.log_steps",
    "training.report_to",
    "memory.limit",
    "memory.force",
    "memory.weights",  # bit for bit the same training
    "evaluation.",
    "parallel.",  # the same training but for rounding
    "reversible.tile_tokens",  # kept as recorded
    "reversible.kept_layers",  # bit for bit the same training
)
"""What a run that goes on may be told anew: names, and sections."""
UNKNOWN = object()


@dataclass(frozen=True)
class Resume:
    """What a run goes on from."""

    checkpoint: Path | None = None
    """None begins at the beginning."""
    num_tokens: int = 0
    """Trained on in the checkpoint's stage."""
    seconds: float = 0.0
    """Of the whole run until the checkpoint."""
    summary: dict[str, Any] = field(default_factory=dict)
    """The run's record until now."""
    finished: bool = False
    """There is nothing to do."""
    says: tuple[str, ...] = ()
    """Lines for the user."""


def find(config: RunConfig, output_dir: Path) -> Resume:
    """What to go on from, if asked; refuses a folder that holds something otherwise.

    Raises:
        InputError: One line with the way on.
    """
    inside = contents(output_dir)
    if not config.training.resume:
        if inside is None or inside:
            way = "Name another folder, or delete this one"
            if inside and SUMMARY in inside:
                way = "Name another folder, delete this one, or set training.resume: true to go on with its run"
            raise InputError(f"training.output_dir {output_dir} is not empty. {way}.")
        return Resume()
    if not inside or SUMMARY not in inside:
        check_nothing_is_lost(output_dir)
        raise InputError(
            f"training.resume: no run and no checkpoint in {output_dir}. To start one leave training.resume out."
        )
    summary = read_summary(output_dir)
    without = STATES if config.training.resume == "weights" else ()
    found = newest(output_dir, without=without)
    checkpoint = found.checkpoint
    finished = bool(summary.get("finished")) and (output_dir / MODEL).is_dir()
    if checkpoint is None and not finished:
        check_not_trained(output_dir)
        return from_the_beginning(output_dir, found.passed_over)
    compare(summary["config"], config, output_dir)
    if finished and not asks_for_more(summary, config, output_dir):
        line = f"{output_dir}: this run is finished, its model is {output_dir / MODEL}. Nothing was changed. "
        setting = "evaluation.patience" if summary.get("stopped_early") else "training.num_steps"
        return Resume(finished=True, says=(line + f"A larger {setting} goes on with it.",))
    if checkpoint is None:
        raise InputError(
            f"{output_dir}: this run is finished and has no complete checkpoint to go on from"
            f"{listed(found.passed_over)}. Name another training.output_dir."
        )
    state, manifest = read_state(checkpoint), read_manifest(checkpoint)
    check_steps(config, checkpoint, state)
    says = [f"Resuming from {checkpoint}, step {state['global_step']}{listed(found.passed_over)}."]
    absent = [name for name in without if not (checkpoint / name).is_file()]
    if absent:
        says.append(f"Without {', '.join(absent)}, as asked: this is not the run that was interrupted.")
    return Resume(checkpoint, manifest.get("num_tokens", 0), manifest.get("seconds", 0.0), summary, says=tuple(says))


def contents(output_dir: Path) -> set[str] | None:
    """Names in a run's folder, without a lock and what an interrupted write left; None if it is no folder."""
    if not output_dir.exists():
        return set()
    if not output_dir.is_dir():
        return None
    names = {path.name for path in output_dir.iterdir()} - {LOCK}
    return {name for name in names if not (name.startswith(".") and ".partial-" in name)}


def check_nothing_is_lost(output_dir: Path) -> None:
    """Without its record a run cannot go on; whoever has checkpoints is told so."""
    found = newest(output_dir, contents=False).checkpoint
    if found is not None:
        raise InputError(
            f"training.resume: {output_dir / SUMMARY} is missing, which says what the run of {found} was told. Put it "
            "back, or name another training.output_dir."
        )


def check_not_trained(output_dir: Path) -> None:
    """A run that was broken off while its model was measured has nothing left to train."""
    if (output_dir / MODEL).is_dir():
        raise InputError(
            f"training.resume: the trained model of this run is complete in {output_dir / MODEL}, only {SUMMARY} "
            "lacks what came after. To train again name another training.output_dir."
        )


def from_the_beginning(output_dir: Path, passed_over: list[str]) -> Resume:
    if passed_over:
        raise InputError(
            f"training.resume: no complete checkpoint in {output_dir}{listed(passed_over)}. Delete the folder to "
            f"start again; where only {', '.join(STATES)} are missing, training.resume: weights goes on without them."
        )
    return Resume(says=(f"{output_dir}: the run there has no checkpoint yet, it starts from the beginning.",))


def listed(passed_over: list[str]) -> str:
    return f"; passed over as incomplete: {', '.join(passed_over)}" if passed_over else ""


# --- what is recorded ------------------------------------------------------------------------------------------------


def read_summary(output_dir: Path) -> dict[str, Any]:
    """run.json of a run that is gone on with.

    Raises:
        InputError: It is cut, or not one.
    """
    file = output_dir / SUMMARY
    try:
        summary = read_json(file)
    except ValueError as error:
        raise InputError(f"training.resume: {error}. Put it back, or name another training.output_dir.") from None
    try:
        Record.model_validate(summary)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"training.resume: {file} is not a run's record{where(error)}. Put it back, or name another "
            "training.output_dir."
        ) from None
    return summary


Count = Annotated[int, Field(ge=0, lt=2**63)]
Text = Annotated[str, AfterValidator(lambda text: text.encode().decode())]  # can be printed: no half characters


class Loss(BaseModel, strict=True):
    loss: float


class Memory(BaseModel, strict=True):
    batch: Count
    tokens: Count
    predicted_bytes: Count
    measured_bytes: Count


class Stopped(BaseModel, strict=True):
    evaluations: Count


class Record(BaseModel, strict=True):
    """What is taken over from run.json: its form."""

    finished: bool = False
    config: dict[str, dict[str, Any]]
    data_sha256: str | None = None
    heldout: dict[Text, Loss]
    answers: dict[Text, Text]
    step_bytes: dict[str, dict[Literal["kept_bytes", "peak_bytes"], Count]]
    num_tokens: dict[str, Count]
    memory: Memory | Annotated[dict[str, Any], Field(max_length=0)]
    peak_bytes: Count = 0
    stopped_early: Stopped | None = None


def where(error: Exception) -> str:
    """The place of a validation's first error."""
    if not isinstance(error, ValidationError):
        return ""
    return f" ({'.'.join(map(str, error.errors()[0]['loc'][:3]))})".encode("ascii", "replace").decode()[:200]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The trainer's own: its manifest says that it is whole."""
    return read_json(checkpoint / "trainer_state.json")


def compare(recorded: dict[str, Any], config: RunConfig, output_dir: Path) -> None:
    """Refuse a run whose settings are not those that the folder's run was told.

    Raises:
        InputError: Names each setting that differs, with both values.
    """
    differing = []
    for name, value in leaves(json.loads(json.dumps(asdict(config)))):
        before = recorded_value(recorded, name)
        if before is not UNKNOWN and not name.startswith(MAY_DIFFER) and not same(name, value, before):
            differing.append(f"{name}={short(value)}, recorded {short(before)}")
    if differing:
        raise InputError(
            f"training.resume: not the settings of the run in {output_dir}: {'; '.join(differing)}. Give the recorded "
            "ones, or name another training.output_dir."
        )


def check_data(found: Resume, training: list[Row], heldout: list[Row], output_dir: Path) -> None:
    """Refuse other examples than the run has trained on or is measured with: a file or a tokenizer may have changed
    under its name.

    Raises:
        InputError: They differ.
    """
    for name, setting, rows in (("data_sha256", "path", training), ("heldout_sha256", "heldout", heldout)):
        recorded = found.summary.get(name)
        if found.checkpoint is not None and recorded not in (None, digest(rows)):
            raise InputError(
                f"training.resume: data.{setting} holds not the examples, or the tokenizer not the tokens, that the "
                f"run in {output_dir} has had. Put them back, or name another training.output_dir."
            )


def digest(rows: list[Row]) -> str:
    """Of tokenized examples."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def recorded_value(recorded: Any, name: str) -> Any:
    """Of a setting; `UNKNOWN` to the version that recorded the run, which cannot be compared."""
    for part in name.split("."):
        if not isinstance(recorded, dict):
            return recorded
        recorded = recorded.get(part, UNKNOWN)
    return recorded


def same(name: str, one: Any, other: Any) -> bool:
    """Paths are the same however they are written."""
    if name.endswith(".path") and isinstance(one, str) and isinstance(other, str):
        return one == other or Path(one).resolve() == Path(other).resolve()
    return one == other


def short(value: Any) -> str:
    """A value in a message."""
    if isinstance(value, (dict, list)):
        return reprlib.repr(value)
    return (json.dumps(value) if not isinstance(value, str) else value)[:200]


# --- how far it is to go ---------------------------------------------------------------------------------------------


def asks_for_more(summary: dict[str, Any], config: RunConfig, output_dir: Path) -> bool:
    """Whether a finished run is asked for steps beyond its last, or, where it stopped early, for more patience.

    Raises:
        InputError: It is asked for fewer.
    """
    before, now = summary["config"].get("training", {}), config.training
    name = "num_epochs" if now.num_steps is None else "num_steps"
    if not all(type(before.get(key, "")) in (int, float, type(None)) for key in ("num_steps", "num_epochs")):
        raise InputError(f"training.resume: {output_dir / SUMMARY} does not say how long its run was. Put it back.")
    if (before["num_steps"] is None) != (now.num_steps is None):
        raise InputError(
            f"training.resume: the run in {output_dir} is finished, and went by training."
            f"{'num_epochs' if before['num_steps'] is None else 'num_steps'}, not {name}. Give that one."
        )
    wanted, done = getattr(now, name), before[name] or 0
    if wanted < done:
        raise InputError(
            f"training.{name}={wanted}: the run in {output_dir} is finished with {done}. Give at least that, or name "
            "another training.output_dir."
        )
    if summary.get("stopped_early"):
        patience = config.evaluation.patience
        return patience is None or patience > summary["stopped_early"]["evaluations"]
    return wanted > done


def check_steps(config: RunConfig, checkpoint: Path, state: dict[str, Any]) -> None:
    """Refuse to stop before the step that a checkpoint has reached.

    Raises:
        InputError: Fewer steps are asked for.
    """
    training = config.training
    if checkpoint.parent.name == "stage1":
        return
    if training.num_steps is not None and training.num_steps < state["global_step"]:
        asked = f"training.num_steps={training.num_steps}"
    elif training.num_steps is None and training.num_epochs < (state.get("epoch") or 0):
        asked = f"training.num_epochs={training.num_epochs}"
    else:
        return
    raise InputError(
        f"{asked}: {checkpoint} has {state['global_step']} steps already (epoch {state.get('epoch') or 0:.2f}). Give "
        "at least that, or name another training.output_dir."
    )
