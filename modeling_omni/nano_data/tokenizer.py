"""The nano tokenizer: byte-level BPE over a vocabulary of 512, with the released special tokens at the released ids.

Whole words of the nano world (`vocabulary.py` and the question templates) are tokens; everything else, upper-case words
in pictures above all, is spelt letter by letter, digit by digit, byte by byte. A word that can be an answer is the
same token wherever it stands (its space is a token of its own); other words take their leading space with them.
"""

import json
import re
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .vocabulary import COLOURS, MOTIONS, SHAPES, SPOKEN_WORDS

VOCABULARY_SIZE = 512
SPECIAL_TOKENS = {
    0: "<unk>", 1: "<s>", 2: "</s>", 10: "<|im_start|>", 11: "<|im_end|>", 12: "<think>", 13: "</think>",
    14: "<tool_call>", 15: "</tool_call>", 16: "<tool_response>", 17: "</tool_response>", 18: "<image>", 19: "<img>",
    20: "</img>", 27: "<so_embedding>", 28: "<so_start>", 29: "<so_end>",
}  # fmt: skip
SPECIAL_COUNT = 32

# words that may be answers: one token each, without a space
ANSWER_WORDS = tuple(dict.fromkeys((
    *COLOURS, *SHAPES, "top", "bottom", "left", "right", "center", *MOTIONS, *SPOKEN_WORDS, "none",
)))  # fmt: skip
# fixed pieces of the chat template, the video labels and of lists and sums
PHRASES = (
    "user\n", "assistant\n", "system\n", "Frame ", " sampled at ", " seconds and frame ", " seconds: ",
    ", ", ". ", ": ", " + ", " - ", " = ",
)  # fmt: skip
CAPITAL_WORDS = (
    "What", "Which", "Where", "How", "Is", "Does", "In", "Name", "Count", "Read", "Describe", "Write", "Transcribe",
    "The", "There", "You", "Repeat", "Copy", "Say", "Calculate", "Who", "Hello", "Show", "Tell",
)  # fmt: skip
LOWER_WORDS = (
    "what", "which", "where", "how", "is", "does", "in", "name", "count", "read", "describe", "write", "transcribe",
    "i", "this", "a", "the",
)  # fmt: skip
SPACED_WORDS = (
    "is", "the", "a", "of", "in", "at", "to", "and", "are", "it", "does", "do", "this", "me", "there", "i", "you",
    "what", "which", "way", "many", "much", "how", "where", "part", "shape", "shapes", "colour", "color", "picture",
    "text", "video", "clip", "show", "shows", "see", "count", "above", "below", "move", "moves", "moving", "stays",
    "motion", "direction", "happens", "said", "say", "says", "spoken", "word", "words", "voice", "hear", "speech",
    "digits", "number", "handwritten", "shown", "letters", "match", "sign", "copy", "after", "has", "colours",
    "circles", "squares", "triangles", "stars", "crosses", "hearts",
    "am", "nano", "small", "omni", "model", "know", "not", "can", "or", "name", "read", "image", "sound", "audio",
    "first", "second", "click", "button", "greeting", "an",
)  # fmt: skip
# Ids are in shipped checkpoints: new words go here, at the end, and nowhere else.
EXTRA_WORDS = ("time", "your", "help", "day", "like", "some", "who", "with")
# circles, squares ... count as whole words, so they may not be cut at "circle"
_WORD_END = "(?![a-z])"


def _piece_pattern() -> str:
    phrases = "|".join(
        re.escape(p).replace("\\\n", "\n").replace("\\ ", " ") for p in sorted(PHRASES, key=len, reverse=True)
    )
    answers = "|".join(sorted(ANSWER_WORDS, key=len, reverse=True))
    return f"(?:{phrases})| (?!(?:{answers}){_WORD_END})[a-z]+|[A-Z]?[a-z]+|[A-Z]|[0-9]|\\s|[^\\sA-Za-z0-9]"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, made from this file's lists alone."""
    vocabulary = {SPECIAL_TOKENS.get(i, f"<SPECIAL_{i}>"): i for i in range(SPECIAL_COUNT)}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = (*PHRASES, *ANSWER_WORDS, *(f" {w}" for w in SPACED_WORDS), *CAPITAL_WORDS, *LOWER_WORDS)
    words = (*words, *(f" {w}" for w in EXTRA_WORDS))
    for word in words:
        ((symbols, _),) = byte_level.pre_tokenize_str(word)
        vocabulary.setdefault(symbols, len(vocabulary))
    free = VOCABULARY_SIZE - len(vocabulary)
    if free < 0:
        raise ValueError(f"{-free} words too many for a vocabulary of {VOCABULARY_SIZE}")
    # ignore_merges: a piece that is a token is taken whole, any other falls apart into bytes
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_piece_pattern()), behavior="isolated"), byte_level,
    ])  # fmt: skip
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([
        AddedToken(SPECIAL_TOKENS.get(i, f"<SPECIAL_{i}>"), special=True, normalized=False)
        for i in range(SPECIAL_COUNT)
    ])  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<unk>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(folder: str | Path) -> list[str]:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json to `folder`; returns their names."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    special = {k: getattr(tokenizer, k) for k in ("bos_token", "eos_token", "pad_token", "unk_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    return ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
