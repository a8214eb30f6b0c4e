"""FastLanguageModel: load a Hugging Face model, add LoRA, look at it, generate, save the adapter."""

import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from fastft_jax.adapters import DEFAULT_NAME, Adapters
from fastft_jax.convert import peft
from fastft_jax.convert.gguf import open_gguf
from fastft_jax.convert.hf import load_decoder, read_config
from fastft_jax.convert.hf_writer import verify_model, write_model
from fastft_jax.convert.hub import resolve_model
from fastft_jax.convert.merged.save import save_merged
from fastft_jax.convert.peft import experts as peft_experts
from fastft_jax.convert.peft.save import save_adapter
from fastft_jax.convert.tokenizer import load_tokenizer
from fastft_jax.convert.upload import push_to_hub
from fastft_jax.errors import CheckpointError, ConfigError
from fastft_jax.models import generate, lora
from fastft_jax.models.compute_dtype import check_compute_dtype, set_compute_dtype
from fastft_jax.models.decoder import Decoder
from fastft_jax.models.families.names import NameTable
from fastft_jax.models.families.registry import config_from_hf
from fastft_jax.models.full import train_everything, trains_everything
from fastft_jax.models.lora_starts import checked_init
from fastft_jax.models.remat import Policy, resolve_policy

DTYPES = {"bfloat16": jnp.bfloat16, "float16": jnp.float16, "float32": jnp.float32}
DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class FastLanguageModel(Adapters):
    """A causal language model on the device: a frozen base and, once added, a LoRA adapter.

    Made by `from_pretrained`; the names of methods and arguments are those of Unsloth and PEFT.
    """

    def __init__(
        self,
        decoder: Decoder,
        names: NameTable,
        hf_config: dict,
        *,
        name: str,
        max_seq_length: int,
        random_state: int = 3407,
    ):
        super().__init__()
        self.decoder = decoder
        self.names = names
        self.hf_config = hf_config
        self.random_state = random_state
        self.name_or_path = name
        self.base_folder = Path(name)  # where the base's files are on this disk
        self.max_seq_length = max_seq_length
        self.remat_policy: str | Policy = "auto"

    @classmethod
    def from_pretrained(
        cls,
        model_name: str | Path,
        max_seq_length: int = 2048,
        dtype: str | Any | None = None,
        load_in_4bit: bool = True,
        load_in_8bit: bool = False,
        full_finetuning: bool = False,
        rope_scaling: dict | None = None,
        token: str | None = None,
        revision: str | None = None,
        random_state: int = 3407,
        compute_dtype: str | None = None,
        tokenizer_name: str | Path | None = None,
    ) -> tuple["FastLanguageModel", Any]:
        """(model, tokenizer) from a local folder or a hub id: a base model, or a PEFT adapter with its base.

        A file called *.gguf is a base, too: decoded, then quantised like any other. tokenizer_name is a folder whose
        tokenizer is taken instead of the model's own.
        dtype: "bfloat16", "float16", "float32" or a jax dtype; None means bfloat16 on a GPU and float32 on a CPU.
        load_in_4bit keeps the layers' linears in NF4 with double quantisation, load_in_8bit in int8 instead.
        full_finetuning trains every weight, from float32 copies, without quantisation (whatever load_in_4bit says) or
        adapter: 16 bytes a parameter with AdamW, 10 with its 8-bit form. rope_scaling replaces config.json's.
        random_state seeds what `generate` samples. compute_dtype="fp8" multiplies with the NF4 layers in
        8 bits, on GPUs of compute capability 8.9 or more; a CPU emulates it. The tokenizer is None, with a warning,
        where the folder has no tokenizer files.
        Raises CheckpointError for a folder that cannot be used, ConfigError for options that do not fit the device or
        each other, NotImplementedError for options not built yet.
        """
        if load_in_8bit and full_finetuning:
            raise ConfigError(
                "load_in_8bit=True freezes the base in 8 bits, and full_finetuning=True trains it: take one"
            )
        load_in_4bit = load_in_4bit and not (load_in_8bit or full_finetuning)
        if max_seq_length < 1:
            raise ConfigError(f"max_seq_length={max_seq_length} must be at least 1")
        check_compute_dtype(compute_dtype, load_in_4bit)
        source, own_tokenizer = open_gguf(model_name, tokenizer_name)
        folder = resolve_model(str(model_name), revision=revision, token=token) if source is None else source.path
        if (folder / peft.CONFIG).exists():
            if full_finetuning:
                raise ConfigError(
                    f"full_finetuning=True trains a base model, and {folder} is an adapter: name its base"
                )
            return cls._from_adapter(
                folder,
                max_seq_length=max_seq_length,
                dtype=dtype,
                load_in_4bit=load_in_4bit,
                load_in_8bit=load_in_8bit,
                rope_scaling=rope_scaling,
                token=token,
                random_state=random_state,
                compute_dtype=compute_dtype,
            )
        values = read_config(folder) if source is None else source.hf_config()
        if rope_scaling is not None:
            values = {k: v for k, v in values.items() if k != "rope_parameters"} | {
                "rope_theta": values.get("rope_theta") or (values.get("rope_parameters") or {}).get("rope_theta"),
                "rope_scaling": rope_scaling,
            }
        config, names = config_from_hf(values)
        if max_seq_length > config.max_position_embeddings and config.rope.rope_type == "default":
            warnings.warn(
                f"max_seq_length={max_seq_length} is beyond the {config.max_position_embeddings} positions this model "
                "was trained for; its rotary embedding is left as it is (pass rope_scaling to change it)",
                stacklevel=2,
            )
        if source is not None:
            source.bind(config, names)
        stored = jnp.float32 if full_finetuning else _dtype(dtype)
        decoder = load_decoder(
            source or folder, config, names, dtype=stored, load_in_4bit=load_in_4bit, load_in_8bit=load_in_8bit
        )
        set_compute_dtype(decoder, compute_dtype)
        if full_finetuning:
            decoder.dtype = _dtype(dtype)
            train_everything(decoder)
        model = cls(
            decoder,
            names,
            values,
            name=str(model_name),
            max_seq_length=max_seq_length,
            random_state=random_state,
        )
        model.base_folder = folder
        return model, load_tokenizer(Path(tokenizer_name or folder)) if own_tokenizer is None else own_tokenizer

    @classmethod
    def _from_adapter(cls, folder: Path, **options) -> tuple["FastLanguageModel", Any]:
        config, tensors = peft.read_adapter(folder)
        base = config.get("base_model_name_or_path")
        if not base:
            raise CheckpointError(f"{folder / peft.CONFIG} does not name its base model")
        if (Path(base).expanduser() / peft.CONFIG).exists():
            raise CheckpointError(
                f"the base of adapter {folder} is itself an adapter ({base}): name the model it is of"
            )
        try:
            model, tokenizer = cls.from_pretrained(base, revision=config.get("revision"), **options)
        except CheckpointError as error:
            raise CheckpointError(f"the base of adapter {folder} cannot be loaded: {error}") from error
        model._add(DEFAULT_NAME, config, tensors, folder)
        own = load_tokenizer(folder, warn=False)
        return model, tokenizer if own is None else own

    @staticmethod
    def get_peft_model(
        model: "FastLanguageModel",
        r: int = 16,
        target_modules: Sequence[str] | str = DEFAULT_TARGETS,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        use_gradient_checkpointing: str | bool | Policy = "auto",
        random_state: int = 3407,
        use_rslora: bool = False,
        modules_to_save: Sequence[str] | None = None,
        init_lora_weights: bool | str = True,
        layers_to_transform: Sequence[int] | int | None = None,
        loftq_config: dict | None = None,
        use_dora: bool = False,
        lora_bias: bool = False,
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, float] | None = None,
        trainable_token_indices: Sequence[int] | dict[str, Sequence[int]] | None = None,
    ) -> "FastLanguageModel":
        """Add a LoRA adapter to the model, in place, and return it. Arguments as in PEFT's LoraConfig.

        The default of target_modules means every linear layer, also where a family gives them other names (Phi).
        rank_pattern and alpha_pattern give modules ranks and alphas of their own: expressions for the ends of paths.
        trainable_token_indices: tokens whose rows of the embedding train, and of a head that is tied to it.
        """
        if model.full_finetuning:
            raise ConfigError("full_finetuning=True trains every weight: there is nothing for an adapter to add")
        if model.adapter_names:
            raise ConfigError("this model has an adapter already; load the base again to start another")
        init = checked_init(init_lora_weights, loftq_config)
        own_base = init == "loftq" and (loftq_config or {}).get("loftq_iter", 1) > 1
        if not (isinstance(r, int) and r >= 1):
            raise ConfigError(f"r={r!r} must be a whole number of at least 1")
        if not 0.0 <= lora_dropout < 1.0:
            raise ConfigError(f"lora_dropout={lora_dropout} must be at least 0 and less than 1")
        if bias not in ("none", "all", "lora_only"):
            raise ConfigError(f"bias={bias!r} is not one of none, all, lora_only")
        policy = resolve_policy(use_gradient_checkpointing)
        paths = model._linear_paths()
        leaves = {path.rpartition(".")[2] for path in paths}
        if tuple(target_modules) == DEFAULT_TARGETS and not leaves.issuperset(DEFAULT_TARGETS):
            target_modules = peft.ALL_LINEAR
        if not isinstance(target_modules, str):
            target_modules = [model.names.leaf(target) for target in target_modules]
        peft.require_targets(target_modules, [*paths, model._embedding_path])
        if target_modules == "all-linear":
            target_modules = peft.condense_targets(peft.match_targets("all-linear", paths), paths)
        config = peft.adapter_config(
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            bias=bias,
            target_modules=target_modules,
            modules_to_save=list(modules_to_save) if modules_to_save else None,
            use_rslora=use_rslora,
            layers_to_transform=[layers_to_transform] if isinstance(layers_to_transform, int) else layers_to_transform,
            # One turn of LoftQ leaves the base as it is, so its pair is plain LoRA: a config that says more would make
            # PEFT start anew
            init_lora_weights=True if init == "loftq" and not own_base else init,
            loftq_config={"loftq_bits": 4, **loftq_config} if own_base else None,
            use_dora=use_dora,
            lora_bias=lora_bias,
            rank_pattern=rank_pattern,
            alpha_pattern=alpha_pattern,
            trainable_token_indices=trainable_token_indices,
            base_model_name_or_path=model.name_or_path,
        )
        adapted = model._matched(config)
        peft_experts.check_expert_targets(adapted, paths, lora_dropout)
        peft.check_pattern(config["rank_pattern"], "rank_pattern", adapted)
        peft.check_pattern(config["alpha_pattern"], "alpha_pattern", adapted)
        model._attach(config, random_state, init=init)
        model.active_adapter = DEFAULT_NAME
        model.remat_policy = policy
        return model

    def save_pretrained(self, folder: str | Path, overwrite: bool = True) -> None:
        """Write the adapter as PEFT does: adapter_config.json and adapter_model.safetensors, atomically.

        After full fine-tuning: the whole model as a Hugging Face folder, in the compute dtype.
        """
        if self.full_finetuning:
            return write_model(folder, self.decoder, self.hf_config, source=self.base_folder, overwrite=overwrite)
        if self.peft_config is None:
            raise ConfigError("this model has no adapter to save; call FastLanguageModel.get_peft_model first")
        adapted = [site.hf_path for site in lora.sites(self.decoder, self.names) if site.adapted]
        config = peft_experts.written_config(self._saved_config(), adapted, self._linear_paths())
        peft.write_adapter(Path(folder), config, self._saved_tensors(), overwrite=overwrite)

    def save_pretrained_gguf(
        self,
        folder: str | Path,
        tokenizer: Any = None,
        quantization_method: str | Sequence[str] = "q4_k_m",
        imatrix_file: str | Path | None = None,
        *,
        verify: bool = True,
        rows: Sequence[Sequence[int]] | None = None,
    ) -> list[Path]:
        """Write GGUF files for llama.cpp and Ollama, with the adapter merged in, and a Modelfile; returns their paths.

        quantization_method: f32, f16, bf16, q8_0, q6_k, q5_k_m, q5_k_s, q5_0, q4_k_m, q4_k_s, q4_0, q3_k_l, q3_k_m,
        q3_k_s, q2_k, or several of them, made in one pass; "lora" is the adapter alone, which needs no tokenizer.
        imatrix_file: an importance matrix made by llama-imatrix, which the methods q2_k to q6_k follow.
        With `verify` every file is decoded again before it gets its name, and its logits compared with this model's on
        `rows` (token ids; None: a few sentences): CheckpointError above the method's bound; the list that is returned
        has the differences by path in `.differences`.
        """
        from fastft_jax.convert.gguf.export import save_model_gguf

        return save_model_gguf(
            self, Path(folder), tokenizer, quantization_method, imatrix_file, verify=verify, rows=rows
        )

    @property
    def full_finetuning(self) -> bool:
        """Whether every weight trains (`from_pretrained(full_finetuning=True)`)."""
        return trains_everything(self.decoder)

    def save_pretrained_merged(
        self, folder: str | Path, tokenizer: Any | None = None, save_method: str = "merged_16bit", **options
    ) -> Any:
        """Write the model with its adapter merged in ("merged_16bit", "merged_4bit"), or the adapter alone ("lora").

        options as in `fastft_jax.convert.merged.save.save_merged` (base, dtype, max_shard_size, overwrite, verify,
        rows, token). Returns what was written and how it compares with this model, read back.
        """
        if save_method == "lora":
            return save_adapter(self, folder, tokenizer, **options)
        return save_merged(self, folder, tokenizer, save_method, **options)

    def push_to_hub(self, repo_id: str, tokenizer: Any | None = None, save_method: str = "lora", **options) -> str:
        """Upload the adapter or a merged model with a card; options as in `fastft_jax.convert.upload.push_to_hub`."""
        return push_to_hub(self, repo_id, tokenizer, save_method, **options)

    def continue_adapter(self, lora_options: dict[str, Any], given: set[str]) -> None:
        """Train a loaded adapter on: what shapes it is as it was saved, how it is trained may be chosen anew.

        lora_options: get_peft_model's arguments; `given` names those the user wrote. Raises ConfigError for one that
        contradicts the adapter.
        """
        self.remat_policy = resolve_policy(lora_options["use_gradient_checkpointing"])
        if lora_options["loftq_config"]:
            raise ConfigError("lora.loftq_config starts a new adapter, and this one is trained on")
        peft_experts.check_expert_targets(
            self._matched(self.peft_config), self._linear_paths(), self.peft_config["lora_dropout"]
        )
        for key in sorted(given - {"use_gradient_checkpointing", "random_state", "loftq_config"}):
            wanted, has = lora_options[key], self.peft_config[key]
            if key == "target_modules" and wanted == peft.ALL_LINEAR:
                paths = self._linear_paths()
                wanted = peft.condense_targets(peft.match_targets(wanted, paths), paths)
            elif key == "target_modules" and not isinstance(wanted, str):
                wanted = [self.names.leaf(target) for target in wanted]
            if key == "layers_to_transform" and isinstance(wanted, int):
                wanted = [wanted]
            if key.endswith("_pattern"):
                wanted = wanted or {}
            if (set(wanted) if isinstance(wanted, list) else wanted) != (set(has) if isinstance(has, list) else has):
                raise ConfigError(
                    f"lora.{key}={lora_options[key]!r}, but the adapter {self.adapter_path} was made with {has!r}"
                )

    def verify_adapter(self, folder: str | Path) -> str:
        """Read back what `save_pretrained` wrote and compare with the live model; says so in a line.

        An adapter is attached to the base anew: every tensor must be equal to the bit, and so must the logits of a
        fixed row. After full fine-tuning the folder is a model, and its tensors are compared. CheckpointError if not.
        """
        if self.full_finetuning:
            return verify_model(folder, self.decoder, self.hf_config)
        return super().verify_adapter(folder)

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any | None = None,
        positions: Any | None = None,
        segment_ids: Any | None = None,
    ) -> Float[Array, "B T V"]:
        """float32 logits of every position.

        input_ids int [B, T]; attention_mask [B, T], 0 for padding; segment_ids [B, T] number the documents of a packed
        row (0 for padding); positions default to 0..T-1, as in transformers.
        """
        ids = jnp.asarray(input_ids, jnp.int32)
        if ids.ndim != 2:
            raise ValueError(f"input_ids must be [B, T], not of shape {list(ids.shape)}")
        vocab = self.decoder.config.vocab_size
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
            raise ValueError(f"input_ids hold ids outside the model's vocabulary of {vocab}")
        segments = None if segment_ids is None else jnp.asarray(segment_ids, jnp.int32)
        if attention_mask is not None:
            mask = (jnp.asarray(attention_mask) != 0).astype(jnp.int32)
            if int((jnp.abs(jnp.diff(mask, axis=1)).sum(axis=1) + mask[:, 0] + mask[:, -1]).max()) > 2:
                raise ValueError("attention_mask has holes: the tokens of a row must stand together")
            segments = mask if segments is None else segments * mask
        positions = None if positions is None else jnp.asarray(positions, jnp.int32)
        definition, state = nnx.split(self.decoder)
        return _logits(definition, state, ids, positions, segments)

    def generate(self, prompts: list[list[int]], **options) -> list[list[int]]:
        """New token ids after each prompt; options as in `fastft_jax.models.generate.generate`."""
        return generate.generate(self.decoder, prompts, **{"seed": self.random_state, **options})

    def num_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters; a quantised weight counts as the matrix it stands for."""
        trainable = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(self.decoder, nnx.Param)))
        trainable -= lora.padding(self.decoder)
        return trainable, trainable + sum(_logical_sizes(self.decoder))

    def print_trainable_parameters(self) -> None:
        """PEFT's line: how many parameters train, of how many."""
        trainable, total = self.num_parameters()
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")


@partial(jax.jit, static_argnums=0)
def _logits(definition, state, ids, positions, segment_ids):
    decoder = nnx.merge(definition, state)
    return decoder.logits(decoder.hidden_states(ids, positions, segment_ids))


def _logical_sizes(decoder: Decoder) -> Iterable[int]:
    counted = set()  # a tied head that is adapted shares the embedding's array
    for _, variable in nnx.to_flat_state(nnx.state(decoder, nnx.Not(nnx.Param))):
        value = variable.get_value() if isinstance(variable, nnx.Variable) else variable
        array = jax.tree.leaves(value)[0]  # the decoder holds it, so its id is its own; `value` may be a passing copy
        if id(array) in counted:
            continue
        counted.add(id(array))
        if dataclasses.is_dataclass(value):
            yield int(np.prod((*value.codes.shape[:-2], *value.shape)))
        else:
            yield value.size


def _dtype(dtype: Any) -> Any:
    if dtype is None:
        return jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    name = name.removeprefix("torch.").removeprefix("jnp.")
    if name not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[name]
