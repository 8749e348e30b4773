"""A conversation that goes on equals one that is read from nothing, and runs no tower twice (fp32, tiny models)."""

import contextlib
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from tiny_model import LLM, tiny_model
from transformers import GenerationConfig

from modeling_omni import OmniInputError, OmniProcessor
from modeling_omni.conversation import ConversationCache, generate_inputs, mamba_states, media_of, stack_caches
from modeling_omni.generation_rows import Row, generate_rows, row_text
from modeling_omni.inference import encode, stream_answer

PROCESSOR = OmniProcessor.from_pretrained("nano")
TEXT = list(range(40, 300))  # ids that are plain text
HEADER = 5  # a newline, <|im_start|>, "assistant\\n", and <think> with </think> or a newline


@pytest.fixture(scope="module")
def model():
    model = tiny_model(vocab_size=512, mels=80, pattern="M*EM-*")
    others = [i for i in range(512) if i not in TEXT]
    model.generation_config = GenerationConfig(
        eos_token_id=[2, 11], pad_token_id=0, suppress_tokens=others, enable_thinking=False
    )
    return model


def image(seed: int) -> dict:
    pixels = np.random.default_rng(seed).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    return {"type": "image", "name": str(seed), "image": pixels}


def video(seed: int) -> dict:
    frames = np.random.default_rng(seed).integers(0, 255, (6, 64, 64, 3), dtype=np.uint8)
    return {"type": "video", "name": str(seed), "video": (frames, 2.0)}


def audio(seed: int, seconds: float = 0.7) -> dict:
    wave = np.random.default_rng(seed).normal(size=int(seconds * 16000)).astype(np.float32) * 0.1
    return {"type": "audio", "name": str(seed), "audio": (wave, 16000)}


def user(*parts) -> dict:
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


@contextlib.contextmanager
def tower_items(model):
    """Counts what the towers really read: pictures, videos, clips of sound."""
    seen = {"vision": 0, "audio": 0}

    def vision(module, args, output):
        seen["vision"] += len(args[1])

    def sound(module, args, output):
        seen["audio"] += len(args[0])

    hooks = [
        model.model.vision_tower.register_forward_hook(vision),
        model.model.audio_tower.register_forward_hook(sound),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def tokens_read(model):
    """Counts the tokens that go through the language model."""
    seen = {"tokens": 0}

    def hook(module, args, kwargs, output):
        seen["tokens"] += (args[0] if args else kwargs["inputs_embeds"]).shape[1]

    handle = model.model.language_model.register_forward_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def turn(model, cache, messages, thinking=False, settings=None, **options) -> tuple[str, int]:
    """Answers with the cache and without it, checks that both are equal; the answer and the tokens that were known."""
    inputs = encode(model, PROCESSOR, messages, thinking, **options)
    ready = cache.prefill(model, inputs)
    arguments = generate_inputs([ready], model.device)
    settings = {"max_new_tokens": 5, "output_logits": True, "return_dict_in_generate": True} | (settings or {})
    warm = model.generate(**arguments, **settings)
    cache.finish(ready, warm.sequences[0])
    cold = model.generate(**inputs, **settings)
    assert torch.equal(warm.sequences, cold.sequences)
    for a, b in zip(warm.logits, cold.logits):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)
    return PROCESSOR.decode(warm.sequences[0, inputs["input_ids"].shape[1] :]), ready.cached


MEDIA = {
    "text": (),
    "mix": (video(2), "and", image(1), audio(3), image(4)),
}


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("kind", ["text", "mix", "evs"])
def test_three_turns_equal_a_fresh_start(model, kind, thinking):
    """Logits of every new token; media of earlier turns run no tower; the cache goes on where it can."""
    options = {"video_pruning_rate": 0.6} if kind == "evs" else {}
    media = MEDIA["mix" if kind == "evs" else kind]
    cache, messages, known = ConversationCache(), [user(*media, "what is it?")], []
    for question in ("and now?", (image(9), audio(9, 0.3), "more") if kind in ("mix", "evs") else "more"):
        answer, cached = turn(model, cache, messages, thinking, None, **options)
        known.append(cached)
        reply = {"role": "assistant", "content": answer}
        if thinking:
            reply = {"role": "assistant", "content": "yes", "reasoning_content": answer}
        messages = [*messages, reply, user(*([question] if isinstance(question, str) else question))]
    inputs = encode(model, PROCESSOR, messages, thinking, **options)
    with tower_items(model) as seen, tokens_read(model) as read:
        ready = cache.prefill(model, inputs)
    new = (1, 1) if kind in ("mix", "evs") else (0, 0)
    assert (seen["vision"], seen["audio"]) == new
    assert read["tokens"] == inputs["input_ids"].shape[1] - 1 - ready.cached
    known.append(turn(model, cache, messages, thinking, None, **options)[1])
    assert known[0] == 0 < known[1] < known[2]
    assert known[1] > sum(medium.tokens for medium in media_of(encode(model, PROCESSOR, messages[:1], **options), 2))


