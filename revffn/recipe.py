"""What a run is told: keyword-only dataclasses whose field texts are the only description.

command_line.py fills them from a YAML recipe and from options. `first` marks what `revffn train --help` shows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from .config import ReversibleConfig, accepts_as_before, first

LARGEST = 2**31 - 1
"""Of every number in a recipe."""
LARGEST_SEED = 2**32 - 1
RENAMED = {"num_heldout": "heldout"}
"""Settings of `DataConfig` before, and what they are called now."""


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: what was given, what is accepted, what to
    do."""


@dataclass(kw_only=True)
class ModelConfig:
    """The pretrained model."""

    path: str = first()
    """Folder of a pretrained Hugging Face model with its tokenizer, or its name on the Hub."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of weights, gradients and computation. See optimizer.rounding for updates of bfloat16 weights."""
    trust_remote_code: bool = False
    """Run the code that a model's folder brings. False refuses such a model."""


@dataclass(kw_only=True)
class RunReversibleConfig(ReversibleConfig):
    """The reversible blocks; their settings travel with the model."""

    coupling: Literal["innovation", "cross_branch", "none"] | None = first("innovation")
    """`innovation` keeps the pretrained function and exports to it; `cross_branch` is the RevFFN paper's; `none` is
    the plain model with each layer's input stored by this library's engine; null is the plain Hugging Face model,
    untouched."""
    tile_tokens: int | Literal["auto"] | None = "auto"
    """Run each layer over tiles of at most this many tokens (whole sequences, at least one): the working set is then
    one tile's. Null: the whole batch at once. `auto`: on a GPU the largest that is predicted to fit, the whole batch
    or a power of two from 256 on; on a CPU, where larger ones are no faster, at most 2048. The number is chosen once,
    before the run, and recorded in run.json and in the model's config.json."""
    kept_layers: int | Literal["auto"] = "auto"
    """The last so many decoder layers keep what they save for backward, instead of running again there: the same bits
    and less work. `auto`: on a GPU as many as are predicted to fit beside the tiles, with 8 % of its memory to spare;
    on a CPU, and with parallel.strategy ddp, none."""

    def __post_init__(self):
        kept, tile = self.kept_layers, self.tile_tokens
        if isinstance(kept, str) and kept != "auto" or isinstance(kept, int) and kept < 0:
            raise ValueError(f"kept_layers must be auto (as many as fit) or at least 0, got {kept}.")
        if isinstance(tile, str) and tile != "auto" or isinstance(tile, int) and tile < 1:
            raise ValueError(
                f"tile_tokens must be auto (the largest that fits), null (the whole batch) or at least 1, got {tile}. "
                "Leave it out for auto."
            )
        if self.coupling is not None:
            self.check_values()

    def resolve(self, calibrated: bool) -> ReversibleConfig | None:
        """What `convert` takes, with calibration or without; None leaves the model as it is.

        Raises:
            ValueError: `tile_tokens` or `kept_layers` is still `auto`; `preflight.check` chooses a number.
        """
        if self.coupling is None:
            return None
        for name in ("tile_tokens", "kept_layers"):
            if getattr(self, name) == "auto":
                raise ValueError(f"{name} is auto, which is no number yet. preflight.check(config).config has one.")
        # Said here, so that a plan made before the calibration is one of the same model.
        return ReversibleConfig.from_dict(self.to_dict()).resolve(calibrated)


@dataclass(kw_only=True)
class Source:
    """One of several places to read examples from, with what `datasets.load_dataset` needs to be told."""

    path: str
    """As in `data.path`."""
    name: str | None = None
    """Subset of a data set on the Hub that has several."""
    split: str | None = None
    """Null is `data.split`."""
    weight: float | None = None
    """Share of this source in what is drawn, relative to the others' weights. All sources have one, or none."""


def renamed(cls: type, values: dict[str, Any]) -> Iterator[str]:
    """Names of before, to the present ones."""
    for old in values.keys() & RENAMED.keys():
        values[RENAMED[old]] = values.pop(old)
        yield f"{old} is called {RENAMED[old]} now."


