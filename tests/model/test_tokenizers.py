from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nvila.data.tokenizers import (
    CHAT_TEMPLATE,
    IMAGE_TOKEN,
    PAD_TOKEN,
    RELEASED_CHAT_TEMPLATE,
    TURN_END,
    TURN_START,
    VIDEO_TOKEN,
    build_word_tokenizer,
    token_id,
)
from nvila.errors import ConfigError


def tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    return list(tokenizer.tokenize(text))


def test_words_marks_and_line_feeds_are_tokens_and_case_is_dropped(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokens(tokenizer, "Is there  a RED circle?\nYes") == [
        "is", "there", "a", "red", "circle", "?", "\n", "yes",
    ]  # fmt: skip


def test_special_tokens_survive_inside_text(tokenizer: PreTrainedTokenizerFast) -> None:
    text = f"{TURN_START}user\n{IMAGE_TOKEN}{IMAGE_TOKEN}red{VIDEO_TOKEN}{TURN_END}\n"
    assert tokens(tokenizer, text) == [
        TURN_START, "user", "\n", IMAGE_TOKEN, IMAGE_TOKEN, "red", VIDEO_TOKEN, TURN_END, "\n",
    ]  # fmt: skip


def test_unknown_word_is_one_unknown_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer("zebra red").input_ids == [token_id(tokenizer, "<unk>"), token_id(tokenizer, "red")]


def test_vocabulary_is_ordered_by_frequency_then_alphabet() -> None:
    tokenizer = build_word_tokenizer(["b b b", "a c", "c B", "user"], model_max_length=8)
    ids = [token_id(tokenizer, word) for word in ("b", "c", "a")]
    assert ids == sorted(ids)
    assert len(tokenizer) == 6 + 4 + 3  # special tokens, template words, ours
    assert [build_word_tokenizer(["a c", "b b"], model_max_length=8).get_vocab()] * 2 == [
        build_word_tokenizer(iter(texts), model_max_length=8).get_vocab() for texts in (["b b", "a c"], ["a b", "c b"])
    ]


def test_end_and_padding_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.eos_token == TURN_END
    assert tokenizer.pad_token == PAD_TOKEN
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.model_max_length == 128


def test_template_renders_media_parts_in_place(tokenizer: PreTrainedTokenizerFast) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "image"}, {"type": "video"}, {"type": "text", "text": " what?\n"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == (
        "<|im_start|>system\nbe brief<|im_end|>\n"
        "<|im_start|>user\n<image><vila/video> what?\n<|im_end|>\n"
        "<|im_start|>assistant\nred<|im_end|>\n"
    )
    opened = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert text == f"{opened}red<|im_end|>\n"


@pytest.mark.parametrize(
    ("first", "system"),
    [
        ({"role": "user", "content": "what?"}, "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"),
        ({"role": "system", "content": "be brief"}, ""),
        ({"role": "system", "content": ""}, ""),
    ],
)
def test_released_models_have_a_system_turn_unless_one_is_given(
    first: dict[str, str], system: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    messages: list[Any] = [first, {"role": "user", "content": [{"type": "image"}]}]
    plain, released = (
        tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
        for template in (CHAT_TEMPLATE, RELEASED_CHAT_TEMPLATE)
    )
    assert released == system + str(plain)


@pytest.mark.parametrize("unknown", ["<unk>", None])
def test_a_missing_token_is_named(unknown: str | None) -> None:
    tokenizer = build_word_tokenizer(["red"], model_max_length=8)
    assert token_id(tokenizer, "<unk>") == tokenizer.unk_token_id
    tokenizer.unk_token = unknown
    with pytest.raises(ConfigError, match="tokenizer has no token '<t7>'"):
        token_id(tokenizer, "<t7>")


@pytest.mark.parametrize("text", ["is there a red circle?", "yes", f"{IMAGE_TOKEN}\nwhat shape{TURN_END}"])
def test_tokenizer_comes_back_from_disk(tokenizer: PreTrainedTokenizerFast, text: str, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])
    assert loaded.chat_template == tokenizer.chat_template
    assert (loaded.eos_token, loaded.model_max_length) == (TURN_END, 128)
