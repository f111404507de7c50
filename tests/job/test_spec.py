"""The spec is read strictly, and explained in the user's words."""

import inspect
import math
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from job import spec as spec_module
from job.errors import SpecInvalid
from job.spec import (
    JobSpec,
    dump,
    from_mapping,
    json_schema,
    parse,
    read,
    reference,
    run_id,
)
from job.spec_problems import REFUSED, REFUSED_METHODS, RENAMED
from job.strict_yaml import MAX_PROBLEMS
from tests.job.specs import SMALLEST, SPARSE, keys_below, with_override

ROOT = Path(__file__).parents[2]


def refused(text, *overrides):
    with pytest.raises(SpecInvalid) as caught:
        parse(text, "run.yaml", overrides)
    return str(caught.value).splitlines()


def test_a_sparse_spec_is_read_with_its_defaults():
    spec = parse(SPARSE, "run.yaml")
    assert (spec.name, spec.model.source, spec.method) == ("support-ja", "s3://models/Llama-3.1-8B-Instruct", "qlora")
    assert [(source.source, source.weight) for source in spec.data.train] == [("s3://corpus/support/train.jsonl", 1.0)]
    assert (spec.training.learning_rate, spec.training.betas, spec.checkpoints.keep) == (2e-4, (0.9, 0.999), 2)


SHORT_FORMS = {
    "one file": "x",
    "one block": "{from: x}",
    "a list of files": "[x]",
    "a list of blocks": "[{from: x, weight: 1}]",
}


@pytest.mark.parametrize("train", SHORT_FORMS.values(), ids=SHORT_FORMS.keys())
def test_short_and_long_forms_are_the_same_spec(train):
    long = parse("name: a\nmodel: {from: m}\ndata: {train: [{from: x, weight: 1.0}]}", "run.yaml")
    assert parse(f"name: a\nmodel: m\ndata: {{train: {train}}}", "run.yaml") == long


