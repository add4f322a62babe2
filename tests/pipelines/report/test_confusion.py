"""The confusion matrix of an evaluation."""

from __future__ import annotations

from nvila_pipelines.report.confusion import OTHER, confusion_matrix


def line(answer: str, prediction: str, correct: bool | None = None) -> dict[str, object]:
    return {
        "answer": answer,
        "prediction": prediction,
        "correct": answer == prediction if correct is None else correct,
    }


def test_rows_are_right_answers_and_columns_are_predictions() -> None:
    lines = [line("no", "no"), line("no", "no"), line("no", "yes"), line("yes", "yes"), line("yes", "perhaps")]
    assert confusion_matrix(lines) == (["no", "yes", OTHER], [[2, 1, 0], [0, 1, 1], [0, 0, 0]])


def test_the_scorer_says_what_is_right() -> None:
    assert confusion_matrix([line("two", "2", correct=True)]) == (["two", OTHER], [[1, 0], [0, 0]])


def test_letters_and_spaces_make_no_category() -> None:
    assert confusion_matrix([line("Red", "blue"), line("blue", " RED ")])[1] == [[0, 1, 0], [1, 0, 0], [0, 0, 0]]


def test_rare_answers_share_a_line() -> None:
    lines = [line(f"word {number}", f"word {number}") for number in range(30)] + [line("often", "often")] * 2
    categories, matrix = confusion_matrix(lines)
    assert len(categories) == 21
    assert (categories[0], categories[-1]) == ("often", OTHER)
    assert matrix[-1][-1] == 30 - 19
    assert sum(map(sum, matrix)) == 32


def test_nothing_was_asked() -> None:
    assert confusion_matrix([]) == ([OTHER], [[0]])
