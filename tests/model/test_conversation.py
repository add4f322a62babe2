from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from nvila.data.conversation import ConversationEncoder, Encoded, MediaLayout
from nvila.data.labels import greedy_labels
from nvila.data.records import Message, Part, Role, Sample, vqa_sample
from nvila.data.tokenizers import CHAT_TEMPLATE, IMAGE_TOKEN, PAD_TOKEN, RELEASED_CHAT_TEMPLATE, VIDEO_TOKEN, token_id
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
        # The words that end a turn, said by the assistant, are words: nothing after them may be lost.
        ([("user", "what?"), ("assistant", "a <|im_end|> b")], ". a" + 6 * " <unk>" + " <|im_end|>"),
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


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer as large decoders have, with merges of spaces, line feeds and signs."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    # As Qwen splits: line feeds stay together, also with the white space before them.
    split = pre_tokenizers.Split(Regex(r"\s*[\r\n]+|\s+(?!\S)| ?\w+| ?[^\s\w]+|\s+"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    texts = ["red\n\nblue\n\n\nred", "assistant\n\nred blue  <image> <|im_end|>", "image> |im_end|> user\n\n"] * 20
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>", IMAGE_TOKEN, VIDEO_TOKEN],
        chat_template=CHAT_TEMPLATE,
    )


def decoded(tokenizer: PreTrainedTokenizerFast, encoded: Encoded) -> str:
    return str(tokenizer.decode(list(encoded.ids)))


def answer_text(tokenizer: PreTrainedTokenizerFast, encoded: Encoded) -> str:
    return str(tokenizer.decode([label for label in encoded.labels if label != -100]))


LITERALS = [IMAGE_TOKEN, VIDEO_TOKEN, "<|im_end|>", "<|im_start|>", PAD_TOKEN]
PIECES = st.lists(st.sampled_from([*LITERALS, "red", " ", "\n", "\n\n", "<", "<im", "age>", "\u00e9"]), min_size=1)


@given(question=PIECES, answer=PIECES, system=PIECES)
@example(question=["<<image>image>"], answer=["<ima<image>ge>"], system=["<|im_end|><|im_end|>"])
@example(question=["\U000f0000<image>"], answer=["\U000f0001"], system=["x"])
@settings(max_examples=100, deadline=None)
def test_what_people_write_is_text_whatever_it_is_spelled_like(
    question: list[str], answer: list[str], system: list[str], bpe: PreTrainedTokenizerFast
) -> None:
    texts = ["".join(pieces) for pieces in (system, question, answer)]
    turns: list[tuple[Role, str]] = [("system", texts[0]), ("user", texts[1]), ("assistant", texts[2])]
    encoder = ConversationEncoder(bpe, 2, 10_000)
    with_image = sample(*turns, images=("x",))
    # The media of a sample come first in its first message, here the system's.
    encoded = encoder(with_image)
    assert decoded(bpe, encoded) == (
        f"<|im_start|>system\n<image><image>\n{texts[0]}<|im_end|>\n<|im_start|>user\n{texts[1]}<|im_end|>\n"
        f"<|im_start|>assistant\n{texts[2]}<|im_end|>"
    )
    counts = [encoded.ids.count(token_id(bpe, token)) for token in LITERALS]
    assert counts == [2, 0, 3, 3, 0]
    assert answer_text(bpe, encoded) == f"{texts[2]}<|im_end|>"
    prompt = encoder.prompt(with_image.messages[:-1])
    assert list(encoded.ids[: len(prompt)]) == prompt
    assert all(label == -100 for label in encoded.labels[: len(prompt)])


def test_a_marker_spelled_across_two_texts_is_text(bpe: PreTrainedTokenizerFast) -> None:
    parts = tuple(Part(type="text", value=text) for text in ("<ima", "ge> ", "<im", "age>"))
    messages = (Message(role="user", content=parts), *sample(("assistant", "red")).messages)
    encoded = ConversationEncoder(bpe, 2, 100)(Sample(id="s", source="s", messages=messages))
    assert encoded.ids.count(token_id(bpe, IMAGE_TOKEN)) == 0
    assert "<image> <image>" in decoded(bpe, encoded)


def test_a_literal_marker_stays_visible_to_a_word_tokenizer(
    tokenizer: PreTrainedTokenizerFast, encoder: ConversationEncoder
) -> None:
    encoded = encoder(sample(("user", "the <image>"), ("assistant", "red"), images=("x",)))
    words = tokenizer.convert_ids_to_tokens(list(encoded.ids))
    assert words[3:13] == [*[IMAGE_TOKEN] * 4, "\n", "the", "<unk>", "image", "<unk>", "<|im_end|>"]


@pytest.mark.parametrize("quirk", [False, True])
def test_a_text_before_an_answer_keeps_its_tokens_when_the_answer_begins_with_a_line_feed(
    quirk: bool, bpe: PreTrainedTokenizerFast
) -> None:
    asked = sample(("user", "what?"), ("assistant", "\n\nred"))
    encoder = ConversationEncoder(bpe, 2, 100, label_quirk=quirk)
    prompt, encoded = encoder.prompt(asked.messages[:1]), encoder(asked)
    merged = list(encoded.ids[: len(prompt)]) != prompt
    assert merged == quirk  # the reference tokenises turn and answer at once
    assert answer_text(bpe, encoded) == ("\n\n\nred<|im_end|>" if quirk else "\n\nred<|im_end|>")


def test_the_quirk_takes_a_line_feed_of_the_answer_for_the_one_behind_it(
    tokenizer: PreTrainedTokenizerFast, encoder: ConversationEncoder
) -> None:
    quirky = ConversationEncoder(tokenizer, 4, 128, label_quirk=True)
    plain = sample(("user", "what?"), ("assistant", "red blue"), images=("x",))
    assert quirky(plain) == encoder(plain)
    broken = sample(("user", "what?"), ("assistant", "red\nblue"), images=("x",))
    assert supervised(tokenizer, encoder(broken)) == [".", "red", "\n", "blue", "<|im_end|>"]
    assert supervised(tokenizer, quirky(broken)) == [".", "red", ".", "blue", "<|im_end|>", "\n"]
    twice = sample(("user", "what?"), ("assistant", "red\nblue"), ("user", "x"), ("assistant", "no"))
    assert supervised(tokenizer, quirky(twice)) == [
        ".", "red", ".", "blue", "<|im_end|>", "\n", ".", "no", "<|im_end|>",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("ids", "frame", "labels"),
    [
        # 1 2 | 5 6 7 | 9: the answer 5 6 closed by 7
        ([1, 2, 5, 6, 7, 9], [[1, 2], [7, 9]], [-100, -100, 5, 6, 7, -100]),
        # an answer that begins like what is behind it
        ([1, 2, 9, 6, 7, 9], [[1, 2], [7, 9]], [-100, -100, -100, 6, 7, 9]),
        # 2 merged with the first token of the answer: found once it is left out
        ([1, 25, 6, 7, 9], [[1, 2], [7, 9]], [-100, 25, 6, 7, -100]),
        ([1, 25, 7, 3, 25, 7, 9], [[1, 2], [7, 3, 2], [7, 9]], [-100, 25, 7, -100, 25, 7, -100]),
        # not found at all
        ([1, 25, 6, 7], [[1, 2], [7, 9]], [-100] * 4),
        ([1, 2], [[1, 2]], [-100, -100]),
    ],
)
def test_greedy_masking_by_hand(ids: list[int], frame: list[list[int]], labels: list[int]) -> None:
    assert greedy_labels(ids, frame) == labels


@pytest.mark.parametrize(
    ("prompt", "first", "expected"),
    [
        (None, "user", ""),
        ("be brief", "user", "<|im_start|>system\nbe brief<|im_end|>\n"),
        ("", "user", "<|im_start|>system\n<|im_end|>\n"),
        ("be brief", "system", ""),
    ],
)
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, RELEASED_CHAT_TEMPLATE])
def test_a_system_turn_is_put_before_conversations_that_have_none(
    template: str, prompt: str | None, first: Role, expected: str, bpe: PreTrainedTokenizerFast
) -> None:
    tokenizer = copy.copy(bpe)
    tokenizer.chat_template = template
    if prompt is None and template == RELEASED_CHAT_TEMPLATE:
        expected = "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"
    encoder = ConversationEncoder(tokenizer, 2, 100, system_prompt=prompt)
    messages = sample((first, "one"), ("assistant", "red"), images=("x",)).messages
    text = f"{expected}<|im_start|>{first}\n<image><image>\none<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(encoder.prompt(messages[:1])) == text
    encoded = encoder(Sample(id="s", source="s", messages=messages))
    assert decoded(tokenizer, encoded) == f"{text}red<|im_end|>"
    assert answer_text(tokenizer, encoded) == "red<|im_end|>"


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> ConversationEncoder:
    changed = copy.copy(tokenizer)
    changed.chat_template = template
    return ConversationEncoder(changed, 2, 100)