PROBLEMS = {
    "typo": ("training:\n  learnig_rate: 1", "6: training.learnig_rate", "unknown key; did you mean learning_rate?"),
    "wrong place": ("learning_rate: 1", "5: learning_rate", "unknown key; did you mean training.learning_rate?"),
    "wrong place and typo": ("learnig_rate: 1", "5: learnig_rate", "did you mean training.learning_rate?"),
    "two other places": ("every_steps: 1", "5: every_steps", "checkpoints.every_steps or evaluation.every_steps?"),
    "another program's name": ("lr: 1", "5: lr", "unknown key; did you mean training.learning_rate?"),
    "nothing near": ("output: {zzz: 1}", "5: output.zzz", "unknown key; the keys here are adapter_format"),
    "Python's name of an aliased key": (
        "resources: {budget_hours: 1}",
        "5: resources.budget_hours",
        "unknown key; did you mean budget?",
    ),
    "text for a number": ("training: {epochs: '3'}", "5: training.epochs", 'not "3"; write it without quotes'),
    "underscores": ("restart: 1_0", "5: restart", 'a whole number of at least 0, not "1_0"; write it without'),
    "fraction for a whole number": ("restart: 1.0", "5: restart", "expected a whole number of at least 0, not 1.0"),
    "switch for a number": ("restart: true", "5: restart", "a whole number of at least 0, not true"),
    "number for a switch": ("lora: {use_rslora: 1}", "5: lora.use_rslora", "expected true or false, not 1"),
    "old switch": ("lora: {use_rslora: yes}", "5: lora.use_rslora", 'expected true or false, not "yes"'),
    "number for text": (
        "scheduling: {queue: 5}",
        "5: scheduling.queue",
        "expected text, or null, not 5; put it in quotes",
    ),
    "out of range": ("lora: {r: 9999}", "5: lora.r", "expected a whole number from 1 to 1024, not 9999"),
    "half open range": ("lora: {dropout: 1}", "5: lora.dropout", "a number of at least 0 and below 1, not 1"),
    "infinite": ("lora: {alpha: .inf}", "5: lora.alpha", "expected a number above 0, not inf"),
    "beyond floats": (f"lora: {{alpha: 1{'0' * 350}}}", "5: lora.alpha", "expected a number above 0, not 1000"),
    "choice": (
        "training: {schedule: cosin}",
        "5: training.schedule",
        'expected one of cosine, linear, constant, not "cosin"; did you mean cosine?',
    ),
    "union": (
        "training: {gradient_checkpointing: 1}",
        "5: training.gradient_checkpointing",
        "expected auto, or true or false, not 1",
    ),
    "union with a list": (
        "lora: {target_modules: [q, 1]}",
        "5: lora.target_modules",
        'all-linear, or a list of text, not ["q", 1]',
    ),
    "no layers": ("lora: {target_modules: []}", "5: lora.target_modules", "the list is empty"),
    "name of nothing": ("lora: {modules_to_save: ['']}", "5: lora.modules_to_save", "an empty name stands in the list"),
    "target of nothing": ("lora: {target_modules: ['']}", "5: lora.target_modules", "an empty name stands in the list"),
    "token of nothing": ("lora: {new_tokens: ['']}", "5: lora.new_tokens", "an empty name stands in the list"),
    "token twice": ("lora: {new_tokens: [<a>, <b>, <a>]}", "5: lora.new_tokens", '"<a>" stands in the list twice'),
    "list item": ("lora: {modules_to_save: [q, 1]}", "5: lora.modules_to_save.1", "expected text, not 1"),
    "list too short": ("training: {betas: [0.9]}", "5: training.betas", "expected a list of 2 numbers, not [0.9]"),
    "list too long": (
        "training: {betas: [0.9, 0.9, 0.9]}",
        "5: training.betas",
        "a list of 2 numbers, not [0.9, 0.9, 0.9]",
    ),
    "bad item of a pair": ("training: {betas: [0.9, x]}", "5: training.betas.1", 'expected a number, not "x"'),
    "betas": ("training: {betas: [0.9, 1]}", "5: training.betas", "both numbers lie in [0, 1), not [0.9, 1.0]"),
    "min_lr": ("training: {min_lr: 0.1}", "5: training.min_lr", "0.1 lies above training.learning_rate (0.0002)"),
    "keep": ("checkpoints: {keep: 0}", "5: checkpoints.keep", "expected all, or a whole number of at least 1, not 0"),
    "quantization of plain lora": ("quantization: {}", "5: quantization", "only with method: qlora"),
    "biases of a quantised base": (
        "method: qlora\nlora: {bias: all}",
        "6: lora",
        "bias: all cannot go with method: qlora (bitsandbytes turns biases into the type of its input, 16 bits on a "
        "GPU, and they would train in that); leave bias out, or use method: lora",
    ),
    "orthogonal on a quantised base": (
        "method: qlora\nlora: {init: orthogonal}",
        "6: lora",
        "init: orthogonal cannot go with method: qlora (PEFT would give the adapter the integer type",
    ),
    "an odd rank that is to begin orthogonal": (
        "lora: {r: 3, init: orthogonal}",
        "5: lora.init",
        "orthogonal needs an even rank, and r is 3; change r, or use gaussian",
    ),
    "an odd rank of one layer that is to begin orthogonal": (
        "lora: {init: orthogonal, rank_pattern: {q_proj: 4, up_proj: 5}}",
        "5: lora.rank_pattern",
        "init: orthogonal needs even ranks, and up_proj has 5; change it, or use init: gaussian",
    ),
    "two reasons of a quantised base": (
        "method: qlora\nlora: {init: pissa, bias: lora_only}",
        "6: lora",
        "use default, or method: lora; and bias: lora_only cannot go with",
    ),
    "DoRA on int8": (
        "method: qlora\nlora: {use_dora: true}\nquantization: {type: int8}",
        "7: quantization",
        "type: int8 cannot go with lora.use_dora, whose norms PEFT cannot take of weights in int8",
    ),
    "emptied block": ("training:\n", "5: training", "expected a block of keys, not null; write its keys below it, or"),
    "list for a block": ("lora: [1]", "5: lora", "expected a block of keys, not [1]"),
    "newer version": ("version: 2\nfuture: 1", "5: version", "2 is of a newer tunejob, this one reads 1"),
    "older version": ("version: 0", "5: version", "expected 1, not 0"),
    "variable": ("scheduling: {queue: 'q-${TEAM}'}", "5: scheduling.queue", "${TEAM} is not expanded"),
    "Kubernetes variable": ("scheduling: {queue: $(TEAM)}", "5: scheduling.queue", "$(TEAM) is not expanded"),
    "shell variable": ("scheduling: {queue: $TEAM}", "5: scheduling.queue", "$TEAM is not expanded"),
}