@accepts_as_before(renamed)
@dataclass(kw_only=True)
class DataConfig:
    """The examples to learn from. Only responses count in the loss, and plain text (docs/data.md)."""

    path: str | Source | list[str | Source] = first("data/databricks-dolly-15k/databricks-dolly-15k.jsonl.gz")
    """A .jsonl, .json, .csv (or .gz, .zst of one), .parquet or .arrow file, a folder of them, a data set on the Hub,
    or a list of these. Files are looked for in the working directory, beside the recipe and in the source checkout.
    The columns say what an example is: messages (and tools); conversations as ShareGPT has them; prompt and
    completion; instruction and output (and input); instruction and response (and context); question and answer; or
    text. In a recipe a source may have a name, a split and a weight: {path: a.jsonl, weight: 2}."""
    split: str = "train"
    """Split of a data set on the Hub, or of a folder whose files are named after splits."""
    num_examples: int | None = None
    """Training examples to use, drawn by `seed`; null is all that are not held out."""
    heldout: int | float | str | Source = 256
    """Examples held out for evaluation: how many, or which share (below 1), drawn by `seed`; or a source of their own,
    as in `path`. The same ones whatever `num_examples` is."""
    max_length: int = first(1024)
    """Tokens per sequence; what is longer is cut at the end, and plain text goes on in the next sequence."""
    learn: Literal["all_responses", "last_response"] = "all_responses"
    """Which responses of a conversation of several turns count in the loss; the others are read as part of the
    prompt. Of prompt and completion only the completion is learnt."""
    max_dropped: float = 0.05
    """Largest share of the training examples that may be left out because their prompts fill `max_length`. How many
    were is printed and recorded in run.json; above this share the run is refused."""
    packing: bool = False
    """Put several examples into one sequence of `max_length` tokens, the best fit first, kept apart by position ids.
    Otherwise pad."""
    seed: int = 0
    """Seed of the held-out split and of the choice of training examples."""

    def __post_init__(self):
        at_least(self, num_examples=1, max_length=8)
        if not 0 <= self.max_dropped <= 1:
            raise ValueError(f"max_dropped is a share: it must be from 0 to 1, got {self.max_dropped}.")
        check_seed(self)
        self.heldout = number(self.heldout)
        if isinstance(self.heldout, (int, float)) and not self.holds_out_a_number():
            raise ValueError(
                f"heldout must be a whole number of examples up to {LARGEST}, a share above 0 and below 1, or a path, "
                f"got {self.heldout}."
            )
        self.check_sources()

    def holds_out_a_number(self) -> bool:
        """Whether `heldout` is a number of examples, or a share of them."""
        if isinstance(self.heldout, int):
            return 0 <= self.heldout <= LARGEST
        return isinstance(self.heldout, float) and 0 < self.heldout < 1

    def check_sources(self) -> None:
        sources = self.sources()
        weights = [source.weight for source in sources if source.weight is not None]
        if not sources:
            raise ValueError("path is an empty list. Name at least one source.")
        if weights and len(weights) < len(sources):
            raise ValueError(f"path: {len(weights)} of {len(sources)} sources have a weight. Give all one, or none.")
        if any(not 0 < weight < math.inf for weight in weights):
            raise ValueError(f"path: weights must be numbers above 0, got {', '.join(map(str, weights))}.")

    def sources(self) -> list[Source]:
        """What is read for training, each with its split."""
        paths = self.path if isinstance(self.path, list) else [self.path]
        return [self.source(path) for path in paths]

    def heldout_source(self) -> Source | None:
        """What is read for evaluation alone."""
        return None if isinstance(self.heldout, (int, float)) else self.source(self.heldout)

    def source(self, path: str | Source) -> Source:
        source = Source(path=path) if isinstance(path, str) else path
        return replace(source, split=source.split or self.split)


