"""Our scorers against those of lmms-eval 0.7.3 on the same predictions.

lmms-eval is no dependency; its files are read from the folder in LMMS_EVAL, where its wheel was unpacked:
`pip download --no-deps lmms-eval==0.7.3 && unzip lmms_eval-*.whl -d FOLDER`. Its modules import a logger and its own
package, which stand-ins replace; the functions that are compared need neither.
"""

from __future__ import annotations

import ast
import copy
import os
import random
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from nvila.evaluation.scorers.choices import read_choice
from nvila.evaluation.scorers.mmmu import open_values
from nvila.evaluation.scorers.table import SCORERS
from nvila.evaluation.scorers.vqa import CONTRACTIONS, normalize

FOLDER = os.environ.get("LMMS_EVAL", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER, reason="LMMS_EVAL names no folder with an unpacked lmms-eval"),
]
WORDS = [
    "the",
    "two",
    "1,000",
    "3.5",
    "50%",
    "red",
    "a dog",
    "(B)",
    "A.",
    "yes",
    "No",
    "not",
    "don't",
    "dont",
    "'s",
    "-",
]
CASES = 5000


def functions(path: str, *names: str, **known: Any) -> dict[str, Any]:
    """Return functions and classes of a file, without its imports."""
    tree = ast.parse((Path(FOLDER) / "lmms_eval" / path).read_text(encoding="utf-8"))
    wanted = [node for node in tree.body if getattr(node, "name", None) in names]
    assert len(wanted) == len(names), "another version of lmms-eval"
    for node in wanted:
        node.decorator_list = []  # type: ignore[attr-defined]  # functions and classes have it
    space: dict[str, Any] = {"re": re, "random": random, "statistics": statistics, **known}
    exec(compile(ast.Module(wanted, []), path, "exec"), space)  # noqa: S102 - a file that whoever runs this unpacked
    return space


def texts(seed: int) -> list[str]:
    draw = random.Random(seed)
    glue = ["", " ", " ", ", ", ". ", "\n"]
    return [
        "".join(draw.choice(WORDS) + draw.choice(glue) for _ in range(draw.randint(0, 4))).strip() for _ in range(CASES)
    ]


def test_relaxed_accuracy() -> None:
    theirs = functions("tasks/chartqa/utils.py", "relaxed_correctness")["relaxed_correctness"]
    numbers = [f"{n / 7:.2f}" for n in range(1, 60)] + [f"{n}%" for n in range(1, 20)] + ["red", "Red", "1e3"]
    for prediction in numbers:
        for answer in numbers:
            ours = SCORERS["relaxed_accuracy"].score(prediction, {"answer": answer})["relaxed_overall"]
            assert ours == float(theirs(prediction, answer)), (prediction, answer)


