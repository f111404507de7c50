"""Specs to write tests with."""

from job.spec import parse
from job.spec_problems import section_of

SMALLEST = "name: a\nmodel: org/m\ndata:\n  train: t.jsonl\n"
SPARSE = """\
name: support-ja
model: s3://models/Llama-3.1-8B-Instruct   # or a hub id
data:
  train: s3://corpus/support/train.jsonl
  eval_split: 0.02
  format: messages
method: qlora
lora: {r: 16, alpha: 32, dropout: 0.1, target_modules: all-linear}
training:
  epochs: 3
  learning_rate: 2e-4
  batch_size: 64
  micro_batch_size: 4
  max_length: 2048
resources: {gpus: 1, gpu_type: h100}
"""


def with_override(*overrides):
    """The smallest spec with keys laid over it."""
    return parse(SMALLEST, "run.yaml", overrides)


def keys_below(model, prefix=()):
    """Every key below a section, as a path."""
    for name, info in model.model_fields.items():
        path = (*prefix, info.alias or name)
        yield path
        below = section_of(info.annotation)
        if below:
            yield from keys_below(below, path)
