"""`SFTConfig`: the options of supervised fine-tuning, with the names of TRL and transformers.

A name those tools have and this one does not is never accepted and ignored: `_other_names.py` says why, name by name.
"""

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from fastft_jax.trainers._other_names import TRAINING
from fastft_jax.trainers.options import (
    AtLeastOne,
    Elsewhere,
    NotBuilt,
    NotNegative,
    Options,
    PathText,
    UnsupportedOption,
    listed,
    whole,
)

TRACKERS = ("tensorboard", "wandb", "mlflow")
Interval = Literal["no", "steps", "epoch"]

# Options that decide where a run writes, how often it speaks, or how it is compiled, never what it computes. A resumed
# run may change them.
_BESIDE_THE_MATHS = frozenset(
    """output_dir overwrite_output_dir logging_steps eval_strategy eval_steps per_device_eval_batch_size save_strategy
    save_steps save_total_limit report_to run_name resume_from_checkpoint compile_cache
    exact_match_rows exact_match_max_new_tokens""".split()
)


class SFTConfig(Options):
    """Options of `SFTTrainer`, checked when given and when assigned."""

    known_elsewhere: ClassVar[dict[str, Elsewhere | NotBuilt]] = TRAINING

    # Where the run lives
    output_dir: PathText = "outputs"
    """Folder of the adapter, metrics.jsonl and the checkpoints."""
    overwrite_output_dir: bool = False
    """Start afresh in an output_dir that already holds another run (its checkpoints and metrics are removed)."""
    resume_from_checkpoint: bool | PathText | None = None
    """true: the newest complete checkpoint in output_dir, the beginning if there is none; or a checkpoint's folder."""

    # Batches
    per_device_train_batch_size: AtLeastOne = 2
    """Rows of one micro-batch."""
    per_device_eval_batch_size: AtLeastOne | None = None
    """Rows of one evaluation batch; null: as many as in training."""
    gradient_accumulation_steps: AtLeastOne = 1
    """Micro-batches of one optimizer step; the loss is divided by the trained tokens of all of them."""
    num_train_epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the data (a fraction is allowed); max_steps, when given, wins."""
    max_steps: Annotated[int, BeforeValidator(whole), Field(ge=-1)] = -1
    """Optimizer steps; -1: as many as num_train_epochs needs."""
    shuffle: bool = True
    """Draw a new order of the rows each epoch, from data_seed."""

    # Optimizer
    optim: Literal["adamw_8bit", "adamw_bnb_8bit", "adamw", "adamw_torch", "adamw_torch_fused", "lion_32bit", "sgd"] = (
        "adamw_8bit"
    )
    """adamw_8bit keeps moments blockwise in 8 bits, a quarter of adamw's memory. Names that begin alike are one."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Peak learning rate."""
    embedding_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of embed_tokens and lm_head when modules_to_save trains them; null: learning_rate."""
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "constant",
        "constant_with_warmup",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "polynomial",
        "inverse_sqrt",
    ] = "linear"
    """Course of the learning rate after warmup."""
    lr_scheduler_kwargs: dict[str, float] | None = None
    """Its further arguments, such as {num_cycles: 2} or {min_lr_rate: 0.1}."""
    warmup_steps: Annotated[int | float, BeforeValidator(whole), Field(ge=0)] = 0
    """Optimizer steps of linear warmup; below 1, a share of all steps. Wins over warmup_ratio when both are given."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of all steps that are warmup."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the gradient's running mean."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the squared gradient's running mean."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the step's denominator."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Clip the gradient's global norm to this; 0: no clipping."""

    # Data
    max_length: AtLeastOne | None = None
    """Tokens of a row; longer samples are cut, and counted. null: the model's max_seq_length."""
    packing: bool = False
    """Put several samples into one row; they never see each other."""
    train_on_responses_only: bool = False
    """Loss on the assistant's tokens alone."""
    chat_template: str | None = None
    """A built-in template's name, or Jinja text; null: the tokenizer's own."""
    data_format: Literal["alpaca", "sharegpt", "messages", "prompt_completion", "text"] | None = None
    """null: found from the columns."""

    # Speaking, evaluating, saving
    logging_steps: AtLeastOne = 1
    """A line, and a row of metrics.jsonl, every so many steps."""
    report_to: Annotated[list[str], BeforeValidator(listed)] = []
    """Trackers beside metrics.jsonl: tensorboard, wandb, mlflow, or none."""
    run_name: str | None = None
    """Name shown in the trackers; null: output_dir's."""
    eval_strategy: Interval = "no"
    """When to evaluate: no, steps, or epoch."""
    eval_steps: AtLeastOne | None = None
    """Steps between evaluations with eval_strategy "steps"; null: logging_steps."""
    save_strategy: Interval = "steps"
    """When to save a checkpoint: no, steps, or epoch. Unless no, there is one at the end, too."""
    save_steps: AtLeastOne = 500
    """Steps between checkpoints with save_strategy "steps"."""
    save_total_limit: AtLeastOne | None = None
    """Keep only so many newest checkpoints; null: all."""
    exact_match_rows: NotNegative = 0
    """Ask so many held-out questions before and after training and report the share of answers that are exact."""
    exact_match_max_new_tokens: AtLeastOne = 64
    """Longest answer to such a question."""

    # Randomness and compilation
    seed: NotNegative = 3407
    """Dropout, and the data order unless data_seed is given."""
    data_seed: NotNegative | None = None
    """Seed of the data order alone; null: seed."""
    compile_cache: PathText | None = None
    """Folder of XLA's persistent compilation cache; null: the user's cache folder."""
    loss_chunk_size: AtLeastOne | None = None
    """Tokens whose logits exist at the same time; null: chosen from the vocabulary."""

    @field_validator("report_to", mode="before")
    @classmethod
    def _trackers(cls, value: Any) -> Any:
        names = [] if value in (None, "none", ["none"]) else [value] if isinstance(value, str) else listed(value)
        if isinstance(names, list):
            for name in names:
                if name not in TRACKERS:
                    raise ValueError(f"{name!r} is not a tracker; give none, or a list of {', '.join(TRACKERS)}")
        return names

    @field_validator("optim", mode="before")
    @classmethod
    def _optim_not_built(cls, value: Any) -> Any:
        if isinstance(value, str) and value.startswith("paged_"):
            raise UnsupportedOption(f"{value} is not supported: optimizer state stays on the device; use adamw_8bit")
        return value

    @model_validator(mode="after")
    def _agree(self) -> "SFTConfig":
        if self.max_steps == 0:
            raise ValueError("max_steps is 0; give the number of steps, or -1 for num_train_epochs")
        if isinstance(self.warmup_steps, float) and self.warmup_steps > 1:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; it must be a whole number, or a share below 1")
        if self.lr_scheduler_type == "constant" and (self.warmup_steps or self.warmup_ratio):
            raise ValueError("lr_scheduler_type constant has no warmup; use constant_with_warmup")
        if self.eval_steps is not None and self.eval_strategy != "steps":
            raise ValueError(f"eval_steps is given, but eval_strategy is {self.eval_strategy}; set it to steps")
        return self

    def warmup(self, total_steps: int) -> int:
        """Steps of warmup in a run of `total_steps` (transformers' rule: warmup_steps, when not 0, wins)."""
        if self.warmup_steps >= 1:
            return int(self.warmup_steps)
        return math.ceil(total_steps * (self.warmup_steps or self.warmup_ratio))

    @property
    def eval_batch_size(self) -> int:
        return self.per_device_eval_batch_size or self.per_device_train_batch_size

    def _due(self, strategy: str, every: int, step: int, last_of_epoch: bool) -> bool:
        return step % every == 0 if strategy == "steps" else strategy == "epoch" and last_of_epoch

    def evaluates_at(self, step: int, *, last_of_epoch: bool) -> bool:
        """Is there an evaluation after optimizer step `step` (counted from 1)?"""
        return self._due(self.eval_strategy, self.eval_steps or self.logging_steps, step, last_of_epoch)

    def saves_at(self, step: int, *, last_of_epoch: bool) -> bool:
        """Is there a checkpoint after optimizer step `step` (counted from 1)?"""
        return self._due(self.save_strategy, self.save_steps, step, last_of_epoch)

    def maths(self) -> dict[str, Any]:
        """The options that change what is computed: what a resumed run may not change."""
        return {key: value for key, value in self.model_dump().items() if key not in _BESIDE_THE_MATHS}