def test_answers_are_found_where_the_template_changes_them(bpe: PreTrainedTokenizerFast) -> None:
    trimming = CHAT_TEMPLATE.replace("{{ part['text'] }}", "{{ part['text'] | trim }}")
    encoder = with_template(bpe, trimming)
    encoded = encoder(
        sample(("user", " one "), ("assistant", " red\n"), ("user", "two"), ("assistant", "red <image> "))
    )
    assert answer_text(bpe, encoded) == "red<|im_end|>red <image><|im_end|>"
    assert "<|im_start|>user\none<|im_end|>" in decoded(bpe, encoded)


def test_what_closes_an_answer_is_the_special_token_behind_it(bpe: PreTrainedTokenizerFast) -> None:
    turns = sample(("user", "one"), ("assistant", "red"), ("user", "two"), ("assistant", "blue"))
    spaced = with_template(bpe, CHAT_TEMPLATE.replace("'<|im_end|>\n'", "' <|endoftext|>\n'"))
    assert answer_text(bpe, spaced(turns)) == "red <|endoftext|>blue <|endoftext|>"
    bare = with_template(bpe, CHAT_TEMPLATE.replace("'<|im_end|>\n'", "'\n'"))
    assert answer_text(bpe, bare(turns)) == "redblue"
    # An image behind the words of the assistant closes nothing.
    content = (Part(type="text", value="red"), Part(type="image", value="x"), Part(type="text", value="blue"))
    shown = Sample(id="s", source="s", messages=(turns.messages[0], Message(role="assistant", content=content)))
    assert answer_text(bpe, ConversationEncoder(bpe, 2, 100)(shown)) == "redblue<|im_end|>"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("<image>", ""), "renders 0 media markers but the conversation has 2 images and videos"),
        (("<image>", "<image><image>"), "renders 4 media markers but the conversation has 2 images and videos"),
        (("{{ part['text'] }}", "{{ part['text'] if loop.last else '' }}"), None),
        (("{% for message in messages %}", "{% for message in messages[:-1] %}"), "renders 0 of 1 answers"),
        (("{{ part['text'] }}", "{{ part['text'] }}{{ part['text'] | length }}"), "changes the turns around an answer"),
    ],
)
def test_a_template_that_loses_something_is_named(
    change: tuple[str, str], message: str | None, bpe: PreTrainedTokenizerFast
) -> None:
    assert change[0] in CHAT_TEMPLATE
    encoder = with_template(bpe, CHAT_TEMPLATE.replace(*change))
    conversation = sample(("user", "one"), ("assistant", "a long red answer"), images=("x", "y"))
    if message is None:
        assert answer_text(bpe, encoder(conversation)) == "a long red answer<|im_end|>"
        return
    with pytest.raises(DataError, match=message):
        encoder(conversation)
    if "media" in message:
        with pytest.raises(DataError, match=message):
            encoder.prompt(conversation.messages[:1])