@pytest.mark.parametrize(("addition", "where", "what"), PROBLEMS.values(), ids=PROBLEMS.keys())
def test_a_problem_is_told_in_the_words_of_the_file(addition, where, what):
    (line,) = refused(SMALLEST + addition)
    assert line.startswith(f"run.yaml:{where}: ")
    assert what in line


@pytest.mark.parametrize(
    "addition",
    [
        "lora: {bias: all, init: orthogonal}",
        "method: qlora\nlora: {init: gaussian, use_dora: true}",
        "method: qlora\nlora: {use_dora: true}\nquantization: {type: fp4}",
        "method: qlora\nquantization: {type: int8}\nlora: {use_rslora: true, bias: none}",
    ],
)
def test_what_a_base_can_have_passes(addition):
    parse(SMALLEST + addition, "run.yaml")


WHOLE = {
    "nothing required is there": (
        "method: lora",
        [
            "run.yaml: name: missing; add a line like name: support-ja",
            "run.yaml: model: missing; add a line like model: s3://models/Llama-3.1-8B-Instruct",
            "run.yaml: data: missing; add a line like data: {train: data/train.jsonl}",
        ],
    ),
    "paths follow the short form": (
        "name: A\nmodel:\n  id: x\ndata:\n  train:\n    form: x\n",
        [
            "run.yaml:1: name: expected lower-case letters, digits and dashes, a letter first, at most 30 characters, "
            'not "A"',
            "run.yaml:2: model.from: missing; add a line like from: s3://models/Llama-3.1-8B-Instruct",
            "run.yaml:5: data.train.from: missing; add a line like from: data/train.jsonl",
            "run.yaml:6: data.train.form: unknown key; did you mean from?",
        ],
    ),
    "paths follow the long form": (
        "name: a\nmodel: ''\ndata:\n  train:\n  - a\n  - 5\n  - {form: x, from: x}\n  eval: x\n  eval_split: 0.1\n",
        [
            'run.yaml:2: model: expected text, not empty, not ""',
            "run.yaml:6: data.train.1: expected a block of keys, not 5",
            "run.yaml:7: data.train.2.form: unknown key; did you mean from?",
            "run.yaml:9: data.eval_split: not together with data.eval; name the evaluation data, or set a share aside",
        ],
    ),
    "an empty list": (
        "name: a\nmodel: m\ndata: {train: []}",
        ["run.yaml:3: data.train: expected a name, path or URI, or a list of them, not []"],
    ),
}


@pytest.mark.parametrize(("text", "lines"), WHOLE.values(), ids=WHOLE.keys())
def test_all_problems_come_at_once_in_the_order_of_the_file(text, lines):
    assert refused(text) == lines


@pytest.mark.parametrize(
    "value",
    [
        "hf_abcdefghijklmnopqrstuvwxyz",
        "AKIAABCDEFGHIJKLMNOP",
        "https://user:hunter2@host/x",
        "s3://b/x?X-Amz-Signature=abc",
        "ghp_abcdefghijklmnopqrstuvwxyz",
        "|\n    -----BEGIN RSA PRIVATE KEY-----\n    abc",
    ],
)
@pytest.mark.parametrize("place", ["training:\n  epochs: {}", "scheduling:\n  queue: {}", "model_: {}"])
def test_a_secret_is_refused_and_not_repeated(place, value):
    (line,) = refused(SMALLEST + place.format(value))
    assert "looks like a secret; secrets do not belong in a spec" in line
    assert value.strip("|\n ") not in line


