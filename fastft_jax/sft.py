"""Supervised fine-tuning from one YAML file.

    python -m fastft_jax.sft --config configs/quickstart.yaml [section.key=value ...] [--dry-run]

Exit codes: 0 done (or stopped by a signal with a checkpoint saved), 1 a failed run, 2 a wrong configuration.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastft_jax.command_line import guarded


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fastft_jax.sft", description="Fine-tune a language model (QLoRA).")
    parser.add_argument("--config", required=True, help="YAML file with sections model, lora, data, training, export")
    parser.add_argument("--dry-run", action="store_true", help="print what would be trained, and stop")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change single options")
    arguments = parser.parse_args(argv)
    return guarded(lambda: _run(arguments.config, arguments.overrides, arguments.dry_run))


def _run(path: str, overrides: Sequence[str], dry_run: bool) -> int:
    from fastft_jax.config import load_config, resolved_lines, to_json

    config, origins = load_config(path, overrides)
    for line in resolved_lines(config, origins):
        print(line)
    import jax

    from fastft_jax.language_model import FastLanguageModel
    from fastft_jax.trainers.compile_cache import use_compile_cache
    from fastft_jax.trainers.environment import environment, environment_lines, memory_in_use
    from fastft_jax.trainers.sft import SFTTrainer, check_output_dir

    if not dry_run:  # before minutes of loading, not after
        check_output_dir(config.training, config.training.resume_from_checkpoint)
        config.export.check_targets(config.training.output_dir)
        use_compile_cache(config.training.compile_cache)  # loading compiles, too
    for line in environment_lines(environment(jax.local_devices()[0])):
        print(line)
    train, evaluation = _rows(config)  # first, because it fails fast
    start = time.perf_counter()
    model, tokenizer = FastLanguageModel.from_pretrained(**config.model.model_dump())
    used = memory_in_use(jax.local_devices()[0])
    size = "" if used is None else f" ({used / 2**30:.2f} GiB on the device)"
    print(f"loaded {config.model.model_name} in {time.perf_counter() - start:.1f} s{size}")
    if model.full_finetuning:
        _train_all_of(model, config.lora, _given(origins, "lora"))
    elif model.peft_config is None:
        model = FastLanguageModel.get_peft_model(model, **config.lora.model_dump())
    else:
        model.continue_adapter(config.lora.model_dump(), given=_given(origins, "lora"))
    model.print_trainable_parameters()
    trainer = SFTTrainer(model, tokenizer, train, evaluation, config.training)
    if dry_run:
        for line in trainer.describe(color=sys.stdout.isatty()):
            print(line)
        print(f"dry run: {trainer.total_steps} steps would be trained; nothing was written")
        return 0
    output = trainer.train(run_info={"config": to_json(config), "origins": origins})
    folder = config.training.output_dir
    if output.stopped:
        print(f"stopped at step {output.global_step}; go on with training.resume_from_checkpoint=true")
        return 0
    print(f"{'model' if model.full_finetuning else 'adapter'} saved in {folder}")
    if config.export.verify:
        print(f"read back: {model.verify_adapter(folder)}")
    if config.export.to:
        from fastft_jax.export import export

        model.adapter_path = Path(folder)  # what the run recorded lies there
        rows = [ids[:256] for ids in trainer.train_data.input_ids[:4]]
        settings = config.export.settings(rows, token=config.model.token)
        for line in export(model, tokenizer, config.export.to, config.export.folder(folder), settings):
            print(line)
    return 0


def _train_all_of(model: Any, lora: Any, given: set[str]) -> None:
    """Full fine-tuning: of the lora section only the recomputation policy means anything; ConfigError for the rest."""
    from fastft_jax.errors import ConfigError
    from fastft_jax.models.remat import resolve_policy

    if meaningless := sorted(given - {"use_gradient_checkpointing"}):
        named = ", ".join(f"lora.{key}" for key in meaningless)
        raise ConfigError(f"model.full_finetuning trains every weight, without an adapter: take out {named}")
    model.remat_policy = resolve_policy(lora.use_gradient_checkpointing)


def _given(origins: dict[str, str], section: str) -> set[str]:
    """Options of a section that the user wrote."""
    return {name.split(".", 1)[1] for name, at in origins.items() if name.startswith(f"{section}.") and at != "default"}


def _rows(config: Any) -> tuple[Any, Any]:
    """Training rows and, where the config names some, evaluation rows."""
    from fastft_jax.trainers.data import load_rows
    from fastft_jax.trainers.data.hold_out import hold_out

    data, data_format = config.data, config.training.data_format
    rows, _ = load_rows(data.path, split=data.split, name=data.name, data_format=data_format)
    if data.eval_fraction is not None:
        return hold_out(rows, data.eval_fraction, seed=config.training.seed)
    if not data.evaluates:
        return rows, None
    path = data.eval_path or data.path
    evaluation, _ = load_rows(path, split=data.eval_split, name=data.eval_name or data.name, data_format=data_format)
    return rows, evaluation


if __name__ == "__main__":
    sys.exit(main())
