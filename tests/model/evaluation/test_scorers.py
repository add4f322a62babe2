"""Scorers on cases worked out by hand; the working stands beside each number."""

from __future__ import annotations

import math
from typing import Any

import pytest

from nvila.errors import DataError
from nvila.evaluation.scorers.anls import levenshtein
from nvila.evaluation.scorers.choices import read_choice
from nvila.evaluation.scorers.contract import Marks, answers_of
from nvila.evaluation.scorers.mmmu import open_values
from nvila.evaluation.scorers.navigation import walk
from nvila.evaluation.scorers.table import SCORERS
from nvila.evaluation.scorers.temporal import read_span
from nvila.evaluation.scorers.vqa import normalize

TEN = ["yes"] * 2 + ["no"] * 8


def marks(scorer: str, prediction: str, answer: Any, **reference: Any) -> Marks:
    return SCORERS[scorer].score(prediction, {"answer": answer, **reference})


def value(scorer: str, *samples: Marks, metric: str | None = None) -> float:
    chosen = SCORERS[scorer]
    return chosen.metrics[metric or chosen.main].aggregate(samples)


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        ("10.5", "10", 1),  # |10.5 - 10| / 10 = 0.05, just in
        ("10.51", "10", 0),  # 0.051
        ("9.5", "10", 1),
        ("-10", "10", 0),  # off by 200%
        ("50%", "0.5", 1),  # 50 / 100
        ("52%", "50%", 1),  # 0.02 / 0.5 = 0.04
        ("50", "50%", 0),  # 50 against 0.5
        ("0.0", "0", 1),
        ("0.01", "0", 0),  # no relative error to 0
        (" Blue ", "blue", 1),
        ("blue.", "blue", 0),  # texts must match
        ("", "blue", 0),
        ("\u0661\u0660", "10", 1),  # Arabic-Indic digits
        ("nan", "10", 0),
        ("nan", "NaN", 1),  # no number, so a text
        ("inf", "10", 0),
        ("7", ["8", "7.2"], 1),  # 0.2 / 7.2 = 0.028
    ],
)
def test_relaxed_accuracy(prediction: str, answer: Any, right: int) -> None:
    assert marks("relaxed_accuracy", prediction, answer)["relaxed_overall"] == right


def test_relaxed_accuracy_tells_the_halves_apart() -> None:
    samples = [
        marks("relaxed_accuracy", "1", "1", category="human_test"),
        marks("relaxed_accuracy", "2", "1", category="human_test"),
        marks("relaxed_accuracy", "1", "1", category="augmented_test"),
    ]
    assert value("relaxed_accuracy", *samples) == pytest.approx(2 / 3)
    assert value("relaxed_accuracy", *samples, metric="relaxed_human_split") == 0.5
    assert value("relaxed_accuracy", *samples, metric="relaxed_augmented_split") == 1.0


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("", "abc", 3), ("flaw", "lawn", 2), ("kitten", "sitting", 3), ("abc", "abc", 0), ("ab", "ba", 2)],
)
def test_levenshtein(a: str, b: str, distance: int) -> None:
    assert levenshtein(a, b) == levenshtein(b, a) == distance


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("January 5", ["January 5"], 1.0),
        ("janury 5", ["January 5"], 8 / 9),  # one of nine characters is missing
        ("abcd", ["abxy"], 0.5),  # 2 of 4: at the threshold it stays
        ("abcd", ["axyz"], 0.0),  # 1 - 3/4 is below
        ("  ABC\n d ", ["abc d"], 1.0),
        ("", ["a"], 0.0),
        ("", [""], 1.0),
        ("5 jan", ["January 5", "5 Jan"], 1.0),  # the best of several
        ("ab", ["abcdef"], 0.0),  # a third of the length can reach 1/3 at most
    ],
)
def test_anls(prediction: str, answer: list[str], expected: float) -> None:
    assert marks("anls", prediction, answer)["anls"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The two Dogs", "2 dogs"),
        ("none", "0"),
        ("dont run!", "don't run"),
        ("1,000 people", "1000 people"),
        ("black,white", "black white"),
        ("black, white", "black white"),
        ("9:30 a.m.", "9:30 am"),  # periods go, but for those before a digit
        ("3.5", "3.5"),
        ("x-ray", "x ray"),
        ("somebody'd", "somebodyd"),  # the official table has it the other way round
        ("  A  \n an\tthe ", ""),
        ("shed've", "she'd've"),
    ],
)
def test_vqa_normalisation(text: str, expected: str) -> None:
    assert normalize(text) == expected


