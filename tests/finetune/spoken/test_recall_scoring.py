"""Which value an answer says, and what many answers amount to."""

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from finetune.spoken import KINDS, recall_csv, recall_tables, score_words, summarize_recall
from finetune.spoken.scoring import numbers_in, outcome, said_value

ANSWERS = [
    ("thing", "Laura likes oranges.", "oranges"),
    ("thing", "She likes Oranges!", "oranges"),
    ("thing", "Simon likes oranges.", "oranges"),  # the name does not count
    ("thing", "Oranges, no, cheese.", "oranges"),  # the first of two
    ("thing", "cheese", "cheese"),
    ("thing", "I had an orange on a horse.", None),  # neither is the word that was told
    ("thing", "She lives in London.", None),  # of another kind
    ("thing", "chessboard", None),
    ("place", "In LONDON's center", "London"),
    ("place", "In Múnich, I believe.", "Munich"),
    ("number", "Twenty.", "twenty"),
    ("number", "It is 20!", "twenty"),
    ("number", "twenty-five", None),
    ("number", "twenty five", None),
    ("number", "25", None),
    ("number", "20.5", None),
    ("number", "the 20th", None),
    ("number", "Twenty, five times twenty.", "twenty"),
    ("number", "twenty twenty", "twenty"),
    ("number", "One moment, it is thirty.", "thirty"),
    ("number", "0", "zero"),
    ("number", "a hundred", "hundred"),
    ("number", "one hundred", "hundred"),
    ("number", "100", "hundred"),
    ("number", "one hundred and twenty", None),
    ("number", "one hundred and twenty thousand", None),
    ("number", "hundred twenty five million", None),
    ("number", "one hundred and", "hundred"),
    ("number", "one hundred two hundred", "hundred"),  # two numbers
    ("number", "thousand twenty thousand", "thousand"),
    ("number", "ten hundred", "thousand"),
    ("number", "zero hundred", "zero"),
    ("number", "five zero", "zero"),  # two numbers, and five is no value
    ("number", "two hundred", None),
    ("number", "1,000", "thousand"),
    ("number", "1000", "thousand"),
    ("number", "thirty thousand", None),
    ("number", "a million", "million"),
    ("number", "1 million", "million"),
    ("number", "1,000,000", "million"),
    ("number", "9" * 5000, None),
    ("number", "", None),
    ("place", " … ", None),
]


@pytest.mark.parametrize(("kind", "text", "value"), ANSWERS)
def test_the_first_value_of_the_kind_is_the_answer(kind: str, text: str, value: str | None) -> None:
    assert said_value(text, kind) == value


@pytest.mark.parametrize("kind", KINDS)
def test_every_value_is_read_as_it_is_told(kind: str) -> None:
    for value in KINDS[kind].values:
        for text in (value, f"It is {value}.", value.upper()):
            assert said_value(text, kind) == value


# fmt: off
UNITS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]
# fmt: on
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def written_out(number: int, conjunction: str) -> str:
    """A number below 10^9 in words, "one million two hundred and five"."""
    for scale, name in ((10**6, "million"), (1000, "thousand"), (100, "hundred")):
        if number >= scale:
            high, low = divmod(number, scale)
            joined = conjunction if low < 100 else " "
            rest = joined + written_out(low, conjunction) if low else ""
            return f"{written_out(high, conjunction)} {name}{rest}"
    if number < 20:
        return UNITS[number]
    ten = TENS[number // 10 - 2]
    return f"{ten}-{UNITS[number % 10]}" if number % 10 else ten


@settings(deadline=None)
@given(st.integers(0, 10**9 - 1), st.sampled_from([" ", " and "]))
@example(120_000, " and ")
@example(999_999_999, " and ")
@example(1_000_001, " ")
def test_numbers_in_words_are_read_back(number: int, conjunction: str) -> None:
    words = written_out(number, conjunction)
    assert [*numbers_in(words)] == [number]
    assert [*numbers_in(f"It is {words}, {words}!")] == [number, number]


def test_a_model_that_repeats_one_word_for_ever_is_scored() -> None:
    """In a moment: a time that doubles with every word would not end."""
    for words in ("million", "thousand", "thousand two", "hundred and", "twenty million"):
        said = said_value(f"{words} " * 2000, "number")
        assert said is None or said in words


def test_an_answer_is_right_or_of_another_fact_or_neither_or_none() -> None:
    told = ["oranges", "cheese"]
    assert outcome("oranges", "oranges", told) == "right"
    assert outcome("cheese", "oranges", told) == "told"
    assert outcome("tennis", "oranges", told) == "other"
    assert outcome(None, "oranges", told) == "none"


def question(distance_sec: float, answer: str, oldest: str = "oranges") -> dict[str, Any]:
    return {
        "distance_sec": distance_sec,
        "kind": "thing",
        "fact": f"Laura likes {answer}.",
        "question": "What does Laura like?",
        "answer": answer,
        "told_values": ["oranges", "cheese", "tennis", "chess"],
        "window_sec": [10.0, 14.0],
        "oldest": oldest,
        "newest": "chess",
    }


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([("oranges.", 10.0, 10.4)], "right"),
        ([("oranges.", 13.99, 14.5)], "right"),
        ([("oranges.", 9.99, 10.4)], "none"),  # too early
        ([("oranges.", 14.0, 14.4)], "none"),  # too late
        ([("cheese", 9.0, 9.5), ("oranges.", 11.0, 11.5), ("cheese", 15.0, 15.5)], "right"),
        ([("oranges", 12.0, 12.5), ("cheese", 11.0, 11.5)], "told"),  # the earlier one counts
        ([], "none"),
    ],
)
def test_only_what_begins_in_the_window_is_an_answer(words: Any, found: str) -> None:
    assert score_words(question(10, "oranges"), words)["outcome"] == found


