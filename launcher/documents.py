"""Writes what is made out of the code: ``python -m launcher.documents`` (``make docs``). A test keeps the files equal.

configs/schema.json            of a spec
configs/config.schema.json     of the old flat config file
configs/profile.schema.json    of a profile
docs/spec.md                   every key of a spec
docs/profile.md                every key of a profile
docs/why.md                    every cause that `tunejob why` knows
k8s/examples/                  what the specs in configs/ are on a cluster
tables between markers in README.md, README.ja.md, docs/design.md and docs/operations.md
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from job.exits import EXITS, JobReaction
from job.spec import json_schema, read, reference
from launcher import bundle, profile, why
from launcher.codes import MEANINGS
from launcher.legacy import FLAT, FOUR_BIT
from launcher.render import render

_BEGIN, _END = "<!-- {name}: made by `make docs` -->", "<!-- end of {name} -->"

EXAMPLES = {
    "quickstart": "local",
    "lora-8b": "gpus",
    "qlora-70b": "gpus",
    "multi-gpu": "gpus",
    "japanese-chat": "gpus",
    "gitops": "kueue",
    "cron": "gpus",
}
"""Specs of configs/ that are rendered, each with its profile of configs/profiles/."""
UPLOADED = {
    "quickstart": (
        "model=s3://training/models/SmolLM2-135M-Instruct",
        "data.train=s3://training/data/train.jsonl",
        "data.eval=s3://training/data/eval.jsonl",
    )
}
"""Where files that a spec has on this machine stand for a pod."""

_REACTIONS = {
    JobReaction.COMPLETE: "complete",
    JobReaction.IGNORE: "another pod, not counted",
    JobReaction.COUNT: "another pod, counted",
    JobReaction.FAIL: "fail: trying again cannot help",
}


def made(root: Path) -> dict[Path, str]:
    """Every file that is made, whole or in part, and what it should hold."""
    files = {
        root / "configs" / "schema.json": _json(json_schema()),
        root / "configs" / "config.schema.json": _json(flat_schema()),
        root / "configs" / "profile.schema.json": _json(profile.json_schema()),
        root / "docs" / "spec.md": reference(),
        root / "docs" / "profile.md": profile.reference(),
        root / "docs" / "why.md": why.reference(),
    }
    for name in EXAMPLES:
        files |= example(root, name)
    tables = {"exit codes": exit_table(), "launcher's exit codes": launcher_table()}
    for page in ("README.md", "README.ja.md", "docs/design.md", "docs/operations.md"):
        files[root / page] = with_tables((root / page).read_text(encoding="utf-8"), tables)
    return files


def example(root: Path, name: str) -> dict[Path, str]:
    """The files below k8s/examples/ for one spec of configs/, as ``tunejob render -o`` writes them."""
    spec = read(root / "configs" / f"{name}.yaml", UPLOADED.get(name, ()))
    rendered = render(spec, profile.read(root / "configs" / "profiles" / f"{EXAMPLES[name]}.yaml"))
    files = bundle.objects(rendered)
    files[bundle.KUSTOMIZATION] = bundle.kustomization(Path(path).name for path in files)
    return {root / "k8s" / "examples" / name / path: text for path, text in files.items()}


def flat_schema() -> dict[str, Any]:
    """JSON Schema of the flat config file: each key has the schema of the place in the spec that it stands for."""
    whole = json_schema()
    keys = {key: _at(whole, path) for key, path in FLAT.items()}
    keys["target_modules"] = {**keys["target_modules"]}
    keys["target_modules"]["anyOf"] = [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]
    keys[FOUR_BIT] = {"type": "boolean", "description": "Hold the base in 4 bits: train-qlora."}
    return {
        "$schema": whole["$schema"],
        "title": "Settings of train-lora and train-qlora",
        "type": "object",
        "additionalProperties": False,
        "properties": dict(sorted(keys.items())),
    }


def exit_table() -> str:
    """The exit contract as a Markdown table."""
    lines = ["| code | name | meaning | a Kubernetes Job does |", "|---|---|---|---|"]
    lines += [
        f"| {row.code} | {row.code.name} | {row.meaning} | {_REACTIONS[row.reaction]} |" for row in EXITS.values()
    ]
    return "\n".join(lines)


def launcher_table() -> str:
    """The launcher's exit codes as a Markdown table."""
    rows = [f"| {int(code)} | {meaning} |" for code, meaning in MEANINGS.items()]
    return "\n".join(["| code | meaning |", "|---|---|", *rows])


def with_tables(text: str, tables: dict[str, str]) -> str:
    """A page with each table put between its markers; a page without the markers stays as it is."""
    for name, table in tables.items():
        begin, end = _BEGIN.format(name=name), _END.format(name=name)
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        text = pattern.sub(lambda _, new=f"{begin}\n{table}\n{end}": new, text)  # type: ignore[misc]
    return text


def _at(schema: dict[str, Any], path: str) -> dict[str, Any]:
    """The part of a schema at a dotted path, references followed."""
    place = schema
    for key in path.split("."):
        place = _followed(schema, place)["properties"][key]
    text = place.get("description")
    place = {key: value for key, value in _followed(schema, place).items() if key not in ("title", "$defs")}
    if path == "model":
        place = {"type": "string"}
    return {**place, **({"description": text} if text else {})}


def _followed(schema: dict[str, Any], place: dict[str, Any]) -> dict[str, Any]:
    """The object that a (possibly optional) reference stands for."""
    for option in (place, *place.get("anyOf", ())):
        if name := option.get("$ref"):
            found: dict[str, Any] = schema["$defs"][name.rpartition("/")[2]]
            return found
    return place


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def left_over(root: Path) -> list[Path]:
    """Files below k8s/examples/ that nothing makes any more: a changed spec is another run, of another name."""
    there = [path for path in (root / "k8s" / "examples").rglob("*") if path.is_file()]
    return sorted(set(there) - made(root).keys())


def main() -> int:
    """Writes the files that differ, removes those that nothing makes, and names both."""
    root = Path(__file__).resolve().parent.parent
    for path in left_over(root):
        path.unlink()
        print(f"{path.relative_to(root)} removed")
    for path, text in made(root).items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(path.relative_to(root))
    return 0


if __name__ == "__main__":
    sys.exit(main())