def test_text_vqa_cuts_the_possessive_off_first() -> None:
    assert normalize("mcdonald's, yes?", as_words=True) == "mcdonald 's yes"
    assert normalize("mcdonald's", as_words=False) == "mcdonald's"


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        # 2 of 10 say yes. Leaving out a yes: 1/3, twice. Leaving out a no: 2/3, eight times. (2/3 + 16/3) / 10 = 0.6
        ("Yes.", TEN, 0.6),
        ("no", TEN, 1.0),
        ("", TEN, 0.0),
        # 3 of 10. Leaving out one of them: 2/3, thrice; otherwise 1. (2 + 7) / 10 = 0.9
        ("3", [{"answer": "three", "answer_id": i} for i in range(3)] + [{"answer": "4"}] * 7, 0.9),
        ("red", "Red", 1.0),  # one answer only
        ("red", ["blue"], 0.0),
    ],
)
def test_vqa_accuracy(prediction: str, answers: Any, expected: float) -> None:
    for scorer in ("vqa", "text_vqa"):
        assert marks(scorer, prediction, answers)["exact_match"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(b)", "B"),
        ("**B**", "B"),
        ("\uff22", "B"),  # full-width B
        ("B. a dog", "B"),
        ("B) a dog", "B"),
        ("(B) because of (A)", "B"),
        ("The answer is B.", "B"),
        ("The best answer is: (b)", "B"),
        ("Answer: B, not A", "B"),
        ("First I thought the answer is A. No, the answer is B.", "B"),
        ("It shows (A) and then (B)", "B"),
        ("a dog", "B"),
        ("A dog.", "B"),  # the text of a choice comes before a letter as a word
        ("I see A dog", "B"),  # "A" is an article, "I" the writer
        ("There is a dog in the picture", "B"),
        ("There is a cat and a dog", None),  # two are mentioned
        ("E", None),  # there are only four
        ("Dog", None),  # "D" is part of a word, and the choice is "a dog"
        ("a dark red fox", "D"),  # not the "red fox" inside it
        ("", None),
        ("\u0000 ?", None),
    ],
)
def test_read_choice(prediction: str, letter: str | None) -> None:
    assert read_choice(prediction, ["a cat", "a dog", "red fox", "dark red fox"]) == letter


def test_multiple_choice_counts_what_it_cannot_read() -> None:
    samples = [marks("multiple_choice", text, "a dog", choices=["a cat", "a dog"]) for text in ("B", "A", "well")]
    assert value("multiple_choice", *samples) == pytest.approx(1 / 3)
    assert value("multiple_choice", *samples, metric="unread") == pytest.approx(1 / 3)


def test_choices_are_read_out_of_the_question() -> None:
    question = "Which way?\nA. Left\nB. Right\nPlease answer directly."
    assert marks("choice_or_text", "right", "B", question=question)["accuracy"] == 1
    assert marks("choice_or_text", "Downhill.", "downhill")["accuracy"] == 1
    assert marks("choice_or_text", "uphill", "downhill")["accuracy"] == 0


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        ("So the result is 1,234.567", "1234.57", 1),  # rounded to two places
        ("x = 12", "12", 1),  # "=" counts in the last line
        ("The answer is 12 apples", "12", 1),
        ("It is blue. Therefore it could be the Sky", "sky", 1),
        ("twelve", "12", 0),
        ("", "12", 0),
        ("\u0661\u0662", "12", 1),
        ("about b", "b", 1),  # a single character must be a word
        ("cab", "b", 0),
        ("The answer is 5", ["4", "5.0"], 1),
    ],
)
def test_mmmu_open_questions(prediction: str, answer: Any, right: int) -> None:
    assert marks("mmmu", prediction, answer)["accuracy"] == right


def test_mmmu_takes_the_shortest_tail_of_each_line() -> None:
    # "is" leaves "8, so the answer is 9" -> last "is": "9"; first line: after "so ": "we add".
    assert open_values("so we add\nit is 8, so the answer is 9") == ["we add", 9.0]