@dataclass(kw_only=True)
class OptimizerConfig:
    """The optimizer of revffn/optim/in_backward.py, with a linear warm-up."""

    name: Literal["adafactor", "adamw", "adamw8bit", "sgd"] = first("adafactor")
    """adafactor: second moments as row and column means, per expert. adamw: two moments in float32. adamw8bit: the
    same in 8 bits, needs torchao. sgd: no state without momentum."""
    in_backward: bool | None = None
    """Step each parameter as soon as its gradient is complete and free the gradient. Null does so unless
    training.gradient_accumulation_steps is above 1: gradients have to stay then."""
    rounding: Literal["stochastic", "nearest", "master"] = "stochastic"
    """How bfloat16 weights take an update smaller than they resolve. `nearest` loses it, `master` keeps float32 copies
    of all weights."""
    learning_rate: float = first(1e-5)
    """Peak learning rate of stage 2."""
    stage1_learning_rate: float = 1e-3
    """Peak learning rate of stage 1."""
    weight_decay: float = 0.0
    """Decoupled weight decay; norms and biases have none."""
    beta1: float = 0.9
    """adamw's decay rate of the first moment."""
    beta2: float = 0.95
    """adamw's decay rate of the second moment."""
    momentum: float = 0.0
    """Of sgd, and of adafactor (an average of updates in bfloat16); 0 keeps none."""
    warmup_ratio: float = 0.05
    """Share of each stage's steps in which the learning rate rises from 0."""
    schedule: Literal[
        "cosine",
        "linear",
        "constant",
        "constant_with_warmup",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "cosine_warmup_with_min_lr",
        "polynomial",
        "inverse_sqrt",
        "warmup_stable_decay",
    ] = "cosine"
    """How the learning rate goes on after the warm-up: transformers' schedules, by its names (`constant` has no
    warm-up)."""
    schedule_kwargs: str | None = None
    """What the schedule takes besides, as JSON: '{"min_lr_rate": 0.1}' for cosine_with_min_lr, '{"num_decay_steps":
    100}' for warmup_stable_decay, '{"num_cycles": 2}' for cosine_with_restarts. Of both stages."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 does not clip. In backward the norm of all gradients is not known yet,
    and the last step's stands in for it; see revffn/optim/in_backward.py."""

    def __post_init__(self):
        at_least(self, learning_rate=0, stage1_learning_rate=0, weight_decay=0, max_grad_norm=0)
        for name in ("beta1", "beta2", "momentum", "warmup_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}.")
        self.schedule_arguments()

    def schedule_arguments(self) -> dict[str, Any]:
        """`schedule_kwargs`, read.

        Raises:
            ValueError: It is no JSON object, or the schedule takes nothing.
        """
        if self.schedule_kwargs is None:
            return {}
        try:
            found = json.loads(self.schedule_kwargs)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise ValueError(
                f"schedule_kwargs must be a JSON object like '{{\"num_cycles\": 2}}', got {self.schedule_kwargs!r}."
            )
        if found and self.schedule.startswith("constant"):
            raise ValueError(f"schedule_kwargs: the schedule {self.schedule} takes none. Leave the key out.")
        return found


@dataclass(kw_only=True)
class MemoryConfig:
    """What a run may take. It is predicted before weights are loaded, and compared with what it took at the end."""

    limit: str | None = first(None)
    """Memory of the device, like 24GiB. A run that is predicted to take more is refused. Null is all that the GPU has,
    or the host without a GPU."""
    force: bool = False
    """Start although the prediction does not fit. `--force` on the command line is short for it."""
    linear_cross_entropy: bool = True
    """Compute the loss in chunks of tokens, never the full logits. False leaves the loss to TRL."""
    weights: Literal["device", "host", "auto"] = first("device")
    """`host`: decoder layers and the optimizer's states of them live in host memory, two layers at a time on the
    device. Needs a coupling and the optimizer in backward; large steps hide the copies (`revffn plan` says how
    large). `auto`, where no recipe is given: `host` if the run is predicted to fit only so."""


@dataclass(kw_only=True)
class ParallelConfig:
    """Several GPUs: one process each, started by torchrun or accelerate launch."""

    strategy: Literal["fsdp", "ep", "ddp"] | None = None
    """`fsdp`: parameters, gradients and the optimizer's states are divided among the processes and gathered layer by
    layer (PyTorch's FSDP2). `ep`: the same, but experts stay where they are and tokens travel to them. `ddp`: every
    process has everything, for small models; needs optimizer.in_backward: false. Null: one process."""