def test_anls() -> None:
    space = functions("api/metrics.py", "levenshtein_distance", "anls")
    draw = random.Random(1)
    for prediction in texts(2):
        # They divide by the length before runs of spaces are squeezed; ours after, as the definition says.
        prediction = " ".join(prediction.split())
        wanted = ["".join(draw.sample(prediction, len(prediction) // 2)) or "x", prediction[:-1] or "y"]
        wanted = [" ".join(text.split()) or "z" for text in wanted]
        theirs = space["anls"](wanted, [prediction])["anls"]
        assert SCORERS["anls"].score(prediction, {"answer": wanted})["anls"] == pytest.approx(theirs)


def test_vqa_accuracy() -> None:
    processor = functions("tasks/_task_utils/vqa_eval_metric.py", "EvalAIAnswerProcessor")["EvalAIAnswerProcessor"]
    official = {key.lower(): value for key, value in processor.CONTRACTIONS.items() if key == key.lower()}
    assert official.items() <= CONTRACTIONS.items() | {(word, word) for word in official}
    known = {"EvalAIAnswerProcessor": processor}
    textvqa = functions("tasks/textvqa/utils.py", "textvqa_process_results", **known)["textvqa_process_results"]
    vqav2 = functions("tasks/vqav2/utils.py", "vqav2_process_results", **known)["vqav2_process_results"]
    draw = random.Random(3)
    predictions = texts(4)
    for prediction in predictions:
        assert normalize(prediction, as_words=True) == processor()(prediction)
        given = [draw.choice([prediction, prediction, "red", "2"]) for _ in range(10)]
        dicts = [{"answer": text, "answer_id": number} for number, text in enumerate(given)]
        their_text = textvqa({"answers": list(given), "question_id": 0}, [prediction])["exact_match"]
        their_vqa = vqav2({"answers": copy.deepcopy(dicts), "question_id": 0}, [prediction])["exact_match"]
        assert SCORERS["text_vqa"].score(prediction, {"answer": given})["exact_match"] == pytest.approx(their_text)
        assert SCORERS["vqa"].score(prediction, {"answer": dicts})["exact_match"] == pytest.approx(their_vqa)


def test_ocrbench() -> None:
    space = functions("tasks/ocrbench/utils.py", "ocrbench_process_results", "_fold_fullwidth_ascii")
    draw = random.Random(5)
    for prediction in texts(6):
        for dataset in ("HME100k", "IIIT5K"):
            wanted = [draw.choice(WORDS), prediction[2:6].strip() or "x"]
            doc = {"answer": wanted, "dataset": dataset, "question_type": ""}
            theirs = space["ocrbench_process_results"](doc, [prediction])["ocrbench_accuracy"]["score"]
            assert SCORERS["ocrbench"].score(prediction, doc)["accuracy"] == theirs, (prediction, wanted)


def test_pope_on_plain_answers() -> None:
    names = [f"pope_aggregate_{name}" for name in ("accuracy", "precision", "recall", "f1_score")]
    space = functions("tasks/pope/utils.py", "pope_process_results", *names)
    draw = random.Random(7)
    rows = [(draw.choice(["yes", "No", " yes ", "no"]), draw.choice(["yes", "no"])) for _ in range(500)]
    found = [space["pope_process_results"]({"answer": b, "question_id": 0}, [a])["pope_accuracy"] for a, b in rows]
    marks = [SCORERS["pope"].score(a, {"answer": b}) for a, b in rows]
    for name, ours in zip(names, ("accuracy", "precision", "recall", "f1"), strict=True):
        aggregate = SCORERS["pope"].metrics[ours].aggregate
        values = (aggregate(marks), space[name]([dict(one) for one in found]))
        # Their F1 needs the two before it, which have lived in one module.
        assert values[0] == pytest.approx(values[1])


def test_choices_in_usual_spellings() -> None:
    space = functions("tasks/_task_utils/mcq_extract.py", "extract_mcq_answer")
    source = (Path(FOLDER) / "lmms_eval/tasks/_task_utils/mcq_extract.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            space[ast.unparse(node.targets[0])] = ast.literal_eval(node.value)
    forms = ["{}", "({})", "{}.", "{}. a cat", "{}) a cat", "({}) a cat", "The answer is {}.", "{}:", "Answer: {}"]
    forms += ["the best answer is ({})", "The correct option is {}", "It is a cat, so ({})", "I choose {}"]
    for form in forms:
        for letter in "ABCD":
            text = form.format(letter)
            theirs = space["extract_mcq_answer"](text, list("ABCD"))
            assert read_choice(text, ["red", "green", "blue", "black"]) == theirs, text


def test_mmmu_open_answers() -> None:
    names = ("check_is_number", "normalize_str", "extract_numbers", "parse_open_response", "eval_open")
    space = functions("tasks/mmmu/utils.py", *names)
    draw = random.Random(8)
    # Of 1,234.5 they read 1,234 alone.
    ends = ["12", "1,234", "3.14", "blue sky", "x", "-5", "0.5 cm"]
    heads = ["The answer is ", "So it could be ", "x = ", "Therefore the final result is ", "", "First 3. Then "]
    differ = []
    for _ in range(CASES):
        text, answer = draw.choice(heads) + draw.choice(ends), draw.choice(ends)
        theirs = space["eval_open"](answer, space["parse_open_response"](text))
        ours = SCORERS["mmmu"].score(text, {"answer": answer})["accuracy"]
        if ours != float(theirs):
            differ.append((text, answer, theirs, open_values(text)))
    assert not differ, differ[:3]
