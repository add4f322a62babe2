from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from nvila.data.conversation import ConversationEncoder, Encoded
from nvila.data.records import Message, Part, Role, Sample, vqa_sample
from nvila.data.tokenizers import IMAGE_TOKEN
from nvila.errors import DataError

IGNORED = "."


def sample(*turns: tuple[Role, str], images: tuple[str, ...] = ()) -> Sample:
    messages = [Message(role=role, content=(Part(type="text", value=text),)) for role, text in turns]
    if images:
        parts = tuple(Part(type="image", value=key) for key in images)
        messages[0] = Message(role=messages[0].role, content=parts + messages[0].content)
    return Sample(id="s", source="s", messages=tuple(messages))


def supervised(tokenizer: PreTrainedTokenizerFast, encoded: Encoded) -> list[str]:
    """Return the tokens with a label, with one mark for every run without."""
    out: list[str] = []
    for token, label in zip(encoded.ids, encoded.labels, strict=True):
        assert label in (-100, token)
        if label != -100:
            out.append(str(tokenizer.convert_ids_to_tokens(token)))
        elif not out or out[-1] != IGNORED:
            out.append(IGNORED)
    return out


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([("user", "what?"), ("assistant", "red")], ". red <|im_end|>"),
        ([("system", "yes"), ("user", "yes?"), ("assistant", "yes yes")], ". yes yes <|im_end|>"),
        (
            [("user", "one?"), ("assistant", "red"), ("user", "two?"), ("assistant", "blue.")],
            ". red <|im_end|> . blue . <|im_end|>",
        ),
        ([("user", "what?"), ("assistant", "\nred\n\nblue\n")], ". LF red LF LF blue LF <|im_end|>"),
        ([("user", "what?\n"), ("assistant", "\n")], ". LF <|im_end|>"),
        ([("user", "assistant red"), ("assistant", "red"), ("user", "red"), ("assistant", "user")], None),
        ([("assistant", "hello"), ("user", "x"), ("assistant", "yes")], ". <unk> <|im_end|> . yes <|im_end|>"),
        # The words that end a turn, said by the assistant: nothing after them may be lost.
        ([("user", "what?"), ("assistant", "a <|im_end|> b")], ". a <|im_end|> <unk> <|im_end|>"),
    ],
)
def test_labels_cover_the_answers_and_the_ends_of_their_turns(
    tokenizer: PreTrainedTokenizerFast,
    encoder: ConversationEncoder,
    turns: list[tuple[Role, str]],
    expected: str | None,
) -> None:
    found = supervised(tokenizer, encoder(sample(*turns)))
    if expected is None:
        expected = ". red <|im_end|> . user <|im_end|>"
    # A full stop of an answer looks like the mark of a run without labels here; both are a dot, which is fine.
    assert found == expected.replace("LF", "\n").split(" ")


WORDS = st.lists(st.sampled_from(["red", "blue", "\n", "?", "assistant", "user", "yes", "."]), min_size=1, max_size=5)


@given(answers=st.lists(WORDS, min_size=1, max_size=3), question=WORDS)
@settings(max_examples=60, deadline=None)
def test_labels_of_any_dialogue_are_its_answers(
    answers: list[list[str]],
    question: list[str],
    tokenizer: PreTrainedTokenizerFast,
    encoder: ConversationEncoder,
) -> None:
    turns: list[tuple[Role, str]] = []
    for answer in answers:
        turns += [("user", " ".join(question)), ("assistant", " ".join(answer))]
    encoded = encoder(sample(*turns))
    wanted = [token for answer in answers for token in [*answer, "<|im_end|>"]]
    given_ = [token for token, label in zip(encoded.ids, encoded.labels, strict=True) if label != -100]
    assert tokenizer.convert_ids_to_tokens(given_) == wanted
    assert encoded.num_supervised == len(wanted)
    assert encoded.labels[-1] != -100


def test_each_image_becomes_its_visual_tokens_and_one_line_feed(
    tokenizer: PreTrainedTokenizerFast, encoder: ConversationEncoder
) -> None:
    encoded = encoder(sample(("user", "what?"), ("assistant", "red"), images=("x", "y")))
    assert tokenizer.convert_ids_to_tokens(list(encoded.ids)) == [
        "<|im_start|>", "user", "\n",
        *[IMAGE_TOKEN] * 4, "\n", *[IMAGE_TOKEN] * 4, "\n",
        "what", "?", "<|im_end|>", "\n", "<|im_start|>", "assistant", "\n", "red", "<|im_end|>",
    ]  # fmt: skip
    assert encoded.images == ("x", "y")
    assert encoded.media_end == 12  # behind the last visual token


def test_prompt_is_the_beginning_of_the_training_row(encoder: ConversationEncoder) -> None:
    full = sample(("user", "what?"), ("assistant", "red\nblue"), images=("x",))
    prompt, encoded = encoder.prompt(full.messages[:1]), encoder(full)
    assert list(encoded.ids[: len(prompt)]) == prompt
    assert all(label == -100 for label in encoded.labels[: len(prompt)])
    assert encoded.labels[len(prompt)] != -100


def test_same_text_with_another_image_shares_the_tokens_but_not_the_image(encoder: ConversationEncoder) -> None:
    first, second = (
        encoder(vqa_sample(id=key, source="s", image=key, question="what?", answer="red")) for key in ("x", "y")
    )
    assert first.ids is second.ids
    assert (first.images, second.images) == (("x",), ("y",))
    without = encoder(vqa_sample(id="z", source="s", image=None, question="what?", answer="red"))
    assert (without.images, without.media_end) == ((), 0)
    assert len(without.ids) == len(first.ids) - 5


def test_sample_without_an_answer_is_named(encoder: ConversationEncoder) -> None:
    with pytest.raises(DataError, match="sample 'open' has no answer"):
        encoder(vqa_sample(id="open", source="s", image=None, question="what?", answer=None))


def test_too_long_sample_is_named_with_both_lengths(tokenizer: PreTrainedTokenizerFast) -> None:
    short = ConversationEncoder(tokenizer, 4, 14)
    fits = vqa_sample(id="fits", source="s", image=None, question="what?", answer="red")
    assert len(short(fits).ids) == 12
    with pytest.raises(DataError, match=r"sample 'long' has 17 tokens, more than the limit of 14.*model\.max_length"):
        short(vqa_sample(id="long", source="s", image="x", question="what?", answer="red"))
