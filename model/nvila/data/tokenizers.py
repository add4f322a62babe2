"""Chat template, special tokens and the small word tokenizer of the tiny recipes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nvila.errors import ConfigError

IMAGE_TOKEN = "<image>"
VIDEO_TOKEN = "<vila/video>"
PAD_TOKEN = "<|endoftext|>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"

# ChatML with media parts rendered as their token and nothing between parts; the encoder adds the line feed that
# closes an image.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'video' %}<vila/video>"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# The released models saw this system turn (without a full stop) before every conversation that had none of its own;
# an explicit turn, also an empty one, takes its place.
DEFAULT_SYSTEM_PROMPT = "You are a helpful assistant"
RELEASED_CHAT_TEMPLATE = (
    "{% if messages and messages[0]['role'] != 'system' %}"
    f"{{{{ '<|im_start|>system\n{DEFAULT_SYSTEM_PROMPT}<|im_end|>\n' }}}}"
    "{% endif %}"
) + CHAT_TEMPLATE


def build_word_tokenizer(texts: Iterable[str], *, model_max_length: int) -> PreTrainedTokenizerFast:
    """Build a lower-casing word tokenizer whose vocabulary is the words of `texts`, most frequent first.

    A model of half a million parameters has no room for a 150k vocabulary; everything else (ChatML, media tokens,
    padding) is as in the released models.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    specials = [PAD_TOKEN, TURN_START, TURN_END, IMAGE_TOKEN, VIDEO_TOKEN, "<unk>"]
    split = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), behavior="removed", invert=True)
    counts: Counter[str] = Counter()
    for text, times in Counter(texts).items():
        for word, _ in split.pre_tokenize_str(text.lower()):
            counts[word] += times
    ordered = sorted(counts, key=lambda word: (-counts[word], word))
    words = [*specials, "\n", "system", "user", "assistant", *ordered]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = split
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token=PAD_TOKEN,
        eos_token=TURN_END,
        additional_special_tokens=[TURN_START, IMAGE_TOKEN, VIDEO_TOKEN],
        chat_template=CHAT_TEMPLATE,
        model_max_length=model_max_length,
        padding_side="right",
    )


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """Look up the id of a token; ids are never written down, as they differ between checkpoints.

    Raises:
        ConfigError: The tokenizer lacks the token.
    """
    found = tokenizer.convert_tokens_to_ids(token)
    # A tokenizer answers with the id of "unknown" for words it lacks, which would then stand for images.
    if not isinstance(found, int) or (found == tokenizer.unk_token_id and token != tokenizer.unk_token):
        raise ConfigError(f"the tokenizer has no token '{token}'", "add it, and resize the model's embeddings")
    return found