def test_where_a_conversation_goes_on(model):
    """Without reasoning behind the answer; after a thought at the end of the user's turn, as the template drops it."""
    (letter,) = PROCESSOR.encode("q")  # an answer of it alone is tokenised in the next prompt as it was generated
    settings = {"suppress_tokens": [i for i in range(512) if i != letter]}
    for thinking in (False, True):
        cache = ConversationCache()
        first = [user("one two three")]
        prompt = encode(model, PROCESSOR, first, thinking)["input_ids"].shape[1]
        answer, _ = turn(model, cache, first, thinking, settings)
        assert answer == "qqqqq" and len(PROCESSOR.encode(answer)) == 5
        reply = {"role": "assistant", "content": "" if thinking else answer, "reasoning_content": answer * thinking}
        later = [*first, reply, user("four")]
        _, cached = turn(model, cache, later, thinking, settings)
        assert cached == (prompt - HEADER if thinking else prompt + 4)  # the last token of an answer is never fed
        assert len(cache.prefixes) == 1 and len(cache.prefixes[0].points) == (3 if thinking else 4)


def test_edits_invalidate_exactly_what_they_must(model):
    cache = ConversationCache()
    first = [{"role": "system", "content": "Be brief."}, user(image(1), "what?")]
    second = [*first, {"role": "assistant", "content": "a cat"}, user(audio(2), "and this?")]
    third = [*second, {"role": "assistant", "content": "a dog"}, user("sure?")]
    for messages in (first, second, third):
        turn(model, cache, messages)
    end = {
        n: encode(model, PROCESSOR, m)["input_ids"].shape[1] - HEADER for n, m in enumerate((first, second, third), 1)
    }
    assert turn(model, cache, third)[1] == end[3]  # the same again
    assert turn(model, cache, [*third[:-1], user("really?")])[1] == end[2]  # the last turn
    edited = [*second[:-1], user(audio(2), "and that?"), *third[-2:]]
    with tower_items(model) as seen:
        ready = cache.prefill(model, encode(model, PROCESSOR, edited))
    assert ready.cached == end[1] and sum(seen.values()) == 0  # the sound is known though its place is read again
    swapped = [third[0], user(image(7), "what?"), *third[2:]]
    with tower_items(model) as seen:
        ready = cache.prefill(model, encode(model, PROCESSOR, swapped))
    assert ready.cached == 0 and seen == {"vision": 1, "audio": 0}  # same ids, another picture
    renamed = [{"role": "system", "content": "Be kind."}, *third[1:]]
    with tower_items(model) as seen:
        assert cache.prefill(model, encode(model, PROCESSOR, renamed)).cached == 0
    assert sum(seen.values()) == 0
    assert turn(model, cache, third)[1] == end[3]  # the branches have not harmed it


def test_scopes_do_not_see_each_other(model):
    cache, inputs = ConversationCache(), encode(model, PROCESSOR, [user(image(1), "my secret question")])
    for scope, known in (("a", False), ("b", False), ("a", True)):
        with tower_items(model) as seen:
            assert (cache.prefill(model, inputs, scope=scope).cached > 0) == known
        assert seen["vision"] == (not known)


def test_pieces_are_equal_and_can_be_interrupted(model):
    inputs = encode(model, PROCESSOR, [user(image(1), audio(2), "what " * 10)])
    whole = ConversationCache().generate(model, inputs, max_new_tokens=6)
    pieces = ConversationCache().generate(model, inputs, prefill_chunk_size=7, max_new_tokens=6)
    assert torch.equal(whole, pieces) and torch.equal(whole, model.generate(**inputs, max_new_tokens=6))

    stop = threading.Event()
    stop.set()
    cache = ConversationCache()
    result = list(stream_answer(model, PROCESSOR, inputs, stop, conversation=cache, max_new_tokens=9))[-1][1]
    assert (result["finish_reason"], result["generated_tokens"], cache.prefixes) == ("interrupted", 0, [])
    options = {"conversation": cache, "max_new_tokens": 6, "prefill_chunk_size": 7}
    results = [list(stream_answer(model, PROCESSOR, inputs, **options))[-1][1] for _ in range(2)]
    written = PROCESSOR.decode(whole[0, inputs["input_ids"].shape[1] :])
    assert results[0]["answer"] == results[1]["answer"] == written.strip()
    assert results[0]["cached_tokens"] == 0 < results[1]["cached_tokens"]


