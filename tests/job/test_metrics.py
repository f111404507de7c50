"""Single answers beside the wanted ones: exact, extracted, chrF and ROUGE-L, in English and Japanese."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from job.evaluation.figures import OF_ANSWERS, figures
from job.evaluation.metrics import COLUMNS, extracted, rouge_l, statistics, tokens

NUMBERS: dict[str, str | None] = {
    "#### 72": "72",
    "He sold 48/2 = 24 and then 72.": "72",
    "It costs $1,234,567 in all": "1234567",
    "1, 2, 3": "3",
    "1,2,3": "3",
    "18.50 dollars": "18.5",
    "72.0": "72",
    "100": "100",
    "it fell to -5": "-5",
    "it fell to −5 degrees": "-5",
    "10-3": "3",
    "答えは１，２３４円です": "1234",
    "0": "0",
    "-0": "0",
    "the area is 20 cm²": "20",
    "the area is 20 m2": "20",
    "20 m2.5": "20",
    "6 g of CO2": "6",
    "Step 2: 3²=9": "9",
    "18 of 20, so 10⁵": None,
    "first 2, then 3½": None,
    "first 2, then 3 ½": None,
    "x = .5": "0.5",
    "x=-.50": "-0.5",
    "so... 5": "5",
    "Rs.500": "500",
    "1.2.3": "3",
    "面積は20m2です": "20",
    "答え18": "18",
    "７２．０": "72",
    "－１２": "-12",
    "3×4": "4",
    "9" * 30: "9" * 30,
    "9" * 29 + "8.50": "9" * 29 + "8.5",
    "nothing": None,
    "": None,
}


@pytest.mark.parametrize("text", NUMBERS)
def test_the_last_number_of_an_answer_counts(text: str) -> None:
    assert extracted(text, "number") == NUMBERS[text]


def test_a_regular_expression_takes_the_group_of_its_last_match() -> None:
    assert extracted("answer: A, no, answer: B", r"answer: (\w)") == "B"
    assert extracted("I do not know", r"answer: (\w)") is None
    assert extracted("72", None) is None


def test_every_answer_of_gsm8k_gives_its_number(real_data: Path) -> None:
    lines = (real_data / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    wrong = []
    for line in lines:
        answer = json.loads(line)["answer"]
        expected = answer.rsplit("####", 1)[1].strip().replace(",", "")
        if extracted(answer, "number") != expected or extracted(answer, r"#### (\S+)").replace(",", "") != expected:
            wrong.append(answer)
    assert len(lines) == 1319
    assert not wrong


@pytest.mark.parametrize("language", ["en", "ja"])
def test_every_number_of_mgsm_is_one(real_data: Path, language: str) -> None:
    path = real_data / "mgsm-ja" / f"mgsm_{language}.tsv"
    with path.open(encoding="utf-8", newline="") as stream:
        answers = [row[-1] for row in csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)]
    assert len(answers) == 250
    for answer in answers:
        found = extracted(f"したがって、答えは{answer}です。", "number")
        assert found is not None
        assert float(found) == float(answer.replace(",", ""))


ROUGE: dict[str, tuple[str, str, float]] = {
    "the same": ("the cat sat", "the cat sat", 1.0),
    "case and punctuation aside": ("The cat -- sat!", "the cat sat.", 1.0),
    "in order": ("police killed the gunman", "police kill the gunman", 0.75),
    "out of order": ("the gunman kill police", "police kill the gunman", 0.5),
    "longer": ("a b c d", "a b", 2 * 0.5 * 1.0 / 1.5),
    "nothing said": ("", "a", 0.0),
    "nothing in common": ("a", "b", 0.0),
    "japanese": ("東京は雨です", "東京は晴れです", 2 * 5 / 13),
    "mixed": ("GPT-2は速い", "GPT-2は遅い", 2 * 4 / 10),
}
"""Lin 2004's own example sentences among them: of his S2 and S3, ROUGE-L tells the order."""


@pytest.mark.parametrize("case", ROUGE)
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence(case: str) -> None:
    answer, wanted, expected = ROUGE[case]
    assert rouge_l(answer, wanted) == pytest.approx(expected)
    assert rouge_l(wanted, answer) == pytest.approx(expected)


def test_japanese_is_counted_by_characters_and_not_as_one_word() -> None:
    assert tokens("東京は、GPU 2枚で1,000円。") == ["東", "京", "は", "gpu", "2", "枚", "で", "1", "000", "円"]
    assert tokens("ｶﾀｶﾅ don't") == ["カ", "タ", "カ", "ナ", "don", "t"]
    assert tokens("서울 날씨") == ["서울", "날씨"]


def test_chrf_is_that_of_sacrebleu_for_any_set_of_rows() -> None:
    from sacrebleu.metrics.chrf import CHRF

    pairs = [
        ("The dog bit the man.", "The dog had bit the man."),
        ("It was not surprising.", "It was not unexpected."),
        ("", "The man bit him first."),
        ("東京は雨です", "東京は晴れです"),
        ("a", "a"),
        ("x", "abcdefghij"),
    ]
    sums = np.array([statistics(answer, wanted, None) for answer, wanted in pairs])
    assert sums.shape == (len(pairs), COLUMNS)
    for chosen in (range(6), range(2), [2], [3], [4, 4, 5]):
        some = [pairs[row] for row in chosen]
        whole = CHRF().corpus_score([answer for answer, _ in some], [[wanted for _, wanted in some]]).score
        assert figures(sums[list(chosen)], OF_ANSWERS)["chrf"] == pytest.approx(whole)


def test_an_answer_that_has_nothing_to_extract_is_never_right() -> None:
    assert statistics("no idea", "no number either", "number")[2] == 0.0
    assert statistics("so it is 72.", "#### 72", "number")[:3] == [1.0, 0.0, 1.0]
    assert statistics(" red\n", "red", None)[:3] == [1.0, 1.0, 0.0]