@pytest.mark.parametrize("method", [*REFUSED_METHODS, "DPO"])
def test_a_method_that_is_not_offered_is_refused_with_the_reason(method):
    (line,) = refused(f"{SMALLEST}method: {method}")
    assert line == f"run.yaml:5: method: {method}: {REFUSED_METHODS[method.lower()]}"


@pytest.mark.parametrize("pattern", REFUSED)
@pytest.mark.parametrize("place", ["{}: 1", "training: {{{}: 1}}"])
def test_a_key_that_is_not_offered_is_refused_with_the_reason(pattern, place):
    key = pattern.replace("*", "x")
    (line,) = refused(SMALLEST + place.format(key))
    assert line.endswith(f"{key}: {REFUSED[pattern]}")


def test_no_key_of_ours_is_refused_by_name_and_every_renamed_key_leads_to_one():
    paths = {".".join(path) for path in keys_below(JobSpec)}
    last = {path.rpartition(".")[2] for path in paths}
    assert set(RENAMED.values()) - {"method: qlora"} <= paths
    assert not last & {key for key in REFUSED if "*" not in key}


def test_a_flood_of_unknown_keys_is_cut_before_each_is_explained():  # T31
    lines = refused(SMALLEST + "\n".join(f"key{index}: 1" for index in range(20_000)))
    assert len(lines) == MAX_PROBLEMS + 1
    assert lines[-1] == f"and {20_000 - MAX_PROBLEMS} more problems"


def test_overrides_are_laid_over_the_file():
    spec = with_override(
        "training.learning_rate=1e-4", "data.train.0.weight=2", "model.revision=abc", "lora={r: 8}", "name=b", "name=c"
    )
    assert (spec.training.learning_rate, spec.lora.r, spec.name) == (1e-4, 8, "c")
    assert (spec.model.source, spec.model.revision) == ("org/m", "abc")
    assert (spec.data.train[0].source, spec.data.train[0].weight) == ("t.jsonl", 2.0)


def test_an_override_heals_a_problem_of_the_file():
    assert parse(f"{SMALLEST}restart: x", "run.yaml", ["restart=1"]).restart == 1


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("trainig.epochs=1", "--set: trainig: unknown key; did you mean training?"),
        ("training.epoch=1", "--set: training.epoch: unknown key; did you mean epochs?"),
        ("restart=-1", "--set: restart: expected a whole number of at least 0, not -1"),
        ("restart", "--set: restart: expected KEY=VALUE, for instance training.learning_rate=1e-4"),
        ("=1", "--set: =1: expected KEY=VALUE, for instance training.learning_rate=1e-4"),
        ("a..b=1", "--set: a..b=1: expected KEY=VALUE, for instance training.learning_rate=1e-4"),
        ("data.train.1.weight=2", "--set: data.train.1.weight: data.train is a list of 1; write its number from 0"),
        ("data.train.weight=2", "--set: data.train.weight: data.train is a list of 1; write its number from 0"),
        ("name.x=1", "--set: name.x: name holds a value and no keys; set name itself"),
        ("training.use_ema=1", f"--set: training.use_ema: {REFUSED['use_ema']}"),
    ],
)
def test_a_bad_override_is_refused_by_its_name(override, line):
    assert refused(SMALLEST, override) == [line]


def test_problems_of_file_and_overrides_come_together():
    assert [line.split(": ")[0] for line in refused(f"{SMALLEST}foo: 1", "bar=1", "baz", "lora.r=[")] == [
        "run.yaml:5",
        "--set",
        "--set",
        "--set lora.r:1",
    ]


def test_overrides_leave_the_mapping_they_are_laid_over_alone():
    value = {"name": "a", "model": "m", "data": {"train": "x"}}
    from_mapping(value, "flat")
    assert value == {"name": "a", "model": "m", "data": {"train": "x"}}


def test_a_mapping_from_elsewhere_is_checked_the_same_way():
    with pytest.raises(SpecInvalid) as caught:
        from_mapping({"name": "a", "model": "m", "data": {"train": "x"}, "foo": 1}, "config.yaml", {("foo",): 7})
    assert str(caught.value).startswith("config.yaml:7: foo: unknown key")