@pytest.mark.parametrize(
    ("prediction", "answer", "reference", "right"),
    [
        ("(B)", "7 cm", {"choices": ["5 cm", "7 cm"]}, 1),
        ("7 cn", "7 cm", {"choices": ["5 miles", "7 cm"]}, 1),  # nothing is read, the most similar is taken
        ("", "7 cm", {"choices": ["5 cm", "7 cm"]}, 0),
        ("The answer is 1,200.", "1200", {"answer_type": "integer"}, 1),
        ("between 3 and 4.9", "4", {"answer_type": "integer"}, 1),  # the last number, cut
        ("12.346", "12.35", {"answer_type": "float", "precision": 2}, 1),
        ("12.3", "12.35", {"answer_type": "float", "precision": 2}, 0),
        ("It is [1, 2] or [3, 4]", "[3, 4]", {"answer_type": "list"}, 1),
        ("none", "[3, 4]", {"answer_type": "list"}, 0),
        ("yes", "Yes", {"answer_type": "text"}, 0),  # texts as they are
        ("Yes.", "Yes", {"answer_type": "text"}, 1),
        ("many", "3", {"answer_type": "integer"}, 0),
    ],
)
def test_mathvista(prediction: str, answer: str, reference: dict[str, Any], right: int) -> None:
    assert marks("mathvista", prediction, answer, **reference)["accuracy"] == right


def test_pope() -> None:
    rows = [("yes", "yes"), ("Yes, it is", "no"), ("There is not", "no"), ("No", "yes"), ("", "yes"), ("No.", "no")]
    samples = [marks("pope", prediction, answer) for prediction, answer in rows]
    # right: 1st, 3rd, 6th; said yes: 1st, 2nd; true yes: 1st, 4th, 5th
    assert value("pope", *samples) == 0.5
    assert value("pope", *samples, metric="precision") == 0.5
    assert value("pope", *samples, metric="recall") == pytest.approx(1 / 3)
    assert value("pope", *samples, metric="f1") == pytest.approx(0.4)  # 2 * 1/2 * 1/3 / (5/6)
    assert value("pope", *samples, metric="yes_ratio") == pytest.approx(2 / 6)


def test_pope_without_any_yes() -> None:
    samples = [marks("pope", "no", "no")]
    assert math.isnan(value("pope", *samples, metric="precision"))
    assert value("pope", *samples, metric="f1") == 0
    with pytest.raises(DataError, match="neither yes nor no"):
        marks("pope", "yes", "maybe")


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [("It's Red!", "its red", 1), ("reddish", "red", 0), ("\uff17", "7", 1), ("", "red", 0), ("b", ["a", "B"], 1)],
)
def test_exact_match(prediction: str, answer: Any, right: int) -> None:
    assert marks("exact_match", prediction, answer)["exact_match"] == right


@pytest.mark.parametrize(
    ("prediction", "answer", "dataset", "right"),
    [
        ("It says STOP\nhere", "stop here", "IIIT5K", 1),
        ("\uff33TOP", "stop", "IIIT5K", 1),
        ("sto p", "stop", "IIIT5K", 0),
        ("x ^ 2 + Y", "x^2+Y", "HME100k", 1),
        ("x^2+y", "x^2+Y", "HME100k", 0),  # case counts in formulas
        ("anything", "", "IIIT5K", 0),  # the empty text would be in every answer
        ("b", ["a", "b"], "IIIT5K", 1),
    ],
)
def test_ocrbench(prediction: str, answer: Any, dataset: str, right: int) -> None:
    assert marks("ocrbench", prediction, answer, dataset=dataset)["accuracy"] == right


@pytest.mark.parametrize(
    ("prediction", "answer", "exact", "contains"),
    [
        ("the violin", "violin", 1, 1),
        ("playing a violin outside", "violin", 0, 1),
        ("violinist", "violin", 0, 0),
        ("Yes, they are", "yes", 0, 1),
        ("No, not yes", "yes", 0, 0),
        ("", "violin", 0, 0),
    ],
)
def test_open_video(prediction: str, answer: str, exact: int, contains: int) -> None:
    read = marks("open_video", prediction, answer)
    assert (read["exact_match"], read["contains"]) == (exact, contains)


