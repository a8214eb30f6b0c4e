"""Supervised fine-tuning: rows of text or conversations in, a trained adapter out."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from fastft_jax.errors import ConfigError, DataError, TrainingError
from fastft_jax.quant.dense import is_quantised
from fastft_jax.quant.int8 import Int8Array
from fastft_jax.quant.nf4 import NF4Array
from fastft_jax.trainers.compile_cache import use_compile_cache
from fastft_jax.trainers.data import BatchSource, PreparedDataset, check_tokenizer, load_rows, prepare
from fastft_jax.trainers.environment import environment, write_run_file
from fastft_jax.trainers.exact_match import Answers, answer_held_out, questions
from fastft_jax.trainers.loop import Loop, TrainOutput
from fastft_jax.trainers.report import METRICS, Reporter
from fastft_jax.trainers.sft_config import SFTConfig

ADAPTER, MODEL = "adapter_config.json", "config.json"  # one of them is the sign of a finished run


class SFTTrainer:
    """Trains a model's adapter by next-token cross-entropy on the trained tokens.

    Args (names as in TRL):
        model: a FastLanguageModel that get_peft_model has given an adapter, or loaded with full_finetuning=True.
        processing_class: its tokenizer.
        train_dataset: a datasets.Dataset, a list of dicts, a path or hub id, or a PreparedDataset.
        eval_dataset: the same, for `evaluate` and eval_strategy.
        args: an SFTConfig.

    Everything about the data is checked here; nothing is written before `train`.
    Raises ConfigError, DataError.
    """

    def __init__(
        self,
        model: Any,
        processing_class: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        args: SFTConfig | None = None,
    ):
        self.model, self.tokenizer = model, processing_class
        self.args = args = args or SFTConfig()
        if train_dataset is None:
            raise ConfigError("SFTTrainer needs a train_dataset")
        if self.tokenizer is None:
            raise DataError("there is no tokenizer (processing_class is None), and text cannot be trained on without")
        check_tokenizer(self.tokenizer, model.decoder.config.vocab_size)
        if np.dtype(model.decoder.dtype) == np.float16:
            # gradients below 6e-8 would become zero: float16 needs a scaled loss
            raise NotImplementedError("training in float16 is not built yet; use dtype bfloat16 or float32")
        self.max_length = args.max_length or model.max_seq_length
        self.train_data, _ = self._prepare(train_dataset)
        self.eval_data, eval_rows = (None, None) if eval_dataset is None else self._prepare(eval_dataset)
        self._questions = self._held_out_questions(eval_rows)
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        seed = args.seed if args.data_seed is None else args.data_seed
        source = BatchSource(
            self.train_data, rows, self.max_length, packing=args.packing, seed=seed, shuffle=args.shuffle
        )
        evaluation = self.eval_data and BatchSource(
            self.eval_data, args.eval_batch_size, self.max_length, packing=args.packing, shuffle=False
        )
        identity = {
            "model": {**asdict(model.decoder.config), "dtype": np.dtype(model.decoder.dtype).name, **_storage(model)},
            "lora": self.model.peft_config,
            "data": {"tokens": _fingerprint(self.train_data), "max_length": self.max_length},
        }
        self.loop = Loop(model, args, source, evaluation, identity)

    @property
    def total_steps(self) -> int:
        return self.loop.total_steps

    def describe(self, color: bool = False) -> list[str]:
        """What is trained on, for people: the counts and one rendered sample with its trained part marked."""
        source, stats = self.loop.train_source, self.train_data.stats
        lines = [f"train: {stats.summary()}"]
        if self.eval_data is not None:
            lines.append(f"eval: {self.eval_data.stats.summary()}")
        packed = f", {source.fill:.0%} filled, at most {source.max_segments} documents a row" if source.packing else ""
        lines.append(
            f"rows of {source.width} tokens{packed}; {source.batch_size} rows a step, "
            f"{source.steps_per_epoch} steps an epoch, {self.total_steps} steps in all"
        )
        lines += [f"note: {note}" for note in self.train_data.notes]
        return [*lines, "sample (its trained part marked):", self.train_data.sample_text(color=color)]

    def train(
        self, resume_from_checkpoint: bool | str | None = None, run_info: dict[str, Any] | None = None
    ) -> TrainOutput:
        """Train, and leave the adapter (the model, where all of it trains) in args.output_dir.

        resume_from_checkpoint: True for the newest complete checkpoint of output_dir, or a checkpoint's folder.
        run_info: what else to store in run.json (resolved options and their origins).
        Raises ConfigError when output_dir holds another run, TrainingError when the run fails; checkpoints stay.
        """
        args = self.args
        resume = resume_from_checkpoint if resume_from_checkpoint is not None else args.resume_from_checkpoint
        self._claim_output_dir(resume)
        use_compile_cache(args.compile_cache)
        first = self.loop.resume(resume)
        device = jax.local_devices()[0]
        info = run_info or {"config": {"training": args.model_dump()}}
        write_run_file(args.output_dir, {**info, "lora": self.model.peft_config, "environment": environment(device)})
        with Reporter(
            args.output_dir,
            total_steps=self.total_steps,
            report_to=args.report_to,
            run_name=args.run_name,
            config=info.get("config"),
            resumed_step=first,
            device=device,
        ) as reporter:
            for line in self.describe(color=reporter.is_terminal):
                reporter.say(line)
            if first:
                reporter.say(f"resumed from {self.loop.store.path(first)}")
            elif resume:
                reporter.say(f"{args.output_dir} has no complete checkpoint yet: starting at the beginning")
            before = self._answer(reporter, "before") if not first else None
            try:
                output = self.loop.run(first, reporter)
            finally:
                self.loop.write_back()
            if output.stopped:
                return output
            if after := self._answer(reporter, "after"):
                self._show_answers(reporter, before, after)
                output.metrics["exact_match"] = after.exact_match
        self.save_model(args.output_dir)
        return output

    def evaluate(self) -> dict[str, float]:
        """eval_loss, eval_perplexity and eval_token_accuracy over eval_dataset."""
        result = self.loop.evaluate()
        return {
            "eval_loss": result["loss"],
            "eval_perplexity": float(np.exp(result["loss"])),
            "eval_token_accuracy": result["token_accuracy"],
        }

    def save_model(self, output_dir: str | os.PathLike) -> None:
        """Write the adapter or model, and the tokenizer with the chat template that was trained on."""
        self.model.save_pretrained(output_dir)
        if self.train_data.chat_template is not None:
            self.tokenizer.chat_template = self.train_data.chat_template
        try:
            self.tokenizer.save_pretrained(str(output_dir))
        except Exception as error:  # its Rust part raises a bare Exception for a full disk
            what = "model" if self.model.full_finetuning else "adapter"
            raise TrainingError(f"the {what} is in {output_dir}, but its tokenizer cannot be saved: {error}") from error

    def _prepare(self, dataset: Any) -> tuple[PreparedDataset, tuple[Any, str] | None]:
        if isinstance(dataset, PreparedDataset):
            return dataset, None
        args = self.args
        rows, data_format = load_rows(dataset, data_format=args.data_format)
        prepared = prepare(
            rows,
            self.tokenizer,
            max_length=self.max_length,
            data_format=data_format,
            chat_template=args.chat_template,
            train_on_responses_only=args.train_on_responses_only,
        )
        return prepared, (rows, data_format)

    def _claim_output_dir(self, resume: bool | str | None) -> None:
        check_output_dir(self.args, resume)
        source = self.model.base_folder
        if self.model.full_finetuning and source and Path(self.args.output_dir).resolve() == Path(source).resolve():
            raise ConfigError(f"output_dir {source} is the folder that the model was loaded from: name another one")
        if not resume:
            self.loop.store.clear()
            (Path(self.args.output_dir) / METRICS).unlink(missing_ok=True)

    def _held_out_questions(self, eval_rows: tuple[Any, str] | None) -> list[list[dict[str, str]]]:
        if not self.args.exact_match_rows:
            return []
        if eval_rows is None:
            raise ConfigError("exact_match_rows needs held-out conversations: give eval_dataset (data.eval_path)")
        return questions(*eval_rows, limit=self.args.exact_match_rows)

    def _answer(self, reporter: Reporter, when: str) -> Answers | None:
        if not self._questions:
            return None
        answers = answer_held_out(
            self.model.generate,
            self.tokenizer,
            self._questions,
            chat_template=self.train_data.chat_template,
            max_new_tokens=self.args.exact_match_max_new_tokens,
        )
        reporter.say(
            f"exact match {when} training: {answers.exact_match:.1%} of {len(answers.given)} held-out questions"
        )
        return answers

    def _show_answers(self, reporter: Reporter, before: Answers | None, after: Answers) -> None:
        for i in range(min(3, len(after.given))):
            reporter.say(f"question: {after.questions[i]}")
            if before is not None:
                reporter.say(f"  before: {_one_line(before.given[i])}")
            reporter.say(f"  after:  {_one_line(after.given[i])}")
            reporter.say(f"  wanted: {_one_line(after.expected[i])}")


def check_output_dir(args: SFTConfig, resume: bool | str | None) -> None:
    """ConfigError where a run must not write into args.output_dir: a file, a model's own folder, another run's."""
    folder = Path(args.output_dir)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"output_dir {folder} is a file; name a folder")
    if (folder / MODEL).exists() and not (folder / METRICS).exists():
        raise ConfigError(f"output_dir {folder} holds a model (config.json); name another folder for the adapter")
    names = {p.name for p in folder.iterdir()}
    checkpoints = {name for name in names if name.startswith("checkpoint-")}
    old = sorted(checkpoints | names & {METRICS, ADAPTER, MODEL})
    # A run that was killed before its first checkpoint may begin again; a finished one is not to be lost that way.
    resumable = resume and (resume is not True or checkpoints or not names & {ADAPTER, MODEL})
    if old and not resumable and not args.overwrite_output_dir:
        raise ConfigError(
            f"output_dir {folder} holds another run ({old[0]}); resume it with resume_from_checkpoint: true, "
            "start afresh with overwrite_output_dir: true, or name another folder"
        )


def _one_line(text: str) -> str:
    return " ".join(text.split())[:160]


def _storage(model: Any) -> dict[str, bool]:
    """How the base is held, as far as it changes the maths; what is not so is left out (but for load_in_4bit)."""
    leaves = jax.tree.leaves(nnx.state(model.decoder), is_leaf=is_quantised)
    stored = {"load_in_4bit": any(isinstance(leaf, NF4Array) for leaf in leaves)}
    stored |= {"load_in_8bit": True} if any(isinstance(leaf, Int8Array) for leaf in leaves) else {}
    return stored | ({"full_finetuning": True} if model.full_finetuning else {})


def _fingerprint(data: PreparedDataset) -> str:
    """Tells one tokenised data set from another."""
    import hashlib

    digest = hashlib.sha256()
    for ids, labels in zip(data.input_ids, data.labels, strict=True):
        digest.update(ids.tobytes())
        digest.update(labels.tobytes())
    return digest.hexdigest()
