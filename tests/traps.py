"""``python -m tests.traps``: which test holds which trap of training, as docs/traps.md has it.

A test names its traps on its ``def`` line (``# T15``), in its docstring, or in its name (``test_t15_``).
"""

import ast
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "traps.md"

TRAPS = {
    1: "the loss does not depend on how a step is cut into micro-batches",
    2: "nor on the number of ranks",
    3: "the last, shorter step of an epoch is normalised by its own tokens",
    4: "no model's own loss is used, so none can ignore the count of tokens",
    5: "evaluation is weighted by tokens, whatever the batch size",
    6: "prompts are masked, answers and their end-of-turn are trained",
    7: "padding is masked by position, also where its token is the end-of-text",
    8: "exactly one beginning-of-text, and the prompt is the one asked with when served",
    9: "exactly one end-of-text after plain text",
    10: "tokens that span the end of the prompt",
    11: "templates that rewrite earlier turns",
    12: "over-long rows by a stated policy, counted",
    13: "nothing left to train is an error before training",
    14: "packed rows do not see each other",
    15: "packing loses no token",
    16: "as many trained tokens in every kernel",
    17: "the chunked loss is the cross entropy",
    18: "every adapter matrix moves, no base weight does",
    19: "a fresh adapter changes nothing, a switched-off one neither",
    20: "target modules that match nothing, the head, and Conv1D",
    21: "the saved adapter loads elsewhere and is the same",
    22: "a resumed run is the uninterrupted one",
    23: "resuming neither wraps nor initialises the adapter again",
    24: "a checkpoint that is not whole is never resumed from",
    25: "nor one whose upload is not whole, and the best is never pruned",
    26: "a changed spec or changed data refuses, and nothing old is kept silently",
    27: "SIGTERM at any moment leaves in time with what was trained",
    28: "a Job's retry is the same run",
    29: "NaN never reaches the weights",
    30: "memory of the device, of the container and every other failure are told apart",
    31: "mistyped keys, and numbers that YAML takes for text",
    32: "merging adds to de-quantised weights and never quantises again",
    33: "new tokens are trained, saved and loaded",
    34: "adapters in float32, loss scaling kept in the checkpoint",
    35: "the same seed gives the same bytes",
    36: "empty, broken and odd files",
    37: "evaluation between two steps on 4 bits",
    38: "clipping once a step, on the whole gradient",
    39: "accelerate divides nothing and steps no scheduler",
    40: "ranks with different, also no, micro-batches",
    41: "a step's rows do not depend on the number of ranks",
    42: "the chunked head has the model's own maths or is not used",
    43: "attention that cannot keep rows apart is refused by name",
    44: "a lost rank is no interruption",
    45: "ranks stop after the same step",
    46: "as many ranks as were asked for",
    47: "inits that change the base are published to fit the untouched one",
    48: "what is trained, quantised and left alone is counted before loading",
    49: "a quantised base keeps its 16-bit embeddings",
    50: "masks by markers, by a registered template, by sentinels, or not at all",
}


def holders(root: Path = ROOT) -> dict[int, list[str]]:
    """Trap -> the tests that name it, as ``path::test``."""
    found: dict[int, list[str]] = defaultdict(list)
    for path in sorted(root.glob("tests/**/test_*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for number in sorted(_named(node, text.splitlines())):
                    found[number].append(f"{path.relative_to(root)}::{node.name}")
    return dict(found)


def _named(node: ast.FunctionDef, lines: list[str]) -> set[int]:
    head = lines[node.lineno - 1 : node.body[0].lineno - 1]
    in_name = re.match(r"test_t(\d+)_", node.name)
    words = " ".join([*head, ast.get_docstring(node) or ""])
    return {int(n) for n in re.findall(r"\bT(\d{1,2})\b", words)} | ({int(in_name[1])} if in_name else set())


def page() -> str:
    """The page, in Markdown."""
    held = holders()
    rows = []
    for number, what in TRAPS.items():
        tests = held.get(number, [])
        names = "<br>".join(f"`{Path(one.partition('::')[0]).name}` {one.partition('::')[2]}" for one in tests[:3])
        more = f" and {len(tests) - 3} more" if len(tests) > 3 else ""
        rows.append(f"| T{number} | {what} | {names}{more} |")
    return f"{_HEAD}\n" + "\n".join(rows) + "\n"


_HEAD = """# The traps of training, and the test that holds each

Made by `python -m tests.traps`; `tests/test_traps.py` sees that no row is without a test. The numbers are those of the
list of traps that other trainers fell into.

| | what is right | held by |
|---|---|---|"""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