@pytest.mark.parametrize(
    ("prediction", "answer", "iou"),
    [
        ("<0> <10>", [5, 15], 1 / 3),  # 5 of 15
        ("<15> <5>", [5, 15], 1.0),  # order does not matter
        ("<t0> to <t99>", [0, 50], 0.5),  # the whole 100 s
        ("<t200>, <t99>", [90, 100], 0.0),  # both are the end
        ("<4>", [0, 25], 0.25),  # one moment only: the whole video
        ("", [0, 25], 0.25),
        ("<0> <10>", [20, 30], 0.0),  # apart
        ("<50> <999>", [50, 100], 1.0),  # clamped to the end
        ("<5> <5>", [5, 5], 0.0),  # no union
    ],
)
def test_temporal(prediction: str, answer: list[float], iou: float) -> None:
    assert marks("temporal", prediction, answer, duration=100)["iou"] == pytest.approx(iou)


def test_temporal_averages_videos_first() -> None:
    samples = [
        marks("temporal", "<0> <10>", [0, 10], duration=10, video="a"),  # 1
        marks("temporal", "<0> <1>", [5, 10], duration=10, video="a"),  # 0
        marks("temporal", "<0> <6>", [0, 10], duration=10, video="b"),  # 0.6
    ]
    assert value("temporal", *samples) == pytest.approx(0.55)  # (0.5 + 0.6) / 2
    assert value("temporal", *samples, metric="precision_at_0.5") == pytest.approx(0.75)  # (0.5 + 1) / 2