@dataclass(kw_only=True)
class TrainingConfig:
    """The two stages: projection adapters or predictors alone, then everything but the router."""

    output_dir: str | None = first(None)
    """Folder of the run, new or empty; null is runs/<name of the recipe>."""
    stage1_steps: int = 0
    """Optimizer steps in which only the coupling's own parameters train (projection adapters, predictors). For
    innovation 0 will do: its predictors are fitted in closed form."""
    num_steps: int | None = first(None)
    """Optimizer steps of stage 2; null goes by `num_epochs`."""
    num_epochs: float = first(1.0)
    """Passes over the training examples in stage 2, if `num_steps` is null."""
    batch_size: int = first(8)
    """Sequences in one forward pass, of all processes together. Make this the real batch: it is walked in tiles of
    reversible.tile_tokens, which bound the memory."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimizer step. Above 1 all gradients are kept until the step."""
    freeze_router: bool | None = None
    """Leave the routers as pretrained. Null does so if the model has any (as the paper); true insists that it has."""
    router_aux_loss_coef: float | None = None
    """Weight of the load-balancing loss; null is 0 with frozen routers and else what the model's config says."""
    router_z_loss_coef: float = 0.0
    """Weight of the routers' z-loss in stage 2, the mean of logsumexp(router logits)^2 (ST-MoE: 0.001); it needs
    `freeze_router: false`."""
    calibration_tokens: int = 16384
    """Tokens of training data, rounded up to whole batches, that `convert` sees: they set the grid and fit the
    predictors. Some ten times the hidden size and more; 0 fits nothing."""
    activation_checkpointing: bool = False
    """Recompute each layer from its stored input. Only with `reversible.coupling: null`; the others do it
    themselves."""
    log_steps: int = 1
    """A line in metrics.jsonl, and a report, every so many optimizer steps."""
    report_to: list[str] = field(default_factory=list)
    """Who is told the numbers of metrics.jsonl while the run goes on, by transformers' names: tensorboard, trackio,
    wandb and others. The package must be installed. tensorboard's files lie in the run's folder, in `stage2/runs`."""
    save_steps: int | None = first(None)
    """A checkpoint to resume from every so many optimizer steps; null keeps none."""
    load_best_model_at_end: bool = False
    """Save the model of the checkpoint with the lowest held-out loss in stage 2, which is not deleted, instead of the
    last one. Needs `save_steps`, a multiple of evaluation.every_steps."""
    save_on_interrupt: bool = False
    """On Ctrl-C or SIGTERM finish the step and save a checkpoint. False stops at once: resuming repeats what came
    after the last checkpoint."""
    resume: bool | Literal["weights"] = first(False)
    """Go on from the newest complete checkpoint in `output_dir`. `weights`: also from one whose optimizer, schedule or
    random state is missing, which makes another run."""
    seed: int = 0
    """Seed of the order of the data and of everything else that is random."""

    def __post_init__(self):
        at_least(self, stage1_steps=0, num_steps=0, batch_size=1, gradient_accumulation_steps=1, calibration_tokens=0)
        at_least(self, log_steps=1, save_steps=1, router_aux_loss_coef=0, router_z_loss_coef=0)
        check_seed(self)
        if self.router_z_loss_coef and self.freeze_router is not False:
            raise ValueError(
                f"router_z_loss_coef={self.router_z_loss_coef} trains routers, which are frozen. Set freeze_router: "
                "false, or leave router_z_loss_coef out."
            )
        if not 0 < self.num_epochs < math.inf:
            raise ValueError(f"num_epochs must be a number above 0, got {self.num_epochs}.")


@dataclass(kw_only=True)
class EvaluationConfig:
    """What is measured before and after training."""

    batch_size: int = 8
    """Sequences per forward pass."""
    every_steps: int | None = None
    """Held-out loss every so many optimizer steps, written to metrics.jsonl; null is before and after only."""
    patience: int | None = None
    """Stop stage 2 after so many of these evaluations without a lower held-out loss; null never does."""
    prompt: str | None = first(None)
    """A question answered before and after training; null asks none."""
    max_new_tokens: int = 64
    """Longest answer."""
    compare_checkpointing: list[int] = field(default_factory=list)
    """Before training, measure one forward and backward pass of the plain model with activation checkpointing and of
    the reversible one, on the same batches of so many sequences: bytes kept for backward, and peak memory. Empty
    measures nothing."""

    def __post_init__(self):
        at_least(self, batch_size=1, every_steps=1, patience=1, max_new_tokens=1)
        if self.patience is not None and self.every_steps is None:
            raise ValueError(
                f"patience={self.patience} counts the evaluations of every_steps, which is null. Set every_steps, or "
                "leave patience out."
            )
        if any(size < 1 for size in self.compare_checkpointing):
            raise ValueError(
                f"compare_checkpointing has numbers of sequences, each at least 1, got {self.compare_checkpointing}."
            )