def test_bytes_are_bounded(model):
    """Other conversations go first, then old points, then everything; towers run again only for what was dropped."""
    cache = ConversationCache()
    inputs = [encode(model, PROCESSOR, [user(image(number), "what?")]) for number in range(3)]
    for number in range(3):
        cache.prefill(model, inputs[number], scope=str(number))
    one, feature = cache.prefixes[0].bytes, cache.features[next(iter(cache.features))][0].nbytes
    assert len(cache.prefixes) == 3 and cache.bytes == sum(prefix.bytes for prefix in cache.prefixes) == 3 * one
    small = ConversationCache(max_bytes=2 * one, max_media_bytes=2 * feature)
    for number in range(3):
        small.prefill(model, inputs[number], scope=str(number))
    assert [prefix.scope for prefix in small.prefixes] == ["1", "2"] and len(small.features) == 2
    for number, towers in ((2, 0), (0, 1)):
        with tower_items(model) as seen:
            small.prefill(model, encode(model, PROCESSOR, [user("x", image(number))]), scope=str(number))
        assert seen["vision"] == towers
    none = ConversationCache(max_bytes=0, max_media_bytes=0)
    messages = [user(image(1), "what?")]
    answer, _ = turn(model, none, messages)
    assert turn(model, none, [*messages, {"role": "assistant", "content": answer}, user("and?")])[1] == 0
    assert none.prefixes == [] and not none.features
    points = ConversationCache(max_bytes=5 * one)
    messages = [user(image(1), "what?")]
    for _ in range(5):
        inputs = encode(model, PROCESSOR, messages)
        ready = points.prefill(model, inputs)
        sequence = model.generate(**generate_inputs([ready], model.device), max_new_tokens=2)
        points.finish(ready, sequence[0])
        answer, cached = PROCESSOR.decode(sequence[0, inputs["input_ids"].shape[1] :]), ready.cached
        assert points.bytes <= 5 * one
        messages = [*messages, {"role": "assistant", "content": answer.strip()}, user("a")]
    assert cached > 0


def test_rows_of_a_batch_go_on_from_their_own_prefixes(model):
    """Rows of other lengths, some known, some not: tokens as without a cache; the kept states are not shared."""
    conversations = [
        [user(image(1), "what is this and that?")],
        [user("hello")],
        [user(video(2), "x"), {"role": "assistant", "content": "y"}, user(audio(3), "and?")],
    ]

    def run(cache):
        rows = [Row(encode(model, PROCESSOR, m), 6, scope=str(i)) for i, m in enumerate(conversations)]
        generate_rows(model, PROCESSOR, rows, conversations=cache)
        return rows

    plain = [row.tokens for row in run(None)]
    cache = ConversationCache()
    first = run(cache)
    with tower_items(model) as seen:
        second = run(cache)
    assert [row.tokens for row in first] == [row.tokens for row in second] == plain
    assert all(row.cached_tokens == 0 for row in first) and all(row.cached_tokens > 0 for row in second)
    assert sum(seen.values()) == 0 and row_text(PROCESSOR, second[0])["answer"]
    alone = Row(encode(model, PROCESSOR, conversations[1]), 6, scope="1")
    generate_rows(model, PROCESSOR, [alone], conversations=cache)
    assert alone.tokens == plain[1]


@pytest.mark.parametrize("chunk", [None, 7])
def test_unknown_prompts_are_read_as_one_batch(model, chunk):
    """States, keys and points of prompts of other lengths are those of reading each alone; then turns go on."""
    first = [
        ([user(image(1), "what is this and that?")], "a", False, {}),
        ([user("hello")], "b", False, {}),
        ([user(video(2), "x", audio(3), "and?")], "a", False, {"video_pruning_rate": 0.6}),
        ([user(audio(3, 0.4), "think")], "c", True, {}),
        ([user("hello")], "b", False, {}),  # the same again
        ([user("and now")], "b", True, {}),
    ]
    prompts = [(encode(model, PROCESSOR, m, thinking, **more), scope) for m, scope, thinking, more in first]
    alone = [ConversationCache().prefill(model, inputs) for inputs, _ in prompts]
    cache = ConversationCache()
    with tokens_read(model) as read, tower_items(model) as seen:
        ready = cache.prefill_all(model, prompts, chunk)
    lengths = [inputs["input_ids"].shape[1] - 1 for inputs, _ in prompts]
    assert [row.cached > 0 for row in ready] == [False, False, False, False, True, False]
    assert read["tokens"] == max(lengths) + lengths[4] - ready[4].cached  # one batch, and the rest of what came twice
    assert seen == {"vision": 2, "audio": 2}
    for got, wanted in zip(ready, alone):
        assert int(got.cache.get_seq_length()) == int(wanted.cache.get_seq_length())
        assert got.kept.turns == wanted.kept.turns and got.kept.media == wanted.kept.media
        pairs = [(mamba_states(one.cache), *one.kept.points.values(), one.kept.keys_values) for one in (got, wanted)]
        for own, expected in zip(*pairs):
            assert own.keys() == expected.keys()
            for layer in own:
                for a, b in zip(own[layer], expected[layer]):
                    torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)
    messages, scope, thinking, more = first[0]
    later = [*messages, {"role": "assistant", "content": "a cat"}, user("and?")]
    inputs = encode(model, PROCESSOR, later, thinking)
    assert cache.prefill_all(model, [(inputs, "b"), (inputs, scope)])[1].cached == lengths[0] + 1 - HEADER


