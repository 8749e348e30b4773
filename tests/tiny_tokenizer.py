"""A byte-level BPE tokenizer with the released special tokens and a few merges, built on the spot for tests."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

NAMED = {
    0: "<unk>", 1: "<s>", 2: "</s>", 10: "<|im_start|>", 11: "<|im_end|>", 12: "<think>", 13: "</think>",
    14: "<tool_call>", 15: "</tool_call>", 16: "<tool_response>", 17: "</tool_response>", 18: "<image>", 19: "<img>",
    20: "</img>", 27: "<so_embedding>", 28: "<so_start>", 29: "<so_end>",
}  # fmt: skip
SPECIALS = [NAMED.get(i, f"<SPECIAL_{i}>") for i in range(32)]
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("a", "n"), ("Ċ", "Ċ"), ("e", "r"), ("F", "r"), ("s", "e")]


def build_tokenizer(extra_merges: list[tuple[str, str]] = ()) -> PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate(SPECIALS)}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab.setdefault(symbol, len(vocab))
    merges = [*MERGES, *extra_merges]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not extra_merges)
    backend.decoder = decoders.ByteLevel()
    # as in released tokenizers, not every added token is a "special" one
    backend.add_tokens([AddedToken(t, special=t not in ("<think>", "</think>"), normalized=False) for t in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>", unk_token="<unk>", pad_token="<unk>"
    )