@dataclass(kw_only=True)
class RunConfig:
    """Fine-tune a model as a recipe says. What the command line says wins over the recipe."""

    model: ModelConfig
    reversible: RunReversibleConfig = field(default_factory=RunReversibleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self):
        if self.training.activation_checkpointing and self.reversible.coupling is not None:
            raise ValueError(
                "training.activation_checkpointing goes with reversible.coupling: null only; "
                f"coupling {self.reversible.coupling!r} recomputes by itself. Drop one of the two."
            )
        if self.reversible.coupling is None and self.training.stage1_steps:
            raise ValueError("training.stage1_steps has nothing to train with reversible.coupling: null. Set it to 0.")
        save, every = self.training.save_steps, self.evaluation.every_steps
        if self.training.load_best_model_at_end and (save is None or every is None or save % every):
            raise ValueError(
                "training.load_best_model_at_end: true compares checkpoints by held-out loss; it needs "
                f"training.save_steps (got {save or 'null'}), a multiple of evaluation.every_steps (got "
                f"{every or 'null'}). Set both, or leave it out."
            )
        steps = self.training.gradient_accumulation_steps
        if self.optimizer.in_backward is None:
            self.optimizer.in_backward = steps == 1
        elif self.optimizer.in_backward and steps > 1:
            raise ValueError(
                f"optimizer.in_backward frees each gradient at once, but gradient_accumulation_steps={steps} adds "
                "several up. Put the whole batch into training.batch_size, which is walked in tiles, or set "
                "optimizer.in_backward: false."
            )
        self.check_parallel()
        if self.memory.weights == "host":
            for wrong, remedy in (
                (self.reversible.coupling is None, "set reversible.coupling (none is a coupling too)"),
                (not self.optimizer.in_backward, "set optimizer.in_backward: true, gradient_accumulation_steps: 1"),
                (
                    self.evaluation.compare_checkpointing,
                    "set evaluation.compare_checkpointing: [], which needs all weights at once",
                ),
            ):
                if wrong:
                    raise ValueError(f"memory.weights: host does not go with these settings; {remedy}.")


    def check_parallel(self) -> None:
        """Refuse what does not go with several processes."""
        strategy = self.parallel.strategy
        if strategy is None:
            return
        for wrong, remedy in (
            (
                strategy == "ep" and self.reversible.coupling is None,
                "set reversible.coupling (none is a coupling too), or parallel.strategy: fsdp",
            ),
            (
                strategy == "ddp" and self.optimizer.in_backward,
                "gradients are averaged after they are made, when each parameter has stepped. Set parallel.strategy: "
                "fsdp, or optimizer.in_backward: false",
            ),
            (self.memory.weights == "host", "set memory.weights: device; shards are on the device"),
            (self.evaluation.compare_checkpointing, "set evaluation.compare_checkpointing: []"),
            (self.training.load_best_model_at_end, "set training.load_best_model_at_end: false"),
        ):
            if wrong:
                raise ValueError(f"parallel.strategy: {strategy} does not go with these settings; {remedy}.")


def with_weights(config: RunConfig, weights: Literal["device", "host"]) -> RunConfig:
    """The same run with its weights' place said.

    Raises:
        ValueError: `host` does not go with its settings.
    """
    return replace(config, memory=replace(config.memory, weights=weights))


def with_tile(config: RunConfig, tile_tokens: int | None) -> RunConfig:
    """The same run with its tiles' size said."""
    return replace(config, reversible=replace(config.reversible, tile_tokens=tile_tokens))


def with_kept(config: RunConfig, kept_layers: int) -> RunConfig:
    """The same run with the number of kept layers said."""
    return replace(config, reversible=replace(config.reversible, kept_layers=kept_layers))


def at_least(config: object, **least: float) -> None:
    """Refuse numbers below their bound, and such as no run can mean: not finite, or too large to count anything."""
    for name, bound in least.items():
        value = getattr(config, name)
        if value is None:
            continue
        if not value >= bound:
            raise ValueError(f"{name} must be at least {bound}, got {value}.")
        if value > LARGEST:
            raise ValueError(f"{name} must be at most {LARGEST}, got {value}.")


def check_seed(config: object) -> None:
    """Refuse a seed that numpy or torch would refuse later."""
    seed = config.seed
    if not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"seed must be 0 to {LARGEST_SEED}, got {seed}.")


def number(value: Any) -> Any:
    """A text that spells a number as that number; anything else as it is."""
    for kind in (int, float):
        try:
            return kind(value) if isinstance(value, str) else value
        except ValueError:
            continue
    return value
