"""The sections of a run's YAML file beside `training` (which is `SFTConfig`): model, lora, data, export."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from fastft_jax.trainers.options import (
    AtLeastOne,
    Elsewhere,
    NotBuilt,
    NotNegative,
    Options,
    PathText,
    Texts,
    listed,
    whole,
)

_FROZEN_BASE = NotBuilt("the base is NF4 (load_in_4bit) or stays in dtype")
_SERVING = NotBuilt("training does not go through a serving engine")
_ADAPTERS = NotBuilt("the adapter is LoRA, rsLoRA or DoRA on linear layers and the embedding")


class ModelSection(Options):
    """Arguments of `FastLanguageModel.from_pretrained`."""

    secrets: ClassVar[frozenset[str]] = frozenset({"token"})
    known_elsewhere: ClassVar[dict[str, Elsewhere | NotBuilt]] = {
        "name": Elsewhere("model_name"),
        "path": Elsewhere("model_name"),
        "model_name_or_path": Elsewhere("model_name"),
        "torch_dtype": Elsewhere("dtype"),
        "load_in_16bit": Elsewhere("load_in_4bit: false, and dtype"),
        "use_gradient_checkpointing": Elsewhere("lora.use_gradient_checkpointing"),
        "device_map": NotBuilt("a run uses one device, which JAX chooses"),
        "trust_remote_code": NotBuilt("code from a model's repository is never run"),
        "attn_implementation": NotBuilt("each operation's implementation is chosen for the device"),
        "use_exact_model_name": NotBuilt("a model's name is never exchanged for another"),
        **dict.fromkeys(("load_in_fp8", "qat_scheme", "float32_mixed_precision", "quantization_config"), _FROZEN_BASE),
        **dict.fromkeys(("fast_inference", "gpu_memory_utilization", "float8_kv_cache", "max_lora_rank"), _SERVING),
        **dict.fromkeys(("fix_tokenizer", "resize_model_vocab"), NotBuilt("tokenizer and vocabulary are left as is")),
        **dict.fromkeys(("offload_embedding", "unsloth_tiled_mlp"), NotBuilt("see lora.use_gradient_checkpointing")),
        "text_only": NotBuilt("only text models are supported"),
    }

    model_name: PathText
    """A local folder in Hugging Face format, or a hub id; also the folder of a PEFT adapter, to train on."""
    max_seq_length: AtLeastOne = 2048
    """Longest row. It never changes the rotary embedding."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Of activations and unquantised weights (float16 cannot train yet); null: bfloat16 on a GPU, float32 on a CPU."""
    load_in_4bit: bool = True
    """Keep the base's linear layers in NF4 with double quantisation."""
    compute_dtype: Literal["fp8"] | None = None
    """fp8: products with the NF4 layers in 8 bits (Ada, Hopper), the adapter in dtype; null: all in dtype."""
    load_in_8bit: bool = False
    """Keep them in int8, one scale an output channel, outlying columns in dtype; it replaces load_in_4bit."""
    full_finetuning: bool = False
    """Train every weight: no quantisation (whatever load_in_4bit says), no adapter; see docs/full_finetuning.md."""
    rope_scaling: dict[str, Any] | None = None
    """Replaces config.json's."""
    token: Annotated[str | None, Field(repr=False)] = None
    """Hugging Face token for gated models; better kept in HF_TOKEN. Never printed or stored."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    random_state: NotNegative = 3407
    """Seed of text that the model samples."""


class LoraSection(Options):
    """Arguments of `FastLanguageModel.get_peft_model`."""

    known_elsewhere: ClassVar[dict[str, Elsewhere | NotBuilt]] = {
        **dict.fromkeys(("rank", "lora_r"), Elsewhere("r")),
        "alpha": Elsewhere("lora_alpha"),
        "dropout": Elsewhere("lora_dropout"),
        "seed": Elsewhere("random_state"),
        "gradient_checkpointing": Elsewhere("use_gradient_checkpointing"),
        "finetune_last_n_layers": Elsewhere("layers_to_transform"),
        "target_parameters": _ADAPTERS,
        **dict.fromkeys(("exclude_modules", "layers_pattern", "layer_replication", "qat_scheme"), _ADAPTERS),
        "ensure_weight_tying": _ADAPTERS,
        **dict.fromkeys(("task_type", "inference_mode", "fan_in_fan_out"), NotBuilt("written into the adapter as is")),
        "temporary_location": NotBuilt("nothing is spilled to disk"),
    }

    r: AtLeastOne = 16
    """Rank."""
    target_modules: str | Texts = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    """Linear layers, embed_tokens or lm_head to adapt: names, "all-linear", or a regular expression over paths."""
    lora_alpha: Annotated[int | float, Field(gt=0)] = 16
    """The adapter is scaled by lora_alpha / r (rsLoRA: lora_alpha / sqrt(r))."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs set to zero, in training only."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of the base train, too."""
    use_gradient_checkpointing: bool | str | dict[str, str | float] = "auto"
    """What the backward pass computes again: none, selective, full, offload, auto, or a table of residual names."""
    random_state: NotNegative = 3407
    """Seed of the adapter's first values."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r), so that large ranks learn as fast as small ones."""
    modules_to_save: Texts | None = None
    """Modules trained in full beside the adapter: embed_tokens, lm_head, norms by name."""
    init_lora_weights: bool | str = True
    """true: A uniform, B zero (the adapter starts as nothing); gaussian: A normal; false: both random; pissa or
    pissa_niter_4: the weight's largest part, saved as LoRA of twice the rank; loftq: what NF4 lost of the weight."""
    layers_to_transform: list[Annotated[int, BeforeValidator(whole)]] | int | None = None
    """Layers to adapt, counted from 0; null: all."""
    loftq_config: dict[str, Any] | None = None
    """{loftq_iter: 1}: start from the largest part of what NF4 lost of each weight, read from the 16-bit checkpoint;
    more turns code the base anew for this adapter."""
    use_dora: bool = False
    """Train the length of each row of the adapted weights apart from its direction (DoRA); slower."""
    lora_bias: bool = False
    """Train a bias of B, too, on plain LoRA; it can be merged where the base has biases."""
    rank_pattern: dict[str, int] | None = None
    """Ranks of single modules: an expression for the end of the module's path, to a rank."""
    alpha_pattern: dict[str, int | float] | None = None
    """lora_alpha of single modules, in the same way."""
    trainable_token_indices: list[NotNegative] | dict[str, list[NotNegative]] | None = None
    """Tokens, by id, whose rows of embed_tokens train (and of a head tied to it): cheaper than all of the embedding."""

    @field_validator("use_gradient_checkpointing")
    @classmethod
    def _policy(cls, value: Any) -> Any:
        from fastft_jax.models.remat import resolve_policy  # imports jax, so only for a value that was given

        resolve_policy(value)
        return value


