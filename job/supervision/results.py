"""What a run found, put together for people: eval_results.json and the model card. Pure."""

from collections.abc import Mapping
from typing import Any

from job.loading import loading_code
from job.spec import JobSpec

_FIGURES = {
    "loss": "loss (nats per token)",
    "perplexity": "perplexity",
    "token_accuracy": "token accuracy",
    "exact_match": "exact match",
    "extracted_match": "extracted answer",
    "chrf": "chrF (0 to 100)",
    "rouge_l": "ROUGE-L",
}
"""What the model card calls the figures."""


def eval_results(
    run: str,
    spec: JobSpec,
    evaluation: Mapping[str, Any],
    data: Mapping[str, Any],
    verification: Mapping[str, Any],
    performance: Mapping[str, Any],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """The record in eval_results.json.

    Args:
        performance: the worker's, with its own phases.
        seconds: the supervisor's phases; ``worker`` is all of the worker's life.
    """
    inner: Mapping[str, float] = performance["phases"]
    phases = {name: value for name, value in seconds.items() if name != "worker"}
    phases["start"] = max(0.0, seconds["worker"] - sum(inner.values()))
    phases |= inner
    order = ("preflight", "own", "pull", "prepare", "start", "load", "train", "seal", "evaluate", "verify")
    train = inner["train"]
    return {
        "run": run,
        "method": spec.method,
        "model": spec.model.name,
        "new_tokens": list(spec.lora.new_tokens),
        "evaluation": dict(evaluation),
        "data": dict(data),
        "verification": dict(verification),
        "performance": dict(performance)
        | {
            "phases": {name: round(phases[name], 3) for name in order if name in phases},
            "seconds": round(sum(phases.values()), 3),
            "train_seconds": train,
        },
    }


def model_card(run: str, spec: JobSpec, results: Mapping[str, Any]) -> str:
    """README.md of the adapter: what it is, what it scored, how it is loaded."""
    quantized = ["- qlora"] if spec.method == "qlora" else []
    head = ["---", f"base_model: {spec.model.name}", "library_name: peft", "tags:", "- lora", *quantized, "---"]
    loading = loading_code(spec.model.name, "PATH/OF/THIS/FOLDER", spec.method == "qlora", bool(spec.lora.new_tokens))
    body = [
        f"# {spec.name}",
        f"A {'QLoRA' if spec.method == 'qlora' else 'LoRA'} adapter for `{spec.model.name}` "
        f"(rank {spec.lora.r}, alpha {spec.lora.alpha:g}), run `{run}`.",
        "## Evaluation",
        *_evaluation_lines(results["evaluation"]),
        "## Loading it",
        f"```python\n{loading}\n```",
        "`training_config.yaml` reproduces the run; `run/manifest.json` lists every file with size and SHA-256.",
    ]
    return "\n".join(head) + "\n\n" + "\n\n".join(body) + "\n"


def _evaluation_lines(evaluation: Mapping[str, Any]) -> list[str]:
    if "skipped" in evaluation:
        return [f"None: {evaluation['skipped']}"]
    rows = ["| | base | tuned | difference | 95 % interval |\n|---|---|---|---|---|"]
    for key, words in _FIGURES.items():
        if key not in evaluation["base"]:
            continue
        base, tuned, difference = (evaluation[side][key] for side in ("base", "tuned", "difference"))
        ends = (difference["low"], difference["high"])
        interval = "-" if None in ends else "{:+.4f} to {:+.4f}".format(*ends)
        rows.append(f"| {words} | {base:.4f} | {tuned:.4f} | {difference['value']:+.4f} | {interval} |")
    generated, extract = evaluation["generated_rows"], evaluation["extract"]
    answered = f"; {generated} of them answered by greedy generation" if generated else ""
    what = f", of the answers `{extract}` is compared" if extract else ""
    return [f"{evaluation['rows']} held-out rows{answered}{what}.", "\n".join(rows), _published(evaluation)]


def _published(evaluation: Mapping[str, Any]) -> str:
    """Which step's state it is, and whether the training ended before its time."""
    step, best, early = (evaluation[key] for key in ("published_step", "best", "stopped_early"))
    text = f"This is the state after step {step} of {evaluation['steps']}"
    if best is not None and best["step"] == step:
        text += f", the one of the lowest evaluation loss on the way ({best['loss']:.4f})"
    return text + (f"; stopped early, {early['planned_steps']} steps were planned." if early else ".")
