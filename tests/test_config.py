"""A YAML file and overrides become a checked RunConfig; whatever is wrong is said with its line."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft_jax.config import load_config, resolved_lines, to_json, values
from fastft_jax.config_yaml import parse_value
from fastft_jax.errors import ConfigError

GOOD = """\
model:
  model_name: some/model
  max_seq_length: 4096
lora:
  r: 32
  target_modules: all-linear
data:
  path: rows.jsonl
  packing: true
training:
  learning_rate: 2e-4     # PyYAML alone reads text
  eval_strategy: no       # PyYAML alone reads false
  max_steps: 1e3
"""


@pytest.fixture
def write(tmp_path):
    def write_config(text: str = GOOD) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return write_config


def _problems(path: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value).replace(path, "FILE").splitlines()


def test_values_come_from_defaults_the_file_and_the_command_line_in_that_order(write):
    path = write()
    config, origins = load_config(path, ["training.max_steps=10", "training.max_steps=20", "lora.r=8"])
    assert (config.model.max_seq_length, config.lora.r, config.training.max_steps) == (4096, 8, 20)
    assert (config.training.learning_rate, config.training.eval_strategy) == (2e-4, "no")
    assert config.training.packing is True
    assert origins["model.max_seq_length"] == f"{path}:3"
    assert origins["data.packing"] == f"{path}:9"
    assert origins["training.max_steps"] == origins["lora.r"] == "command line"
    assert origins["lora.lora_alpha"] == "default"
    assert origins.keys() == values(config).keys()


def test_every_problem_is_one_line_with_the_file_and_line(write):
    text = """\
modle: {x: 1}
model:
  max_seq_length: two
lora:
  rank: 8
  learning_rate: 1e-4
  use_gradient_checkpointing: sometimes
data:
  path: rows.jsonl
  pakcing: true
training:
  weight_decay: -1
  bf16: true
  deepspeed: zero.json