class DataSection(Options):
    """Where rows come from. How they become tokens is SFTConfig's, and may be written in this section."""

    known_elsewhere: ClassVar[dict[str, Elsewhere | NotBuilt]] = {
        "format": Elsewhere("data_format"),
        "dataset": Elsewhere("path"),
        "dataset_name": Elsewhere("path"),
        "subset": Elsewhere("name"),
        "train_path": Elsewhere("path"),
        "max_seq_length": Elsewhere("max_length, or model.max_seq_length"),
        "num_proc": NotBuilt("rows are tokenized in the process"),
        "streaming": NotBuilt("rows are tokenized once, before training"),
        "dataset_text_field": NotBuilt("plain text is read from the column text; rename the column"),
    }

    path: PathText
    """A local json, jsonl, parquet, csv or txt file, a hub id, or tfds:NAME."""
    name: str | None = None
    """Subset (configuration) of a hub dataset."""
    split: str | None = None
    """Split, such as train or train[:1000]; null: train, or the only one."""
    eval_path: PathText | None = None
    """Rows to evaluate on; null with eval_split: those of path."""
    eval_name: str | None = None
    """Subset of a hub dataset to evaluate on; null: name."""
    eval_split: str | None = None
    """Split to evaluate on, such as test or train[:5%]."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Or: hold out this share of path's rows, drawn with training.seed."""

    @model_validator(mode="after")
    def _one_way_to_evaluate(self) -> "DataSection":
        if self.eval_fraction is not None and (self.eval_path or self.eval_split):
            raise ValueError("eval_fraction holds out rows of path; leave out eval_path and eval_split, or it")
        if self.eval_name is not None and not (self.eval_path or self.eval_split):
            raise ValueError("eval_name is given without eval_path or eval_split")
        return self

    @property
    def evaluates(self) -> bool:
        return bool(self.eval_path or self.eval_split or self.eval_fraction)


class ExportSection(Options):
    """What is written when training ends, beside the adapter in output_dir."""

    known_elsewhere: ClassVar[dict[str, Elsewhere | NotBuilt]] = {
        **dict.fromkeys(("save_method", "merged", "formats", "kinds"), Elsewhere("to: [merged_16bit]")),
        "push_to_hub": NotBuilt("it is done from Python, with model.push_to_hub"),
        **dict.fromkeys(("gguf", "quantization_method"), Elsewhere("to: ['gguf:q4_k_m']")),
    }

    to: Texts = []
    """Further exports: peft, merged_16bit, merged_4bit, gguf:q4_k_m (or another method, or gguf:lora)."""
    out: PathText | None = None
    """Their folder, in which each gets one of its own; null: output_dir/export."""
    base: PathText | None = None
    """What merges are made onto: null, the weights trained against; original, the 16-bit ones; or a folder of these."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Of merged weights that are not in 4 bits; null: the base's own 16-bit dtype, else bfloat16."""
    max_shard_size: Annotated[str | int, Field(union_mode="left_to_right")] = "5GB"
    """Largest file of a merged checkpoint."""
    overwrite: bool = False
    """Replace export folders that are there already."""
    verify: bool = True
    """Read everything back and compare it with the model: the adapter byte for byte, merged models by their logits."""

    @field_validator("to", mode="before")
    @classmethod
    def _kinds(cls, value: Any) -> Any:
        from fastft_jax.export import parse_kinds

        value = [value] if isinstance(value, str) else listed(value)
        return parse_kinds(value) if isinstance(value, list) else value

    @field_validator("max_shard_size")
    @classmethod
    def _size(cls, value: Any) -> Any:
        from fastft_jax.convert.safetensors.writer import parse_size

        parse_size(value)
        return value

    def folder(self, output_dir: str) -> Path:
        return Path(self.out) if self.out else Path(output_dir) / "export"

    def check_targets(self, output_dir: str) -> None:
        """ConfigError where an export folder holds something already."""
        from fastft_jax.export import check_targets

        check_targets(self.to, self.folder(output_dir), self.overwrite)

    def settings(self, rows: Any, token: str | None) -> Any:
        """As `fastft_jax.export.export` takes them; rows: token ids to compare merged models on."""
        from fastft_jax.export import Settings

        chosen = {key: getattr(self, key) for key in ("base", "dtype", "max_shard_size", "overwrite", "verify")}
        return Settings(**chosen, rows=rows, token=token)