def test_a_file_is_read_with_its_overrides(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(SMALLEST, encoding="utf-8")
    assert read(path, ["restart=3"]).restart == 3


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SpecInvalid, match=r"none\.yaml: no such file; .*quickstart"):
        read(tmp_path / "none.yaml")


def test_a_directory_is_no_spec(tmp_path):
    with pytest.raises(SpecInvalid, match="a directory; name the spec file inside it"):
        read(tmp_path)


def test_a_path_below_a_file_and_an_impossible_path_are_no_traceback(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "below", Path("a\0b"), tmp_path / ("x" * 5000)):
        with pytest.raises(SpecInvalid, match="cannot be read"):
            read(path)


def test_an_endless_file_is_refused_at_its_limit():
    with pytest.raises(SpecInvalid, match="larger than 1 MiB"):
        read(Path("/dev/zero"))


def test_whole_numbers_stand_for_numbers():
    spec = with_override("training.epochs=3", "lora.alpha=32")
    assert (type(spec.training.epochs), run_id(spec)) == (float, run_id(with_override()))
    assert math.isclose(spec.lora.alpha, 32)


def test_the_schema_is_closed_explained_and_knows_the_short_forms():
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(schema["required"]) == {"name", "model", "data"}
    for section in [schema, *schema["$defs"].values()]:
        assert section["additionalProperties"] is False
        assert section["description"]
        # A field that says no more than its block leaves the words to the block.
        assert all("description" in field or "$ref" in field for field in section["properties"].values())
    assert {"type": "string"} in schema["properties"]["model"]["anyOf"]
    assert {"type": "string"} in schema["$defs"]["Data"]["properties"]["train"]["anyOf"]


def test_the_schema_accepts_what_is_read_and_refuses_what_is_not():
    validator = pytest.importorskip("jsonschema").Draft202012Validator(json_schema())
    for text in (SPARSE, SMALLEST, dump(parse(SPARSE, "run.yaml"))):
        assert list(validator.iter_errors(yaml.safe_load(text.replace("2e-4", "0.0002")))) == []
    for addition in ("foo: 1", "restart: -1", "lora: {r: x}", "training: {schedule: cosin}"):
        assert list(validator.iter_errors(yaml.safe_load(f"{SMALLEST}{addition}")))


def test_the_manual_page_is_up_to_date():
    page = (ROOT / "docs" / "spec.md").read_text(encoding="utf-8")
    assert page == reference(), "run: python -m job.spec > docs/spec.md"


def test_the_manual_page_explains_every_key():
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert all(not line.rstrip().endswith("|  |") for line in rows)
    keys = {line.split("`")[1].replace(".N", "") for line in rows}
    assert {".".join(path) for path in keys_below(JobSpec)} | {"data.train.from", "data.train.weight"} == keys


def test_every_section_is_frozen_and_closed():
    sections = [
        kind for _, kind in inspect.getmembers(spec_module, inspect.isclass) if issubclass(kind, spec_module.Section)
    ]
    assert len(sections) > 10
    assert all(kind.model_config["frozen"] and kind.model_config["extra"] == "forbid" for kind in sections)
    assert all(issubclass(kind, BaseModel) for kind in sections)


def test_problems_of_the_text_and_of_the_spec_come_together():
    text = "name: a\nname: b\nmodel: !x m\ndata: {train: f}\ntraining: {learnig_rate: 1, epochs: *e}\n"
    with pytest.raises(SpecInvalid) as refused:
        parse(text, "run.yaml", ["foo=1"])
    told = str(refused.value).splitlines()
    for line, words in (
        (2, "name: given twice"),
        (3, "tag !x"),
        (5, "alias *e"),
        (5, "did you mean learning_rate"),
    ):
        assert any(one.startswith(f"run.yaml:{line}: ") and words in one for one in told), (words, told)
    assert any(one.startswith("--set: foo") for one in told)
    assert sum("epochs" in one for one in told) == 1, "the alias is one problem, not two"
