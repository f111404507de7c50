"""The spec is written back whole, and identified by what is trained."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from job import spec as spec_module
from job.errors import SpecInvalid
from job.spec import (
    WITHOUT_EFFECT,
    JobSpec,
    differences,
    digest,
    dump,
    from_mapping,
    parse,
    resolved,
    run_id,
)
from tests.job.specs import SMALLEST, SPARSE, keys_below, with_override

NAMES = st.from_regex(r"[a-zA-Z][\w./-]{0,8}", fullmatch=True) | st.sampled_from(
    ["on", "1e5", "12:30", "~", "日本 語", "a: b"]
)
POSITIVE = st.floats(1e-9, 1.0)
OPTIONAL_NAME = st.none() | NAMES
QUANTITY = st.from_regex(r"[1-9]\d{0,3}(\.5)?[MG]i", fullmatch=True)


@st.composite
def specs(draw):
    method = draw(st.sampled_from(["lora", "qlora"]))
    value = {
        "name": draw(st.from_regex(r"[a-z][a-z0-9-]{0,29}", fullmatch=True)),
        "model": draw(
            NAMES | st.fixed_dictionaries({"from": NAMES}, optional={"id": OPTIONAL_NAME, "revision": NAMES})
        ),
        "data": {
            "train": draw(st.lists(st.fixed_dictionaries({"from": NAMES}, optional={"weight": POSITIVE}), min_size=1)),
            "columns": draw(st.fixed_dictionaries({}, optional={"prompt": NAMES, "text": OPTIONAL_NAME})),
            "chat_template": draw(OPTIONAL_NAME),
        },
        "method": method,
        "lora": draw(
            st.fixed_dictionaries(
                {}, optional={"alpha": POSITIVE, "target_modules": st.lists(NAMES, min_size=1, max_size=3)}
            )
        ),
        "training": {
            "learning_rate": draw(POSITIVE),
            "betas": draw(st.lists(st.floats(0, 0.999), min_size=2, max_size=2)),
            "gradient_checkpointing": draw(st.booleans() | st.just("auto")),
        },
        "checkpoints": {"keep": draw(st.integers(1, 9) | st.just("all")), "every_minutes": draw(st.none() | POSITIVE)},
        "resources": {"budget": draw(st.none() | POSITIVE), "memory": draw(st.none() | QUANTITY)},
    }
    if method == "qlora" and draw(st.booleans()):
        value["quantization"] = {"type": draw(st.sampled_from(["nf4", "fp4"]))}
    return from_mapping(value, "made up")


@given(specs())
def test_a_dumped_spec_is_read_back_as_the_resolved_one(spec):
    text = dump(spec)
    assert parse(text, "dumped") == resolved(spec)
    assert from_mapping(yaml.safe_load(text), "by another reader") == resolved(spec)
    assert dump(parse(text, "dumped")) == text


@given(specs())
def test_a_spec_and_its_resolved_form_are_the_same_run(spec):
    assert run_id(resolved(spec)) == run_id(spec)
    assert differences(spec, resolved(spec)) == []


def test_a_dump_spells_out_every_key():
    written = yaml.safe_load(dump(parse(f"{SMALLEST}method: qlora", "run.yaml")))

    def at(path):
        value = written
        for key in path:
            value = value[key]
        return value

    for path in keys_below(JobSpec):
        at(path)
    assert (written["model"]["id"], written["quantization"]["type"]) == ("org/m", "nf4")
    assert "quantization" not in yaml.safe_load(dump(parse(SMALLEST, "run.yaml")))


def test_the_run_id_of_a_spec_never_changes():
    assert run_id(parse(SPARSE, "run.yaml")) == "support-ja-b6e99298"
    assert digest(parse(SPARSE, "run.yaml")).startswith("b6e99298")


OF_NO_EFFECT = {
    "training.micro_batch_size": 1,
    "training.gradient_checkpointing": "true",
    "training.kernels": "reference",
    "training.logging_steps": 1,
    "training.on_out_of_memory": "halve",
    "training.parallelism": "shard",
    "output.serve_with": "vllm",
    "training.loader_workers": 2,
    "checkpoints.every_steps": 7,
    "checkpoints.every_minutes": 7,
    "checkpoints.keep": "all",
    "output.adapter_format": "both",
    "resources.gpus": 8,
    "resources.budget": 5,
    "scheduling.queue": "q",
    "restart": 1,
    "model.id": "org/m",
}

OF_EFFECT = {
    "model.from": "other",
    "model.id": "other",
    "model.revision": "abc",
    "data.train": "other",
    "data.train.0.weight": 2,
    "data.eval": "other",
    "data.eval_split": 0.1,
    "data.format": "text",
    "data.columns.prompt": "q",
    "data.columns.completion": "q",
    "data.columns.system": "q",
    "data.columns.messages": "q",
    "data.columns.text": "q",
    "data.chat_template": "none",
    "data.train_on": "all",
    "data.max_bad_rows": 1,
    "data.max_dropped": 0.2,
    "method": "qlora",
    "lora.r": 8,
    "lora.alpha": 8,
    "lora.dropout": 0,
    "lora.target_modules": "[q]",
    "lora.use_rslora": "true",
    "lora.bias": "all",
    "lora.modules_to_save": "[q]",
    "lora.use_dora": "true",
    "lora.init": "gaussian",
    "lora.rank_pattern": "{q: 2}",
    "lora.alpha_pattern": "{q: 2}",
    "lora.new_tokens": "[x]",
    "training.epochs": 1,
    "training.max_steps": 1,
    "training.batch_size": 8,
    "training.learning_rate": 0.1,
    "training.schedule": "linear",
    "training.warmup_ratio": 0,
    "training.min_lr": 1e-5,
    "training.optimizer": "paged_adamw_8bit",
    "training.weight_decay": 0.1,
    "training.betas": "[0.9, 0.99]",
    "training.max_grad_norm": 2,
    "training.max_length": 8,
    "training.long_rows": "error",
    "training.precision": "float32",
    "training.seed": 1,
    "evaluation.every_steps": 1,
    "evaluation.max_rows": 1,
    "evaluation.generate_rows": 1,
    "evaluation.extract": "number",
    "evaluation.min_improvement": 0.1,
    "evaluation.max_new_tokens": 1,
}


@pytest.mark.parametrize(("key", "value"), OF_NO_EFFECT.items())
def test_what_cannot_change_the_result_leaves_the_run_alone(key, value):
    base, other = with_override(), with_override(f"{key}={value}")
    assert key == "model.id" or other != base
    assert run_id(other) == run_id(base)
    assert differences(other, base) == []


@pytest.mark.parametrize(("key", "value"), OF_EFFECT.items())
def test_what_is_trained_makes_the_run(key, value):
    base, other = with_override(), with_override(f"{key}={value}")
    assert run_id(other) != run_id(base)
    assert differences(other, base)


OF_QUANTIZATION = {"type": "fp4", "double_quant": "false", "compute_dtype": "float16", "max_unquantized": 0.5}
OF_EVALUATIONS_ON_THE_WAY = {"early_stopping": 2, "publish": "best"}


@pytest.mark.parametrize(("key", "value"), OF_EVALUATIONS_ON_THE_WAY.items())
def test_what_follows_from_evaluations_on_the_way_makes_the_run(key, value):
    base = with_override("evaluation.every_steps=1")
    assert digest(with_override("evaluation.every_steps=1", f"evaluation.{key}={value}")) != digest(base)
    with pytest.raises(SpecInvalid, match=r"set evaluation\.every_steps"):
        with_override(f"evaluation.{key}={value}")


@pytest.mark.parametrize(("key", "value"), OF_QUANTIZATION.items())
def test_quantization_makes_the_run(key, value):
    assert digest(with_override("method=qlora", f"quantization.{key}={value}")) != digest(with_override("method=qlora"))


def test_every_key_is_known_to_have_an_effect_or_none():
    trained = {".".join(path) for path in keys_below(JobSpec) if path[0] in spec_module.IDENTITY and path[1:]}
    tested = set(OF_EFFECT) | {f"training.{key}" for key in WITHOUT_EFFECT}
    blocks = {"data.columns", *(f"quantization.{key}" for key in OF_QUANTIZATION)}
    assert trained - tested == blocks | {f"evaluation.{key}" for key in OF_EVALUATIONS_ON_THE_WAY}


def test_the_name_begins_the_run_id_and_is_not_in_the_digest():
    one, other = with_override(), with_override("name=b")
    assert digest(one) == digest(other)
    assert (run_id(one), run_id(other)) == (f"a-{digest(one)[:8]}", f"b-{digest(one)[:8]}")


def test_differences_name_the_key_and_both_values():
    here = with_override("data.train=[x, {from: y, weight: 2}]", "method=qlora", "training.learning_rate=2e-4")
    there = with_override("data.train=x", "training.learning_rate=1e-4", "training.kernels=reference", "name=b")
    assert differences(here, there) == [
        'data.train.1.from: "y" here, absent there',
        "data.train.1.weight: 2.0 here, absent there",
        'method: "qlora" here, "lora" there',
        'quantization.type: "nf4" here, absent there',
        "quantization.double_quant: true here, absent there",
        'quantization.compute_dtype: "auto" here, absent there',
        "quantization.max_unquantized: 0.2 here, absent there",
        "training.learning_rate: 0.0002 here, 0.0001 there",
    ]