"""
    lines = _problems(write(text))
    assert sorted(lines) == sorted(
        [
            "FILE:1: there is no section modle; did you mean model?",
            "FILE: model.model_name is required",
            "FILE:3: model.max_seq_length is 'two'; it must be a whole number",
            "FILE:5: lora.rank is not an option here: use r",
            "FILE:6: lora.learning_rate belongs to another section: training.learning_rate",
            "FILE:7: lora.use_gradient_checkpointing='sometimes' is not one of auto, none, selective, offload, full, "
            "unsloth, true, false",
            "FILE:10: data: there is no option pakcing; did you mean packing?",
            "FILE:12: training.weight_decay is -1; it must be at least 0",
            "FILE:13: training.bf16 is not an option here: use model.dtype (from_pretrained's dtype): bfloat16, "
            "float32",
            "FILE:14: training.deepspeed is not supported: a run uses one device",
        ]
    )


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("nonsense", "'nonsense' is not section.key=value, such as training.max_steps=10"),
        ("max_steps=3", "'max_steps=3' names no section; write training.max_steps=3"),
        ("training.max_steps=[1", "training.max_steps: '[1' is not a YAML value"),
        ("training.lr_scheduler_kwargs.num_cycles=2", "only section.key can be set; give the whole of"),
        ("training.max_stesp=3", "training: there is no option max_stesp; did you mean max_steps?"),
        ("trainer.max_steps=3", "there is no section trainer; did you mean training?"),
        ("training.max_steps=soon", "training.max_steps is 'soon'; it must be a whole number"),
    ],
)
def test_a_wrong_override_is_one_line_that_names_the_command_line(write, override, said):
    (line,) = _problems(write(), override)
    assert line.startswith("command line: ")
    assert said in line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model:\n  r: 1\n  r: 2\n", "FILE:3: r is given twice (first on line 2)"),
        ("model: {}\nmodel: {}\n", "FILE:2: model is given twice (first on line 1)"),
        ("model:\n  rope_scaling: {a: 1, a: 2}\n", "FILE:2: a is given twice (first on line 2)"),
        ("model: [1\n", "FILE:2: expected ',' or ']'"),
        ("\tmodel: 1\n", "FILE:1: found character '\\t' that cannot start any token"),
        ("- model\n", "FILE:1: a config is a mapping of sections"),
        ("model: 3\n", "FILE:1: section model must hold options"),
        ("model:\n  model_name: !!python/name:os.system x\n", "FILE:2: could not determine a constructor"),
        ("", "FILE: model.model_name is required"),
    ],
)
def test_a_file_that_is_not_a_config_is_refused_with_its_line(write, text, said):
    assert _problems(write(text))[0].startswith(said)


def test_files_that_cannot_be_read_are_named(tmp_path):
    assert _problems(str(tmp_path / "absent.yaml")) == ["FILE: there is no such file"]
    assert _problems(str(tmp_path)) == ["FILE: cannot be read: Is a directory"]
    (tmp_path / "latin.yaml").write_bytes(b"model:\n  model_name: caf\xe9\n")
    assert _problems(str(tmp_path / "latin.yaml")) == ["FILE: not UTF-8 text (byte 24)"]


def test_an_option_with_two_homes_may_be_given_in_one_of_them(write):
    config, origins = load_config(write(GOOD + "  max_length: 64\n"))
    assert config.training.max_length == 64
    assert origins["data.max_length"].endswith(":14")
    (line,) = _problems(write(GOOD + "  packing: false\n"))
    assert line == "FILE:14: training.packing and data.packing (FILE:9) are one option"
    assert load_config(write(), ["training.packing=false"])[0].training.packing is False


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["training.eval_strategy=epoch"], "there is nothing to evaluate on"),
        (["training.exact_match_rows=5"], "needs held-out rows"),
        (["data.eval_split=test"], "set training.eval_strategy to steps or epoch"),
        (["data.max_length=5000"], "data.max_length 5000 is beyond model.max_seq_length 4096"),
        (["training.embedding_learning_rate=1e-5"], "has no effect without lora.modules_to_save"),
        (["data.eval_split=test", "data.eval_fraction=0.1"], "leave out eval_path and eval_split"),
    ],
)
def test_sections_that_contradict_each_other_are_refused(write, overrides, said):
    assert said in _problems(write(), *overrides)[0]


def test_the_token_is_never_shown_or_stored(write):
    path = write()
    config, origins = load_config(path, ["model.token=hf_secret"])
    shown = "\n".join(resolved_lines(config, origins)) + json.dumps(to_json(config)) + repr(config)
    assert "hf_secret" not in shown
    assert config.model.token == "hf_secret"
    (line,) = _problems(path, "model.token=[hf_secret]")
    assert "hf_secret" not in line


def test_the_table_has_every_option_with_value_and_origin_in_columns(write):
    path = write()
    config, origins = load_config(path)
    lines = resolved_lines(config, origins)
    assert [line.split()[0] for line in lines] == list(origins)
    row = next(line for line in lines if line.startswith("lora.r "))
    assert row.split() == ["lora.r", "32", f"{path}:5"]
    assert json.loads(json.dumps(to_json(config)))["data"]["packing"] is True


@settings(max_examples=50, deadline=None)
@given(st.one_of(st.floats(allow_nan=False), st.integers(), st.booleans(), st.none()))
def test_numbers_written_by_python_or_json_are_read_back_as_they_are(value):
    text = json.dumps(value).replace("Infinity", ".inf")
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [("2e-4", 2e-4), ("1E5", 1e5), (".5", 0.5), ("1.", 1.0), ("yes", "yes"), ("off", "off"), ("010", 10), ("0x1f", 31)]
    + [("1_000", 1000), ("12:30", "12:30"), ("2024-01-01", "2024-01-01"), ("~", None), ("", None), ("e5", "e5")],
)
def test_scalars_are_read_as_yaml_1_2_reads_them(text, value):
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


def test_every_config_of_the_project_loads(repo):
    configs = sorted((repo / "configs").glob("*.yaml"))
    assert {"llama-3.1-8b.yaml", "mistral-7b.yaml", "qwen2.5-7b.yaml", "qwen3-8b.yaml"} <= {c.name for c in configs}
    for path in configs:
        config, _ = load_config(path)
        assert config.training.output_dir != "outputs", path
        command = f"python -m fastft_jax.sft --config configs/{path.name}"
        assert command in path.read_text().splitlines()[0] or path.name == "quickstart.yaml", path