def answers(*outcomes: str) -> list[dict[str, Any]]:
    return [{"text": found, "said": None, "outcome": found} for found in outcomes]


def test_recall_is_counted_by_distance_and_arm() -> None:
    """Four talks, asked after 10 s and 300 s; attention sees 240 s."""
    talks = {n: [question(10, "cheese"), question(300, "oranges")] for n in range(4)}
    heard = {
        "on": {n: answers("right", "right" if n else "told") for n in talks},
        "off": {n: answers("right" if n < 2 else "none", "other") for n in talks},
    }
    found = summarize_recall(talks, heard, window_sec=240.0)
    assert (found["num_talks"], found["num_questions"]) == (4, 8)
    assert found["chance"] == pytest.approx(1 / 12) and found["a_told_value"] == 0.25
    # Of the oldest fact, "oranges", one of the two questions is; of the newest, none.
    assert found["baselines"]["oldest"] == {"all": 0.5, "by_distance": [0.0, 1.0]}
    assert found["baselines"]["newest"] == {"all": 0.0, "by_distance": [0.0, 0.0]}
    on, off = found["arms"]["on"], found["arms"]["off"]
    assert [p["value"] for p in on["by_distance"]] == [1.0, 0.75]
    assert [p["value"] for p in off["by_distance"]] == [0.5, 0.0]
    # Wilson's interval of 4 of 4.
    assert on["by_distance"][0]["low"] == pytest.approx(0.5101, abs=1e-3)
    assert on["all"]["value"] == 7 / 8 and off["all"]["value"] == 2 / 8
    assert on["beyond_window"]["value"] == 0.75
    assert on["outcomes"] == {"right": 7, "told": 1, "other": 0, "none": 0}
    assert off["outcomes"] == {"right": 2, "told": 0, "other": 4, "none": 2}
    (difference,) = found["differences"]
    assert difference["arms"] == ["on", "off"]
    assert difference["all"]["value"] == 5 / 8 and difference["beyond_window"]["value"] == 0.75
    for each in (on["all"], off["all"], on["beyond_window"]):
        assert 0 <= each["low"] <= each["value"] <= each["high"] <= 1
    table, differences, outcomes = recall_tables(found)
    assert [row[0] for row in table.rows] == ["10 s", "5 min", "beyond attention's window", "all"]
    assert table.rows[1][3:] == ["1.00", "0.00"]
    assert differences.rows[0][0] == "TTT on − TTT off"
    assert differences.columns == ("compared", "all", "beyond attention's window")
    assert outcomes.rows[1] == ["TTT off", "2 (25%)", "0 (0%)", "4 (50%)", "2 (25%)"]
    assert recall_csv(found).rows[1][:4] == ["on", 300, 4, 0.75]


@pytest.mark.parametrize("window_sec", [5.0, 300.0, None], ids=["none in it", "all", "unknown"])
def test_what_is_beyond_the_window_is_told_apart_where_some_is_not(window_sec: Any) -> None:
    talks = {n: [question(10, "cheese"), question(300, "oranges")] for n in range(4)}
    heard = {arm: {n: answers("right", "none") for n in talks} for arm in ("on", "off")}
    table, differences, _ = recall_tables(summarize_recall(talks, heard, window_sec=window_sec))
    assert [row[0] for row in table.rows] == ["10 s", "5 min", "all"]
    assert differences.columns == ("compared", "all")
    assert [len(row) for row in differences.rows] == [2]


def test_talks_that_are_all_alike_are_no_proof() -> None:
    """Four of four talks: as far as Wilson's interval of 4 of 4 goes, .51."""
    talks = {n: [question(10, "cheese"), question(300, "oranges")] for n in range(4)}
    heard = {
        "on": {n: answers("right", "right") for n in talks},
        "off": {n: answers("none", "right") for n in talks},
        "reset": {n: answers("right", "right") for n in talks},
    }
    found = summarize_recall(talks, heard)
    bounds = {arm: (of["all"]["low"], of["all"]["high"]) for arm, of in found["arms"].items()}
    assert bounds["on"] == (pytest.approx(0.5101, abs=1e-3), 1.0)
    assert bounds["off"] == pytest.approx((0.0101, 0.9899), abs=1e-3)
    off, reset = (difference["all"] for difference in found["differences"])
    assert (off["value"], off["low"]) == (0.5, pytest.approx(0.0101, abs=1e-3))
    assert (reset["value"], reset["low"], reset["high"]) == (
        0.0,
        pytest.approx(-0.4899, abs=1e-3),
        pytest.approx(0.4899, abs=1e-3),
    )


def test_a_talk_that_one_arm_has_not_heard_counts_nowhere() -> None:
    talks = {n: [question(10, "cheese")] for n in range(3)}
    on = {n: answers("right") for n in talks}
    found = summarize_recall(talks, {"on": on, "off": {0: answers("none")}})
    assert found["num_talks"] == 1 and found["arms"]["on"]["all"]["value"] == 1.0
    assert found["arms"]["on"]["beyond_window"] is None, "what attention sees is not known"
    nothing = summarize_recall(talks, {"on": {}, "off": {}})
    assert nothing["num_questions"] == 0 and recall_tables(nothing) == []
