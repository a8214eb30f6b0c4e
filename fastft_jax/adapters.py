"""What a model does with PEFT adapters: attach, load several and switch between them, give back their tensors."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from fastft_jax.convert import peft
from fastft_jax.convert.hub import resolve_model
from fastft_jax.convert.original_weights import OriginalWeights
from fastft_jax.convert.peft import experts as peft_experts
from fastft_jax.convert.peft import targets as peft_targets
from fastft_jax.convert.peft.fused import fused, is_fused, split
from fastft_jax.convert.peft.names import PREFIX
from fastft_jax.errors import CheckpointError, ConfigError
from fastft_jax.models import adapter_swap, lora, lora_ends, lora_starts, whole_modules
from fastft_jax.models.decoder import Decoder
from fastft_jax.models.families.names import NameTable

DEFAULT_NAME = "default"  # PEFT's name for an adapter that was given none


class _Away(NamedTuple):
    """An adapter that is not on the decoder at the moment."""

    config: dict[str, Any]
    path: Path | None
    loftq_start: dict[str, np.ndarray]
    taken: dict[Any, Any]


class Adapters:
    """The part of FastLanguageModel that knows adapters; names of methods and arguments are PEFT's.

    One adapter at a time is on the decoder: the one that computes, trains and is saved. The others keep their arrays
    on the device.
    """

    decoder: Decoder
    names: NameTable

    def __init__(self):
        self.peft_config: dict[str, Any] | None = None  # of the active adapter
        self.adapter_path: Path | None = None  # where a loaded adapter came from
        self.active_adapter: str | None = None
        self._away: dict[str, _Away] = {}
        self._loftq_start: dict[str, np.ndarray] = {}  # of the active adapter, if it has a base of its own
        self._originals = adapter_swap.Originals()

    # --- several adapters on one base ----------------------------------------------------------------------------

    @property
    def adapter_names(self) -> list[str]:
        """Every adapter of this model, the active one first."""
        return [*([] if self.active_adapter is None else [self.active_adapter]), *self._away]

    def load_adapter(self, model_id: str | Path, adapter_name: str, token: str | None = None) -> None:
        """Read another adapter of this base from a folder or a hub id. It becomes active where none was; otherwise
        `set_adapter` makes it so. Whatever goes wrong leaves the model as it was.

        ConfigError for a name that is taken; CheckpointError and NotImplementedError as `read_adapter`, and for
        tensors that do not fit the base.
        """
        if adapter_name in self.adapter_names:
            raise ConfigError(f"this model has an adapter {adapter_name!r} already; choose another name")
        folder = resolve_model(str(model_id), token=token)
        config, tensors = peft.read_adapter(folder)
        before = self.active_adapter
        self._put_away()
        try:
            self._add(adapter_name, config, tensors, folder)
            if before is not None:
                self._put_away()
        except BaseException:
            adapter_swap.take_off(self.decoder, self._originals)
            self.active_adapter = self.peft_config = self.adapter_path = None
            self._loftq_start = {}
            raise
        finally:
            if before is not None:
                self._take_up(before)

    def set_adapter(self, adapter_name: str) -> None:
        """Make another of the loaded adapters the one that computes and trains."""
        self._require(adapter_name)
        if adapter_name != self.active_adapter:
            self._put_away()
            self._take_up(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; where it was the active one, the bare base is left."""
        self._require(adapter_name)
        if adapter_name == self.active_adapter:
            self._put_away()
        del self._away[adapter_name]

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """`with model.disable_adapter():` the bare base computes, as if it had no adapter."""
        before = self.active_adapter
        self._put_away()
        try:
            yield
        finally:
            if before is not None:
                self._take_up(before)

    def _require(self, adapter_name: str) -> None:
        if adapter_name not in self.adapter_names:
            there = ", ".join(self.adapter_names) or "none"
            raise ConfigError(f"no adapter is called {adapter_name!r}; there are: {there}")

    def _add(self, name: str, config: dict[str, Any], tensors: dict[str, np.ndarray], folder: Path) -> None:
        if is_fused(config, tensors):
            if not self.names.fused_experts:
                raise NotImplementedError(
                    f"{folder}: the adapter uses target_parameters={config['target_parameters']} for experts that "
                    f"{self.decoder.config.model_type} checkpoints do not hold in one tensor; that is not supported"
                )
            tensors = split(config, tensors, self.decoder.config.experts.num_experts)
        config = peft_experts.plain_config(config, tensors, self._linear_paths())
        self._attach(config, seed=0, init=True)
        self._code_base_anew(tensors)
        self._take_tensors(folder, tensors)
        self.active_adapter, self.adapter_path = name, folder

    def _put_away(self) -> None:
        if self.active_adapter is None:
            return
        taken = adapter_swap.take_off(self.decoder, self._originals)
        self._away[self.active_adapter] = _Away(self.peft_config, self.adapter_path, self._loftq_start, taken)
        self.active_adapter = self.peft_config = self.adapter_path = None
        self._loftq_start = {}

    def _take_up(self, name: str) -> None:
        self.peft_config, self.adapter_path, self._loftq_start, taken = self._away.pop(name)
        adapter_swap.put_on(self.decoder, taken)
        self.active_adapter = name

    # --- a config's modules --------------------------------------------------------------------------------------

    @property
    def _head_path(self) -> str:
        return self.names.hf_name("lm_head.weight").removesuffix(".weight")

    @property
    def _embedding_path(self) -> str:
        return self.names.hf_name("embed_tokens.weight").removesuffix(".weight")

    def _linear_paths(self) -> list[str]:
        """Hugging Face's paths of every linear module, the head among them."""
        return [*(site.hf_path for site in lora.sites(self.decoder, self.names)), self._head_path]

    def _matched(self, config: dict[str, Any]) -> list[str]:
        """Paths of the modules that an adapter of this config adapts."""
        targets, paths = config["target_modules"], self._linear_paths()
        if not (isinstance(targets, str) and targets.lower() == peft.ALL_LINEAR):
            paths.append(self._embedding_path)
        return peft.match_targets(
            targets,
            paths,
            config["layers_to_transform"],
            config["layers_pattern"],
            config["exclude_modules"],
            config["modules_to_save"],
        )

    def _attach(self, config: dict[str, Any], seed: int, init: bool | str) -> None:
        """Put an adapter of this config on the bare base; whatever goes wrong leaves it bare."""
        try:
            self._build(config, seed, init)
        except BaseException:
            adapter_swap.take_off(self.decoder, self._originals)
            raise
        self.peft_config = config

    def _build(self, config: dict[str, Any], seed: int, init: bool | str) -> None:
        # the config of a new adapter says how it starts, which `init` repeats; a file's was checked when it was read
        found = peft.unsupported(config | {"init_lora_weights": True}, ())
        if found:
            raise NotImplementedError(f"the adapter asks for {', '.join(found)}, which is not built yet")
        matched = self._matched(config)
        ends = [path for path in matched if path in (self._head_path, self._embedding_path)]
        from_weights = isinstance(init, str) and init.startswith((lora_starts.PISSA, lora_starts.LOFTQ))
        for option, unusual in (("use_dora=True", config["use_dora"]), (f"init_lora_weights={init!r}", from_weights)):
            if ends and unusual:
                raise NotImplementedError(f"{option} with {ends[0]} among target_modules is not built yet")
        if config["use_dora"] and from_weights:
            raise NotImplementedError(f"use_dora=True with init_lora_weights={init!r} is not built yet")
        if config["lora_bias"] and (ends or config["use_dora"] or from_weights):
            beside = ends[0] if ends else "use_dora=True" if config["use_dora"] else f"init_lora_weights={init!r}"
            raise NotImplementedError(f"lora_bias=True with {beside} is not built (PEFT has it on plain LoRA alone)")
        tokens = self._trained_tokens(config, ends)
        peft_experts.require_plain(config, matched, from_weights)
        rank = {path: peft.value_of(config["rank_pattern"], path, config["r"]) for path in matched}
        scaling = {
            path: lora.lora_scaling(
                r, peft.value_of(config["alpha_pattern"], path, config["lora_alpha"]), config["use_rslora"]
            )
            for path, r in rank.items()
        }
        dropout = config["lora_dropout"]
        targets = [site for site in lora.sites(self.decoder, self.names) if site.hf_path in rank]
        lora.add_lora(
            self.decoder,
            targets,
            r=[rank[site.hf_path] for site in targets],
            scaling=[scaling[site.hf_path] for site in targets],
            dropout=dropout,
            init=True if from_weights else init,
            use_dora=config["use_dora"],
            lora_bias=config["lora_bias"],
            seed=seed,
        )
        if from_weights:
            self._start_from_weights(targets, init, config)
        for path in ends:
            options = {"r": rank[path], "scaling": scaling[path], "init": init, "seed": seed}
            if path == self._head_path:
                lora_ends.adapt_head(self.decoder, dropout=dropout, **options)
            else:
                lora_ends.adapt_embedding(self.decoder, **options)
        if config["bias"] != "none":
            lora.train_biases(self.decoder, config["bias"], self._originals)
        if tokens:
            lora_ends.train_tokens(self.decoder, tokens)
        if config["modules_to_save"]:
            whole_modules.train_whole(
                self.decoder, self.names, self._saved_paths(config["modules_to_save"]), self._originals
            )

    def _trained_tokens(self, config: dict[str, Any], adapted_ends: list[str]) -> list[int]:
        """Ids of the tokens whose rows of the embedding train."""
        if config["trainable_token_indices"] is None:
            return []
        tied = self.decoder.config.tie_word_embeddings
        whole = [m for m in config["modules_to_save"] or () if m.endswith(("embed_tokens", "lm_head"))]
        beside = [path for path in (*adapted_ends, *whole) if tied or not path.endswith(self._head_path)]
        if beside:
            raise NotImplementedError(
                f"trainable_token_indices beside an adapted or saved {beside[0]} is not built yet"
            )
        return peft_targets.trained_tokens(config["trainable_token_indices"], self.decoder.config.vocab_size)

    def _start_from_weights(self, targets: list[lora.Site], init: str, config: dict[str, Any]) -> None:
        if init != lora_starts.LOFTQ:
            lora_starts.start_from_principal_part(targets, lora_starts.power_iterations(init))
            return
        turns = (config["loftq_config"] or {}).get("loftq_iter", 1)
        self._loftq_start = lora_starts.start_from_quantisation_error(
            self.decoder, targets, self._original_weights(), turns, self._originals
        )

    def _original_weights(self) -> lora_starts.Original:
        weights = OriginalWeights(resolve_model(self.name_or_path), self.names)
        return lambda site: weights(site.path, site.layer)

    def _code_base_anew(self, tensors: dict[str, np.ndarray]) -> None:
        """The NF4 codes that belong to a loaded LoftQ adapter with a base of its own."""
        ends = (f".{lora_starts.START_A}", f".{lora_starts.START_B}")
        self._loftq_start = {n.removeprefix(PREFIX): tensors[n] for n in tensors if n.endswith(ends)}
        if self._loftq_start:
            paths = {name.rpartition(".")[0] for name in self._loftq_start}
            targets = [site for site in lora.sites(self.decoder, self.names) if site.hf_path in paths]
            lora_starts.requantise(self.decoder, targets, self._original_weights(), self._loftq_start, self._originals)

    def _saved_paths(self, modules: list[str]) -> list[str]:
        paths = [whole.hf_path for whole in whole_modules.saveable(self.decoder, self.names)]
        paths += [path for path in self._linear_paths() if path not in paths]
        return peft.match_saved_modules(modules, paths)

    # --- tensors -------------------------------------------------------------------------------------------------

    def _peft_name(self, name: str) -> str:
        """PEFT's tensor name for one of ours."""
        if not name.endswith(".bias") or name.endswith(".lora_B.bias"):
            return f"{PREFIX}{name}"
        module = name.removesuffix(".bias")
        adapted = {site.hf_path for site in lora.sites(self.decoder, self.names) if site.adapted}
        return peft.bias_name(module, adapted=module in adapted)

    def _other_tensors(self) -> dict[str, np.ndarray]:
        """What is saved beside the trained tensors."""
        return self._base_tensors() | {f"{PREFIX}{name}": value for name, value in self._loftq_start.items()}

    def _base_tensors(self) -> dict[str, np.ndarray]:
        """The base's own embedding and head, where they are adapted: PEFT saves them whole beside the pair."""
        ends = [(self._embedding_path, self.decoder.embed_tokens), (self._head_path, self.decoder.lm_head)]
        return {
            f"{PREFIX}{path}.base_layer.weight": np.asarray(module.weight.get_value())
            for path, module in ends
            if module is not None and module.adapted
        }

    def _saved_tensors(self) -> dict[str, np.ndarray]:
        """The adapter's tensors by PEFT's names, as they are saved."""
        tensors = lora.trainable_tensors(self.decoder, self.names)
        tensors = {name: np.asarray(value) for name, value in tensors.items()}
        for name, start in lora.start_tensors(self.decoder, self.names).items():  # [A; A0] and [B, -B0]
            parts = (start, 0) if name.endswith("lora_A.weight") else (-start, 1)
            tensors[name] = np.concatenate([tensors[name], np.asarray(parts[0])], axis=parts[1])
        tensors = {self._peft_name(name): value for name, value in tensors.items()} | self._other_tensors()
        return fused(tensors) if self.names.fused_experts else tensors

    def _saved_config(self) -> dict[str, Any]:
        """adapter_config.json for `_saved_tensors`: that of plain LoRA of twice the rank where a pair is subtracted."""
        config = self.peft_config
        if not str(config["init_lora_weights"]).startswith(lora_starts.PISSA):
            return config
        wider = math.sqrt(2) if config["use_rslora"] else 2  # alpha / r and alpha / sqrt(r) stay what they are
        return config | {
            "init_lora_weights": True,
            "r": 2 * config["r"],
            "lora_alpha": wider * config["lora_alpha"],
            "rank_pattern": {key: 2 * r for key, r in config["rank_pattern"].items()},
            "alpha_pattern": {key: wider * alpha for key, alpha in config["alpha_pattern"].items()},
        }

    def _take_tensors(self, folder: Path, tensors: dict[str, np.ndarray]) -> None:
        mine = lora.trainable_tensors(self.decoder, self.names)
        ours = {self._peft_name(name): name for name in mine}
        base = self._base_tensors() if any(name.endswith(".base_layer.weight") for name in tensors) else {}
        known = ours.keys() | base.keys() | {f"{PREFIX}{name}" for name in self._loftq_start}
        missing, unexpected = sorted(ours.keys() - tensors.keys()), sorted(tensors.keys() - known)
        if missing or unexpected:
            what = f"lacks {missing[0]!r}" if missing else f"holds {unexpected[0]!r}, which nothing here takes"
            raise CheckpointError(f"adapter {folder} {what} ({len(missing)} missing, {len(unexpected)} unexpected)")
        wanted = {name: mine[path] for name, path in ours.items()} | {n: v for n, v in base.items() if n in tensors}
        for name, value in wanted.items():
            if tensors[name].shape != value.shape:
                raise CheckpointError(
                    f"adapter {folder}: {name!r} has shape {list(tensors[name].shape)}, "
                    f"the base model wants {list(value.shape)}"
                )
        for name in base.keys() & tensors.keys():
            if not _equal_when_rounded(tensors[name], base[name]):
                raise CheckpointError(
                    f"adapter {folder}: {name!r} is not the base model's own; the adapter was trained on another base"
                )
        lora.set_trainable_tensors(self.decoder, self.names, {path: tensors[name] for name, path in ours.items()})

    def verify_adapter(self, folder: str | Path) -> str:
        """Read an adapter folder back, attach it to the base anew, and compare with the live model; says so in a line.

        Every tensor must be equal to the bit, and so must the logits of a fixed row. Raises CheckpointError if not.
        """
        config, tensors = peft.read_adapter(folder)
        mine = self._saved_tensors()
        for name, value in mine.items():
            if name not in tensors or not np.array_equal(tensors[name], value):
                raise CheckpointError(f"{folder}: {name!r} is not what was trained")
        clone = type(self)(
            nnx.clone(self.decoder), self.names, self.hf_config, name=self.name_or_path, max_seq_length=1
        )
        adapter_swap.take_off(clone.decoder, self._originals)
        clone._add(DEFAULT_NAME, config, tensors, Path(folder))
        row = np.arange(16)[None] % self.decoder.config.vocab_size
        live = self(row)
        difference = float(jnp.abs(clone(row) - live).max())
        # a saved PiSSA pair is the same product in another program, and rsLoRA's scaling one of another square root
        share = 1e-4 if self.decoder.dtype == jnp.float32 else 2e-2
        bound = 0.0 if self._saved_config() is self.peft_config else share * float(jnp.abs(live).max())
        if difference > bound:
            raise CheckpointError(f"{folder}: logits differ by {difference:.3g} from the live model's")
        return f"{len(mine)} tensors of {folder} are equal to the bit, max |logit difference| {difference}"


def _equal_when_rounded(stored: np.ndarray, own: np.ndarray) -> bool:
    """Equal in the narrower of the two dtypes: an adapter may come from the same base in other precision."""
    narrow = stored.dtype if stored.dtype.itemsize <= own.dtype.itemsize else own.dtype
    return np.array_equal(stored.astype(narrow), own.astype(narrow))