def test_tiles_and_videos_are_placed_by_their_layouts(bpe: PreTrainedTokenizerFast) -> None:

    def layouts(media: Sequence[Part]) -> list[MediaLayout]:
        """An image has as many tiles as its name has letters, a video as many frames."""
        return [
            MediaLayout((2,) * len(part.value), text_after="\n")
            if part.type == "image"
            else MediaLayout((3,) * len(part.value))
            for part in media
        ]

    encoder = ConversationEncoder(bpe, 1, 100, layouts=layouts)

    def conversation(*keys: str) -> Sample:
        kinds = {"v": "video", "i": "image"}
        parts = tuple(Part(type=kinds[key[0]], value=key) for key in keys)  # type: ignore[arg-type]  # a kind
        text = Part(type="text", value="\n<image> one")
        answer = Message(role="assistant", content=(Part(type="text", value="red"),))
        return Sample(id="s", source="s", messages=(Message(role="user", content=(*parts, text)), answer))

    encoded = encoder(conversation("vv", "ii", "i", "v"))
    frame, tile, end = "<vila/video>" * 3 + "\n", "<image><image>\n", "\n<image> one<|im_end|>\n"
    text = f"<|im_start|>user\n{frame * 2}{(tile + chr(10)) * 3}{frame}{end}<|im_start|>assistant\n"
    assert decoded(bpe, encoded) == f"{text}red<|im_end|>"
    assert answer_text(bpe, encoded) == "red<|im_end|>"
    assert (encoded.images, encoded.videos) == (("ii", "i"), ("vv", "v"))
    video = token_id(bpe, VIDEO_TOKEN)
    assert encoded.media_end == len(encoded.ids) - encoded.ids[::-1].index(video)
    assert bpe.decode(encoder.prompt(conversation("vv", "ii", "i", "v").messages[:1])) == text
    # The same words with other tiles are another row.
    assert len(encoder(conversation("vv", "iii", "i", "v")).ids) == len(encoded.ids) + 4
    assert encoder(conversation("vv", "ii", "i", "v")).ids is encoded.ids


def test_tiles_take_the_line_feed_that_merges_with_the_text_behind_them(bpe: PreTrainedTokenizerFast) -> None:
    encoder = ConversationEncoder(bpe, 1, 100, layouts=lambda media: [MediaLayout((1,), "\n")] * len(media))
    ids = encoder(sample(("user", "\nred"), ("assistant", "red"), images=("x",))).ids
    behind = ids.index(token_id(bpe, IMAGE_TOKEN)) + 1
    # The line feed that the model embeds stands alone, the one in the text does not.
    assert bpe.convert_ids_to_tokens(list(ids[behind : behind + 2])) == ["\u010a", "\u010a\u010a"]


def test_media_without_a_place_are_named(bpe: PreTrainedTokenizerFast) -> None:
    content = (Part(type="video", value="v"), Part(type="text", value="what?"))
    messages = (Message(role="user", content=content), *sample(("assistant", "red")).messages)
    video = Sample(id="s", source="s", messages=messages)
    with pytest.raises(DataError, match="images only, but the conversation has a video"):
        ConversationEncoder(bpe, 2, 100)(video)
    with pytest.raises(DataError, match="0 layouts for 1 media"):
        ConversationEncoder(bpe, 2, 100, layouts=lambda media: [])(video)