@pytest.mark.parametrize("bad", [{"answer": [1], "duration": 5}, {"answer": [0, 1]}, {"answer": [0, 1], "duration": 0}])
def test_temporal_refuses_references(bad: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        SCORERS["temporal"].score("<0> <1>", bad)


def test_time_tokens_are_read_as_the_model_writes_them() -> None:
    from nvila.time_tokens import decode_times

    for token in (0, 1, 33, 50, 98, 99, 120):
        seconds = decode_times(f"<t{token}>", duration=63.7)
        assert read_span(f"<t{token}> <0>", 63.7)[1] == pytest.approx(float(seconds.strip("<>")), abs=0.005)


def test_navigation() -> None:
    # Goal 4 m ahead. 2 m ahead, 2 m left, stop: sqrt(2^2 + 2^2) = 2.83 m from the goal, 4 m walked of 4 m needed.
    near = marks("navigation", "move forward 2 m, turn left 90 degrees, move forward 200 cm, stop", [[0, 0], [0, 4]])
    assert near["navigation_error"] == pytest.approx(math.sqrt(8))
    assert (near["success"], near["oracle_success"], near["spl"]) == (1, 1, 1)
    # Past the goal and on to 8 m: 4 m from it, but it was near on the way.
    past = marks("navigation", "[[0, 0], [0, 4], [0, 8]]", [[0, 0], [0, 4]])
    assert (past["navigation_error"], past["success"], past["oracle_success"], past["spl"]) == (4, 0, 1, 0)
    # There and back: 12 m for 4 m.
    back = marks("navigation", "[[0, 0], [0, 8], [0, 4]]", [[0, 0], [0, 4]])
    assert (back["success"], back["spl"]) == (1, pytest.approx(1 / 3))
    assert value("navigation", near, past, back) == pytest.approx(2 / 3)
    assert value("navigation", near, past, back, metric="spl") == pytest.approx(4 / 9)


def test_navigation_reads_sentences_up_to_stop() -> None:
    assert walk("Turn right by 90 degrees. Stop, then move forward 1 m", (1.0, 2.0)) == [(1.0, 2.0)]
    assert walk("go forward 1 meter", (0.0, 0.0), heading_deg=90) == [(0.0, 0.0), (1.0, 0.0)]
    assert marks("navigation", "[[1, 2, 3]]", [[0, 0], [0, 1]])["navigation_error"] == 1  # of other dimensions
    with pytest.raises(DataError, match="no path"):
        marks("navigation", "stop", "nowhere")


def test_medical_vqa() -> None:
    samples = [
        marks("medical_vqa", "Yes, there is", "yes"),
        marks("medical_vqa", "unclear", "no"),
        marks("medical_vqa", "left lung", "left upper lung"),  # 2 of 3 words
        marks("medical_vqa", "Heart.", "heart"),
        marks("medical_vqa", "axial", "coronal", category="CLOSED"),
    ]
    assert value("medical_vqa", *samples) == pytest.approx(2 / 5)
    assert value("medical_vqa", *samples, metric="closed_accuracy") == pytest.approx(1 / 3)
    assert value("medical_vqa", *samples, metric="open_exact") == 0.5
    assert value("medical_vqa", *samples, metric="open_recall") == pytest.approx(5 / 6)


def test_bleu() -> None:
    # the cat sat on the mat / the cat is on the mat: unigrams 5/6, bigrams 3/5, trigrams 1/4, 4-grams 0/3
    assert value("report", marks("report", "the cat sat on the mat", "the cat is on the mat")) == 0
    # With one more sample that matches whole (5 tokens: 5/5, 4/4, 3/3, 2/2) the corpus has 10/11, 7/9, 4/7, 2/5.
    both = [marks("report", "the cat sat on the mat", "the cat is on the mat"), marks("report", *["a b c d e"] * 2)]
    expected = (10 / 11 * 7 / 9 * 4 / 7 * 2 / 5) ** 0.25
    assert value("report", *both) == pytest.approx(expected)
    # 4 tokens said of 8: the brevity penalty is exp(1 - 8/4).
    assert value("report", marks("report", "a b c d", "a b c d e f g h")) == pytest.approx(math.exp(-1))
    # "the the the the": each word counts as often as the reference has it, 2 of 4.
    assert marks("report", "the the the the", "the cat the")["matches"] == [2, 0, 0, 0]
    assert value("report", marks("report", "", "a b c d")) == 0


def test_rouge_l() -> None:
    # Common subsequence "police kill gunman"-like: 3 of 4 said, 3 of 5 wanted, beta^2 = 1.44
    read = marks("report", "police kill the gunman", "police killed kill a gunman")
    precision, recall = 3 / 4, 3 / 5
    assert read["rouge_l"] == pytest.approx(2.44 * precision * recall / (recall + 1.44 * precision))
    assert marks("report", "", "a")["rouge_l"] == 0
    assert marks("report", "x", ["a", "x"])["rouge_l"] == 1


def test_chexpert() -> None:
    samples = [
        marks("chexpert_f1", "Edema, Cardiomegaly", ["Edema"]),
        marks("chexpert_f1", "No Finding", {"Edema": 1, "Fracture": -1, "Pneumonia": 0, "Atelectasis": None}),
    ]
    # All 14: right 1 (Edema of the first), said 3, true 3 (Edema twice, Fracture): micro 2 * 1 / 6.
    assert value("chexpert_f1", *samples) == pytest.approx(1 / 3)
    # Edema 2*1/(1+2) = 2/3; Cardiomegaly 0/1, No Finding 0/1, Fracture 0/1 -> mean of four.
    assert value("chexpert_f1", *samples, metric="f1_macro_14") == pytest.approx(1 / 6)
    # Of the five: right 1, said 2, true 2.
    assert value("chexpert_f1", *samples, metric="f1_micro_5") == pytest.approx(0.5)
    assert value("chexpert_f1", *samples, metric="f1_macro_5") == pytest.approx(1 / 3)
    with pytest.raises(DataError, match="no CheXpert label"):
        marks("chexpert_f1", "Edema", "Edema, Flu")
    with pytest.raises(DataError, match="no findings"):
        marks("chexpert_f1", "Edema", 3)


@pytest.mark.parametrize(
    ("answer", "found"), [("a", ["a"]), (3, ["3"]), (["a", 2.5], ["a", "2.5"]), ([{"answer": "x", "id": 1}], ["x"])]
)
def test_answers_of(answer: Any, found: list[str]) -> None:
    assert answers_of({"answer": answer}) == found


@pytest.mark.parametrize("answer", [None, [], [None], {"a": 1}, True, [{"reply": "x"}]])
def test_answers_that_are_none(answer: Any) -> None:
    with pytest.raises(DataError, match="answer"):
        answers_of({"answer": answer})


def test_an_answer_that_no_choice_is() -> None:
    with pytest.raises(DataError, match="none of the 2 choices"):
        marks("multiple_choice", "A", "a fish", choices=["a cat", "a dog"])
    with pytest.raises(DataError, match="no list"):
        marks("multiple_choice", "A", "A", choices="a cat")
