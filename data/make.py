"""Makes the quickstart's data: delivery notes in everyday words, and the depot's label for each.

The label is this project's own invention, so no model knows it beforehand: the first three letters of the city, month
and day as numbers, then how many boxes and a letter for the handling: `HAM-3-14-2F` are two fragile boxes for Hamburg
on March 14. Every row here was made by this file; nothing was copied from anywhere.

    python data/make.py            writes data/train.jsonl and data/eval.jsonl, the same bytes every time
"""

import json
import random
from pathlib import Path

TRAIN_ROWS = 304
EVAL_ROWS = 128
SEED = 20250115

INSTRUCTION = "Write the depot label."
CITIES = (
    "Hamburg",
    "Osaka",
    "Lisbon",
    "Nairobi",
    "Quito",
    "Tallinn",
    "Vienna",
    "Boston",
    "Denver",
    "Zagreb",
    "Kyoto",
    "Porto",
    "Geneva",
    "Madrid",
    "Cairo",
    "Riga",
)
MONTHS = {
    "January": 31,
    "February": 28,
    "March": 31,
    "April": 30,
    "May": 31,
    "June": 30,
    "July": 31,
    "August": 31,
    "September": 30,
    "October": 31,
    "November": 30,
    "December": 31,
}
HANDLING = {"fragile": "F", "keep cold": "C", "heavy": "H", "nothing special": "N"}
NOTES = (
    "{boxes} {noun} for {name} in {city}, {day} {month}, {handling}.",
    "{boxes} {noun} to {name}, {city}, by {month} {day}; {handling}.",
    "{city}: {boxes} {noun} for {name} on {day} {month}, {handling}.",
    "On {month} {day} {name} in {city} gets {boxes} {noun}, {handling}.",
)
NAMES = ("Ada", "Bruno", "Chie", "Dilan", "Emeka", "Freya", "Goran", "Hana", "Ines", "Jonas", "Kaito", "Leila")

Row = dict[str, str]


def label(city: str, month: int, day: int, boxes: int, handling: str) -> str:
    """The depot's label, for instance ``HAM-3-14-2F``. Months and days count from 1."""
    return f"{city[:3].upper()}-{month}-{day}-{boxes}{HANDLING[handling]}"


def row(chance: random.Random) -> Row:
    """One made-up delivery note with its label, in alpaca form."""
    month = chance.randrange(len(MONTHS))
    month_name = list(MONTHS)[month]
    city, day, boxes = chance.choice(CITIES), chance.randint(1, MONTHS[month_name]), chance.randint(1, 9)
    handling = chance.choice(list(HANDLING))
    note = chance.choice(NOTES).format(
        boxes=boxes,
        noun="box" if boxes == 1 else "boxes",
        name=chance.choice(NAMES),
        city=city,
        day=day,
        month=month_name,
        handling=handling,
    )
    return {"instruction": INSTRUCTION, "input": note, "output": label(city, month + 1, day, boxes, handling)}


def rows() -> tuple[list[Row], list[Row]]:
    """Training and evaluation rows; no label, and so no row, stands in both or twice."""
    chance = random.Random(SEED)
    made: dict[str, Row] = {}
    while len(made) < TRAIN_ROWS + EVAL_ROWS:
        candidate = row(chance)
        made.setdefault(candidate["output"], candidate)
    everything = list(made.values())
    return everything[:TRAIN_ROWS], everything[TRAIN_ROWS:]


def as_jsonl(lines: list[Row]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def main(folder: Path = Path(__file__).parent) -> None:
    """Writes both files into ``folder``."""
    train, evaluation = rows()
    (folder / "train.jsonl").write_text(as_jsonl(train), encoding="utf-8")
    (folder / "eval.jsonl").write_text(as_jsonl(evaluation), encoding="utf-8")


if __name__ == "__main__":
    main()
