"""Each application tunes, answers and is scored on generated data."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
from tests.pipelines.conftest import Nvila

from nvila.applications import experts, navigation

QUICK = ("--steps", 4, "--rank", 4, "--held-out", "0.2", "--no-register", "--json", "--max-bad", "1%")


@pytest.mark.parametrize(("recipe", "scorer"), [("navigation", "navigation_action"), ("medical", "expert_trigger")])
def test_generated_data_is_tuned_on_and_scored(nvila: Nvila, base: Path, recipe: str, scorer: str) -> None:
    data = Path(recipe)
    if recipe == "navigation":
        navigation.write_data(data, 12)
    else:
        experts.write_data(data, 8)
    done = nvila("tune", base, data, "--recipe", recipe, *QUICK)
    assert done.code == 0, done.err
    assert done.last_json["scorer"] == scorer
    assert 0.0 <= done.last_json["scores"]["after"]["held_out"] <= 1.0
    assert done.last_json["losses"][-1]["loss"] < done.last_json["losses"][0]["loss"]


def test_moments_of_videos_are_tuned_on_and_scored(nvila: Nvila, base_with_times: Path) -> None:
    from nvila.data.digit_clips import SPAN_KINDS, DigitClips

    clips, data = DigitClips(), Path("clips")
    data.mkdir()
    lines = []
    for sample in islice(clips.questions("train", SPAN_KINDS), 8):
        key = sample.messages[0].content[0].value
        name = f"{key.replace('/', '-')}.mp4"
        (data / name).write_bytes(clips.mp4(key))
        lines.append(json.dumps({"video": name, "question": sample.question, "answer": sample.answer}))
    (data / "data.jsonl").write_text("\n".join(lines))
    done = nvila("tune", base_with_times, data, "--recipe", "temporal", *QUICK)
    assert done.code == 0, done.err
    assert done.last_json["scorer"] == "time_span"
    assert all("<t" in one["wanted"] for one in done.last_json["examples"])
    assert 0.0 <= done.last_json["scores"]["after"]["held_out"] <= 1.0


def test_unknown_recipes_are_named(nvila: Nvila, base: Path, pictures: Path) -> None:
    done = nvila("tune", base, pictures, "--recipe", "navigaton")
    assert done.code == 2
    assert "did you mean 'navigation'?" in done.err
    Path("own.yaml").write_text("scorrer: vqa\n")
    own = nvila("tune", base, pictures, "--recipe", "own.yaml")
    assert own.code == 2
    assert "did you mean 'scorer'?" in own.err
