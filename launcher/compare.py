"""Runs side by side: the table by method that the first users know, with the figures the runs really took. Pure."""

from collections.abc import Sequence

from launcher.figures import Figure, measured
from launcher.results import Results
from launcher.summary import mebibytes, rows_of

_WORDS: dict[str, dict[str, str]] = {
    "en": {
        "head": "method|memory|training speed|accuracy|use",
        "lora": "fine-tuning in general",
        "qlora": "large models, little memory",
        "speed": "{:,.0f} tokens/s",
        "exact": "exact match {:.1%}",
        "token": "tokens right {:.1%}",
        "loss": "loss {:.4f}",
        "mixed": "The runs differ in {what}: the figures do not compare the methods alone.",
        "model": "base model",
        "rows": "evaluation rows",
        "generated": "number of answered rows",
        "extract": "what is extracted from answers",
        "device": "device",
        "run": "run",
        "key": "Tuned; in brackets the difference to the base with its 95 % interval, for shares in percentage points.",
    },
    "ja": {
        "head": "手法|メモリ使用量|学習速度|精度|用途",
        "lora": "一般的なファインチューニング",
        "qlora": "大規模モデル・メモリ制限時",
        "speed": "{:,.0f} トークン/秒",
        "exact": "完全一致 {:.1%}",
        "token": "トークン正解率 {:.1%}",
        "loss": "損失 {:.4f}",
        "mixed": "{what}が異なるため、手法だけの比較にはなりません。",
        "model": "ベースモデル",
        "rows": "評価行数",
        "generated": "回答を生成した行数",
        "extract": "回答からの抽出方法",
        "device": "デバイス",
        "run": "実行",
        "key": "チューニング後の値。括弧内はベースとの差とその95%信頼区間（割合はポイント差）。",
    },
}
_TITLES = {
    "loss": "損失",
    "perplexity": "パープレキシティ",
    "token_accuracy": "トークン正解率",
    "exact_match": "完全一致",
    "extracted_match": "抽出一致",
}
"""What the figures are called in Japanese, where that is another name."""
_METHODS = {"lora": "LoRA", "qlora": "QLoRA"}
_SHARED = {
    "model": ("model",),
    "rows": ("evaluation.rows", "evaluation.rows_digest"),
    "generated": ("evaluation.generated_rows",),
    "extract": ("evaluation.extract",),
    "device": ("performance.device",),
}
"""What has to be the same for a fair comparison, and where the record has it."""
LANGUAGES = tuple(_WORDS)


def table(runs: Sequence[Results], language: str = "en") -> str:
    """A Markdown table, a row per run in the order given; below it every figure, and what the runs do not share."""
    words = _WORDS[language]
    head = words["head"].split("|")
    lines = rows_of([head, ["---"] * len(head), *(_row(run, words) for run in runs)])
    lines += _evaluations(runs, words, language)
    differing = [
        words[word]
        for word, paths in _SHARED.items()
        if len({tuple(str(run[path]) for path in paths) for run in runs}) > 1
    ]
    if differing:
        joint = "、" if language == "ja" else ", "
        lines += ["", words["mixed"].format(what=joint.join(differing))]
    return "\n".join(lines)


def _evaluations(runs: Sequence[Results], words: dict[str, str], language: str) -> list[str]:
    """A table with a column for each figure that a run has; none where no run was evaluated."""
    figures = list(measured(*runs))
    if not figures:
        return []
    titles = [_TITLES.get(figure.key, figure.title) if language == "ja" else figure.title for figure in figures]
    rows = [[run.name, *(_cell(figure, run) for figure in figures)] for run in runs]
    key = ["", words["key"]] if any(figure.difference(run) for figure in figures for run in runs) else []
    return ["", *rows_of([[words["run"], *titles], ["---"] * (len(titles) + 1), *rows]), *key]


def _cell(figure: Figure, run: Results) -> str:
    number, difference = figure.of(run, "tuned"), figure.difference(run)
    if number is None:
        return "-"
    return f"{figure.written(number)} ({difference})" if difference else figure.written(number)


def _row(run: Results, words: dict[str, str]) -> list[str]:
    method = str(run["method"])
    peak, speed = run.peak_memory, run.tokens_per_second
    return [
        f"{_METHODS.get(method, method)} ({run.name})",
        "-" if peak is None else mebibytes(peak),
        "-" if speed is None else words["speed"].format(speed),
        accuracy(run, words),
        words.get(method, "-"),
    ]


def accuracy(run: Results, words: dict[str, str]) -> str:
    """Exact match where answers were generated, else the share of tokens foretold; and the loss."""
    exact, token, loss = (run.figure(f"evaluation.tuned.{key}") for key in ("exact_match", "token_accuracy", "loss"))
    share = words["exact"].format(exact) if exact is not None else token is not None and words["token"].format(token)
    parts = [share, loss is not None and words["loss"].format(loss)]
    return ", ".join(part for part in parts if part) or "-"
