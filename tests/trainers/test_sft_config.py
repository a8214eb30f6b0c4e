"""SFTConfig takes TRL's names, checks every value, and never accepts a name it does nothing with."""

import ast
import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from fastft_jax.errors import ConfigError
from fastft_jax.trainers.options import NotBuilt, UnsupportedOption, fingerprint
from fastft_jax.trainers.sft_config import SFTConfig


def _fields(package: str, file: str, class_name: str) -> set[str]:
    """Field names of a dataclass, read from its source: importing TRL would import torch."""
    folder = Path(importlib.util.find_spec(package).submodule_search_locations[0])
    tree = ast.parse((folder / file).read_text())
    body = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == class_name).body
    return {n.target.id for n in body if isinstance(n, ast.AnnAssign)}


def test_every_name_of_trl_and_transformers_is_an_option_or_has_a_reason_not_to_be():
    theirs = _fields("trl", "trainer/sft_config.py", "SFTConfig")
    theirs |= _fields("transformers", "training_args.py", "TrainingArguments")
    assert len(theirs) > 100
    assert theirs - set(SFTConfig.model_fields) - set(SFTConfig.known_elsewhere) == set()
    assert set(SFTConfig.model_fields) & set(SFTConfig.known_elsewhere) == set()


@pytest.mark.parametrize("name", sorted(SFTConfig.known_elsewhere))
def test_a_known_name_that_is_not_offered_is_refused_with_its_reason(name):
    kind = NotImplementedError if isinstance(SFTConfig.known_elsewhere[name], NotBuilt) else ConfigError
    with pytest.raises(kind, match=rf"^SFTConfig: {name} is not") as caught:
        SFTConfig(**{name: True})
    assert isinstance(caught.value, ConfigError)
    assert "\n" not in str(caught.value)


def test_transformers_defaults_and_ours_that_differ_are_these():
    c = SFTConfig()
    assert (c.adam_beta1, c.adam_beta2, c.adam_epsilon, c.max_grad_norm) == (0.9, 0.999, 1e-8, 1.0)
    assert (c.num_train_epochs, c.max_steps, c.gradient_accumulation_steps, c.save_steps) == (1.0, -1, 1, 500)
    assert (c.optim, c.learning_rate, c.logging_steps, c.seed) == ("adamw_8bit", 2e-4, 1, 3407)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"learning_rat": 1e-4}, "there is no option learning_rat; did you mean learning_rate?"),
        ({"epochs": 3}, "did you mean num_train_epochs?"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'; it must be a number"),
        ({"learning_rate": 0}, "learning_rate is 0; it must be greater than 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan; it must be a finite number"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0; it must be at least 1"),
        ({"gradient_accumulation_steps": 1.5}, "gradient_accumulation_steps is 1.5; it must be a whole number"),
        ({"warmup_ratio": 1}, "warmup_ratio is 1; it must be less than 1"),
        ({"warmup_steps": 2.5}, "warmup_steps is 2.5; it must be a whole number, or a share below 1"),
        ({"packing": "yes"}, "packing is 'yes'; it must be true or false"),
        ({"seed": True}, "seed is true; it must be a whole number"),
        ({"optim": "adam"}, "optim is 'adam'; it must be one of adamw_8bit, adamw_bnb_8bit"),
        ({"optim": "paged_adamw_8bit"}, "optim: paged_adamw_8bit is not supported"),
        ({"report_to": "comet_ml"}, "report_to: 'comet_ml' is not a tracker"),
        ({"report_to": 3}, "report_to is 3; it must be a list"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"max_steps": -2}, "max_steps is -2; it must be at least -1"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 3}, "use constant_with_warmup"),
        ({"eval_steps": 5}, "eval_steps is given, but eval_strategy is no"),
        ({"lr_scheduler_kwargs": {"num_cycles": "two"}}, "lr_scheduler_kwargs holds 'two'; it must be a number"),
        ({"output_dir": ""}, "output_dir is ''; it must be non-empty text"),
    ],
)
def test_a_wrong_value_is_one_line_that_says_what_to_change(given, said):
    with pytest.raises(ConfigError) as caught:
        SFTConfig(**given)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_problems_are_said_at_once_and_an_unbuilt_one_makes_it_not_implemented():
    with pytest.raises(UnsupportedOption) as caught:
        SFTConfig(learning_rate=-1, packing=3, deepspeed="zero.json")
    assert len(str(caught.value).splitlines()) == 3
    assert isinstance(caught.value, NotImplementedError)


def test_assignment_is_checked_and_a_refused_value_leaves_the_old_one():
    c = SFTConfig(max_steps=7)
    for name, value in (("max_steps", 0), ("learning_rate", -1.0), ("nonsense", 1)):
        with pytest.raises(ConfigError, match=name):
            setattr(c, name, value)
    assert (c.max_steps, c.learning_rate) == (7, 2e-4)
    c.max_steps = 9
    assert c.max_steps == 9


def test_numbers_and_paths_of_other_types_become_plain_ones(tmp_path):
    c = SFTConfig(max_steps=np.int64(5), save_steps=1e3, output_dir=tmp_path, report_to=("wandb",))
    assert (c.max_steps, c.save_steps, c.output_dir, c.report_to) == (5, 1000, str(tmp_path), ["wandb"])
    assert type(c.max_steps) is type(c.save_steps) is int
    assert SFTConfig(report_to="none").report_to == SFTConfig(report_to=None).report_to == []
    assert SFTConfig(report_to="tensorboard").report_to == ["tensorboard"]
    assert copy.deepcopy(c) == c


@pytest.mark.parametrize(
    ("given", "steps"),
    [({}, 0), ({"warmup_ratio": 0.1}, 11), ({"warmup_steps": 5, "warmup_ratio": 0.5}, 5), ({"warmup_steps": 0.1}, 11)],
)
def test_warmup_steps_win_over_the_ratio_which_rounds_up_as_in_transformers(given, steps):
    assert SFTConfig(**given).warmup(101) == steps


def test_evaluations_and_checkpoints_fall_due_as_their_strategies_say():
    c = SFTConfig(eval_strategy="steps", eval_steps=3, save_strategy="epoch")
    assert [s for s in range(1, 8) if c.evaluates_at(s, last_of_epoch=s == 4)] == [3, 6]
    assert [s for s in range(1, 8) if c.saves_at(s, last_of_epoch=s == 4)] == [4]
    assert not SFTConfig(save_strategy="no").saves_at(500, last_of_epoch=True)
    assert SFTConfig(eval_strategy="steps", logging_steps=2).evaluates_at(2, last_of_epoch=False)


def test_the_fingerprint_follows_the_maths_alone():
    base = SFTConfig().maths()
    beside = SFTConfig(output_dir="elsewhere", logging_steps=7, report_to=["wandb"], save_steps=3, run_name="x").maths()
    assert fingerprint(beside) == fingerprint(base)
    assert fingerprint(SFTConfig(learning_rate=1e-4).maths()) != fingerprint(base)


def test_every_option_is_read_by_the_code_that_trains():
    """An option that nothing reads would be accepted and ignored."""
    folder = Path(importlib.util.find_spec("fastft_jax").submodule_search_locations[0])
    sources = [p.read_text() for p in [*folder.glob("trainers/**/*.py"), folder / "sft.py", folder / "config.py"]]
    read = {
        node.attr
        for source in sources
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    assert set(SFTConfig.model_fields) - read == set()
