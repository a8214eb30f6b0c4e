"""A run's options from one YAML file and `section.key=value` overrides, with the origin of every value.

    config, origins = load_config("configs/llama-3.1-8b.yaml", ["training.max_steps=10"])

Everything wrong is said at once, a line each, with the file's line. Options that say how rows become tokens (packing,
max_length, ...) belong to SFTConfig in Python and are written in the `data` section of a file; `training` takes them
too.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from fastft_jax.config_sections import DataSection, ExportSection, LoraSection, ModelSection
from fastft_jax.config_yaml import Given, parse_value, read_file
from fastft_jax.errors import ConfigError
from fastft_jax.trainers.options import Options, Problem, UnsupportedOption, did_you_mean, shown, unknown
from fastft_jax.trainers.sft_config import SFTConfig

SECTIONS: dict[str, type[Options]] = {
    "model": ModelSection,
    "lora": LoraSection,
    "data": DataSection,
    "training": SFTConfig,
    "export": ExportSection,
}
# SFTConfig's options whose place in a file is `data`
TOKENS = ("data_format", "chat_template", "train_on_responses_only", "packing", "max_length")

COMMAND_LINE = "command line"
DEFAULT = "default"


class RunConfig(Options):
    """Every option of a run; a section is a field."""

    model: ModelSection
    lora: LoraSection = Field(default_factory=LoraSection)
    data: DataSection
    training: SFTConfig = Field(default_factory=SFTConfig)
    export: ExportSection = Field(default_factory=ExportSection)

    @model_validator(mode="after")
    def _agree(self) -> "RunConfig":
        if problems := disagreements(self):
            raise ValueError("\n".join(problems))
        return self


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> tuple[RunConfig, dict[str, str]]:
    """Read, override and check a config.

    Args:
        path: the YAML file.
        overrides: `section.key=value`, the value in YAML; they win over the file, and later ones over earlier ones.

    Returns:
        The config, and the origin of every option, by `section.key`: 'default', 'file:line' or 'command line'.

    Raises:
        ConfigError: anything wrong, a line for each problem; UnsupportedOption (a ConfigError and a
            NotImplementedError) when one of them is an option that is known but not built.
    """
    given, problems = read_file(path)
    lines = [Problem("", line) for line in problems]
    chosen: dict[tuple[str, str], Given] = {}
    for item in given:
        home = _home(item)
        if home in chosen:
            other = chosen[home]
            lines.append(Problem("", f"{item.where}: {item.name} and {other.name} ({other.where}) are one option"))
        chosen[home] = item
    for text in overrides:
        try:
            item = _override(text)
            chosen[_home(item)] = item
        except ConfigError as error:
            lines.append(Problem("", f"{COMMAND_LINE}: {error}"))
    sections, more = _check(path, chosen)
    lines += more
    if not lines:
        lines += [Problem("", f"{path}: {line}") for line in disagreements(_unchecked(sections))]
    if lines:
        kind = UnsupportedOption if any(line.unsupported for line in lines) else ConfigError
        raise kind("\n".join(line.message for line in lines))
    config = RunConfig(**sections)
    where = {_shown_name(*home): item.where for home, item in chosen.items()}
    return config, {name: where.get(name, DEFAULT) for name in values(config)}


def _home(item: Given) -> tuple[str, str]:
    """Section and key of the field that holds the option."""
    return ("training" if item.section == "data" and item.key in TOKENS else item.section), item.key


def _shown_name(section: str, key: str) -> str:
    return f"data.{key}" if section == "training" and key in TOKENS else f"{section}.{key}"


def _names(section: str) -> set[str]:
    """Options that may be written in a section."""
    return set(SECTIONS[section].model_fields) | (set(TOKENS) if section == "data" else set())


def _override(text: str) -> Given:
    name, equals, value = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not equals or not section:
        raise ConfigError(f"{text!r} is not section.key=value, such as training.max_steps=10")
    if not dot:
        homes = [other for other in SECTIONS if section in _names(other)]
        hint = f"; write {homes[0]}.{section}={value}" if homes else "; it is section.key=value"
        raise ConfigError(f"{text!r} names no section{hint}")
    if "." in key:
        raise ConfigError(
            f"{name}: only section.key can be set; give the whole of {section}.{key.split('.')[0]} as YAML"
        )
    try:
        return Given(section, key, parse_value(value), COMMAND_LINE)
    except ValueError as error:
        raise ConfigError(f"{name}: {value!r} is not a YAML value: {error}") from None


def _check(path: str | Path, chosen: dict[tuple[str, str], Given]) -> tuple[dict[str, Options], list[Problem]]:
    """The sections that are right, and a line for everything that is wrong."""
    found: list[Problem] = []
    by_section: dict[str, dict[str, Given]] = {name: {} for name in SECTIONS}
    for (section, key), item in chosen.items():
        if section in by_section:
            by_section[section][key] = item
        elif not any(p.key == section for p in found):
            hint = did_you_mean(section, SECTIONS)
            found.append(Problem(section, f"{item.where}: there is no section {section}{hint}"))
    sections: dict[str, Options] = {}
    for section, items in by_section.items():
        instance, problems = SECTIONS[section].check({key: item.value for key, item in items.items()})
        if instance is not None:
            sections[section] = instance
        for problem in problems:
            item = items.get(problem.key)
            where = item.where if item else str(path)
            spelled = item.section if item else section
            found.append(Problem("", f"{where}: {_say(spelled, problem)}", problem.unsupported))
    return sections, found


def _say(section: str, problem: Problem) -> str:
    """A section's problem, with the section's name; an option of another section is sent there."""
    key = problem.key
    if key and key not in _names(section) and key not in SECTIONS[section].known_elsewhere:
        homes = [other for other in SECTIONS if key in _names(other)]
        if homes:
            return f"{section}.{key} belongs to another section: {homes[0]}.{key}"
        return f"{section}: {unknown(SECTIONS[section], key, _names(section)).message}"
    return (
        f"{section}.{problem.message}" if problem.message.startswith(key) and key else f"{section}: {problem.message}"
    )


def _unchecked(sections: dict[str, Options]) -> RunConfig:
    return RunConfig.model_construct(**sections)


def disagreements(config: RunConfig) -> list[str]:
    """What two sections say against each other; an option that would have no effect is one of these."""
    problems = []
    data, training = config.data, config.training
    if training.eval_strategy != "no" and not data.evaluates:
        problems.append(
            f"training.eval_strategy is {training.eval_strategy}, but there is nothing to evaluate on: "
            "give data.eval_path, data.eval_split or data.eval_fraction"
        )
    if data.evaluates and training.eval_strategy == "no" and not training.exact_match_rows:
        problems.append("data names rows to evaluate on; set training.eval_strategy to steps or epoch")
    if training.exact_match_rows and not data.evaluates:
        problems.append(
            "training.exact_match_rows needs held-out rows: give data.eval_path, eval_split or eval_fraction"
        )
    if training.max_length is not None and training.max_length > config.model.max_seq_length:
        problems.append(
            f"data.max_length {training.max_length} is beyond model.max_seq_length {config.model.max_seq_length}"
        )
    targets = config.lora.target_modules
    ends = [t for t in ([targets] if isinstance(targets, str) else targets) if "embed_tokens" in t or "lm_head" in t]
    if training.embedding_learning_rate is not None and not (config.lora.modules_to_save or ends):
        problems.append(
            "training.embedding_learning_rate has no effect without lora.modules_to_save: [embed_tokens, lm_head]"
        )
    return problems


def to_json(config: RunConfig) -> dict[str, dict[str, Any]]:
    """The options as JSON can hold them, as a file would group them; secrets appear as '***'."""
    tree: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for name, value in values(config).items():
        section, key = name.split(".", 1)
        tree[section][key] = value
    return tree


def values(config: RunConfig) -> dict[str, Any]:
    """Every option by `section.key`, in the order of the file's sections; secrets as '***'."""
    flat: dict[str, Any] = {}
    for section in SECTIONS:
        options = getattr(config, section)
        for key, value in options.model_dump().items():
            if not (section == "training" and key in TOKENS):
                flat[f"{section}.{key}"] = "***" if key in options.secrets and value is not None else value
        if section == "data":
            flat |= {f"data.{key}": getattr(config.training, key) for key in TOKENS}
    return flat


def resolved_lines(config: RunConfig, origins: dict[str, str]) -> list[str]:
    """The table of every option, its value and its origin, a line each, in columns."""
    flat = values(config).items()
    rows = [
        (name, value if isinstance(value, str) else shown(value), origins.get(name, DEFAULT)) for name, value in flat
    ]
    wide = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return [f"{name:<{wide[0]}}  {value:<{wide[1]}}  {origin}" for name, value, origin in rows]