def test_a_state_that_is_kept_is_never_written_to(model):
    cache = ConversationCache()
    inputs = encode(model, PROCESSOR, [user("one two")])
    cache.prefill(model, inputs)
    point = max(cache.prefixes[0].points)
    before = [tensor.clone() for pair in cache.prefixes[0].points[point].values() for tensor in pair]
    keys = [pair[0].clone() for pair in cache.prefixes[0].keys_values.values()]
    cache.generate(model, inputs, max_new_tokens=5)
    prefix = cache.prefixes[0]
    assert all(torch.equal(a, b) for a, b in zip(before, (t for pair in prefix.points[point].values() for t in pair)))
    for old, (new, _) in zip(keys, prefix.keys_values.values()):
        assert torch.equal(old[:, :, :point], new[:, :, :point])
    caches = [cache.prefill(model, inputs).cache for _ in range(2)]
    stacked = stack_caches(caches, model.config.llm_config)
    assert stacked.layers[0].conv_states[0].shape[0] == 2


def test_wrong_inputs_are_refused(model):
    inputs = encode(model, PROCESSOR, [user("a")])
    with pytest.raises(ValueError, match="one row without padding"):
        ConversationCache().prefill(model, inputs | {"attention_mask": inputs["attention_mask"] * 0})
    for name in ("num_beams", "num_return_sequences"):
        with pytest.raises(OmniInputError, match=f"{name} cannot be more than 1"):
            ConversationCache().generate(model, inputs, **{name: 2})


@pytest.mark.parametrize("sampled", [False, True])
def test_drafts_go_on_from_a_conversation(sampled):
    """With a draft head: the answers of plain decoding, and states behind them that the next turn goes on from."""
    letters = [i for i in TEXT if PROCESSOR.decode([i]) in ("q", "x", "z")]  # few: drafts are right now and then
    llm = LLM | {"hybrid_override_pattern": "M*EM-*", "vocab_size": 512, "num_nextn_predict_layers": 1}
    model = tiny_model(mels=80, llm_config=llm)
    model.generation_config = GenerationConfig(
        eos_token_id=[11], pad_token_id=0, suppress_tokens=[i for i in range(512) if i not in letters]
    )
    cache, counts, messages = ConversationCache(), Counter(), [user(image(1), "what is it?")]
    settings = {"max_new_tokens": 8, "do_sample": sampled}
    for known in (0, 1, 1):
        inputs = encode(model, PROCESSOR, messages, False)
        ready = cache.prefill(model, inputs)
        assert (ready.cached > 0) == known
        torch.manual_seed(1)
        drafted = model.generate(**generate_inputs([ready], model.device), mtp_drafts=2, mtp_counts=counts, **settings)
        cache.finish(ready, drafted[0])
        torch.manual_seed(1)
        assert torch.equal(drafted, model.generate(**inputs, **settings))
        behind = ready.kept.points[drafted.shape[1] - 1]
        with torch.no_grad():
            embeds = model.model.embed_multimodal(**{k: v for k, v in inputs.items() if k != "attention_mask"})
            answer = model.get_input_embeddings()(drafted[:, inputs["input_ids"].shape[1] : -1])
            whole = model.model(inputs_embeds=torch.cat([embeds, answer], 1), use_cache=True).past_key_values
        for i, pair in mamba_states(whole).items():
            for kept, expected in zip(behind[i], pair):
                torch.testing.assert_close(kept, expected, atol=2e-4, rtol=2e-4)
        answer = PROCESSOR.decode(drafted[0, inputs["input_ids"].shape[1] :])
        messages = [*messages, {"role": "assistant", "content": answer}, user("and?")]
    assert counts["accepted"] < counts["drafted"] and (counts["accepted"] > 0) >= sampled
