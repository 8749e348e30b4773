"""Visual tokens dropped in the prefill: against a pass without any cache, the definitions of both scores, itself."""

import pytest
import torch
from tiny_model import AUDIO, VIDEO, collate, make_sample, prompt_of, tiny_model
from transformers import DynamicCache

from modeling_omni import OmniForConditionalGeneration, OmniProcessor
from modeling_omni.evaluation import heldout_table, reduction_markdown, reduction_table
from modeling_omni.media import OmniInputError
from modeling_omni.modeling_language import eager_attention, ssd_scan
from modeling_omni.token_reduction import (
    ReducedCache,
    attention_scores,
    keep_schedule,
    mamba_scores,
    question_places,
)

PATTERN = "ME*M-*EM"  # every kind of layer, attention at two depths
RELEASED = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
ROWS = [
    [5, ("image", 8, 8), 3, ("image", 4, 4), 6],
    [9],  # nothing to drop
    [2, ("video", 3, 4, 4), ("audio", [60]), 7],
    [("image", 6, 10), 4],
]


@pytest.fixture(scope="module")
def model():
    return tiny_model(pattern=PATTERN)


def make_batch(rows=ROWS, prune=0.0):
    return prompt_of(collate([make_sample(row, i, prune) for i, row in enumerate(rows)]))


def generate(model, batch, new=5, **options):
    options = {"do_sample": False, "max_new_tokens": new, "return_dict_in_generate": True} | options
    return model.generate(**batch, **options, output_logits=True)


def visual_of(batch):
    types = batch["mm_token_type_ids"]
    return (types > 0) & (types != AUDIO)


# --- schedule


@pytest.mark.parametrize("pattern", [PATTERN, RELEASED, "M*EM*EM*E"])
@pytest.mark.parametrize("keep", [0.25, 0.5, 0.9, 1.0])
def test_schedule_has_the_mean_and_falls_behind_mixing_layers(pattern, keep):
    shares = keep_schedule(pattern, keep)
    assert len(shares) == len(pattern) and shares[0] == 1 and shares[-1] > 0
    assert sum(shares) / len(shares) == pytest.approx(keep, abs=1e-6)
    for i in range(1, len(pattern)):
        assert (shares[i] < shares[i - 1]) == (keep < 1 and pattern[i - 1] in "M*")


@pytest.mark.parametrize("keep", [0, 0.1, 1.5, [1.0] * 7, [0.5] * 8, [1, 1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.6]], ids=str)
def test_schedules_that_cannot_be_are_refused(keep):
    with pytest.raises(OmniInputError, match="visual_keep"):
        keep_schedule(PATTERN, keep)


# --- the pass through the layers


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_keeping_everything_is_the_plain_path_exactly(attention):
    model = tiny_model(pattern=PATTERN)
    model.config.llm_config._attn_implementation = attention
    batch = make_batch()
    config = model.config.llm_config
    plain, reduced = DynamicCache(config=config), ReducedCache(config, 1.0)
    steps = torch.randint(40, 160, (3, len(ROWS), 1))
    mask = batch["attention_mask"]
    for step in [None, *steps]:
        inputs = batch if step is None else {"input_ids": step, "attention_mask": mask}
        expected = model(**inputs, past_key_values=plain).logits
        assert torch.equal(model(**inputs, past_key_values=reduced).logits, expected)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    for kind, ours, theirs in zip(PATTERN, reduced.layers, plain.layers):
        if kind == "*":
            assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
    output = generate(model, batch, visual_keep=1.0)
    assert torch.equal(torch.stack(output.logits), torch.stack(generate(model, batch).logits))


@torch.no_grad()
def without_cache(model, embeds_SD, positions, answer):
    """Logits of the answer's tokens from one plain pass over one row, each layer given the tokens it may see."""
    language = model.model.language_model
    hidden = torch.cat([embeds_SD, language.embeddings(answer)])
    places = torch.arange(len(hidden))
    for layer, kept in zip(language.layers, positions):
        kept = torch.cat([kept[kept >= 0], torch.arange(len(embeds_SD), len(embeds_SD) + len(answer))])
        hidden, places = hidden[torch.isin(places, kept)], kept
        causal = torch.full((len(kept), len(kept)), -torch.inf).triu(1)
        hidden = layer(hidden[None], attention={"attention_mask": causal[None, None]})[0]
    return model.lm_head(language.norm_f(hidden))[-len(answer) - 1 : -1]


@pytest.mark.parametrize("prune", [0, 0.5], ids=["all", "evs"])
@pytest.mark.parametrize("scoring", ["query", "random", "uniform"])
def test_decoding_equals_a_pass_without_cache(model, scoring, prune):
    """Rows of different lengths, and so padding that differs from layer to layer; with EVS the places have moved."""
    rows = ROWS if not prune else [ROWS[2], ROWS[2][:1] + [("video", 4, 4, 6), 3], [6]]
    batch = make_batch(rows, prune)
    output = generate(model, batch, visual_keep=0.4, visual_scoring=scoring)
    cache = output.past_key_values
    answers = output.sequences[:, batch["input_ids"].shape[1] :]
    with torch.no_grad():
        embeds = model.model.embed_multimodal(
            **{name: value for name, value in batch.items() if name != "attention_mask"}
        )
    for i in range(len(rows)):
        expected = without_cache(model, embeds[i], [p[i] for p in cache.positions], answers[i])
        actual = torch.stack(output.logits, 1)[i]
        torch.testing.assert_close(actual, expected, atol=2e-3, rtol=1e-3)
    plain = generate(model, batch)
    assert (plain.logits[0] - output.logits[0]).abs().max() > 1e-2  # what was dropped was not nothing
    lengths = {cache.get_seq_length(i) for i, kind in enumerate(PATTERN) if kind == "*"}
    assert len(lengths) == 2 and max(lengths) < cache.get_seq_length()


def test_only_visual_tokens_are_dropped_and_as_many_as_planned(model):
    batch = make_batch()
    visual, mask = visual_of(batch), batch["attention_mask"].bool()
    cache = generate(model, batch, 1, visual_keep=0.4).past_key_values
    for share, positions in zip(cache.shares, cache.positions):
        for i in range(len(ROWS)):
            kept = positions[i][positions[i] >= 0]
            assert torch.equal(kept, kept.sort().values)
            others = (mask & ~visual)[i].nonzero().flatten()
            assert set(others.tolist()) <= set(kept.tolist())
            assert len(kept) - len(others) == torch.ceil(visual[i].sum() * share)
    assert cache.positions[-1].shape[1] < cache.positions[2].shape[1] < cache.positions[0].shape[1]


@torch.no_grad()
def test_evs_says_where_the_visual_tokens_have_gone(model):
    batch = make_batch([ROWS[2], [3, ("video", 4, 4, 6), 3]], prune=0.5)
    types = batch["mm_token_type_ids"]
    inputs = {name: value for name, value in batch.items() if name != "attention_mask"}
    embeds, moved = model.model.embed_multimodal(**inputs, return_types=True)
    table = model.get_input_embeddings()(batch["input_ids"])
    for row in range(2):
        assert not torch.equal(moved[row], types[row])
        assert torch.equal(embeds[row][moved[row] == 0], table[row][types[row] == 0])
        assert (moved[row] == VIDEO).sum() == (types[row] == VIDEO).sum()


def test_what_stays_depends_on_the_question(model):
    sample = make_sample([4, ("image", 10, 10), 6], 0)
    batch = collate([sample, sample, sample])
    batch["input_ids"][1, -6:] = torch.tensor([44, 140, 71, 98, 120, 55])  # another question
    final = {}
    for scoring in ("query", "uniform"):
        cache = generate(model, prompt_of(batch), 1, visual_keep=0.5, visual_scoring=scoring).past_key_values
        final[scoring] = cache.positions[-1]
    for rows in final.values():
        assert torch.equal(rows[0], rows[2])
    assert not torch.equal(final["query"][0], final["query"][1])
    assert torch.equal(final["uniform"][0], final["uniform"][1])
    random = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        cache = generate(model, prompt_of(batch), 1, visual_keep=0.5, visual_scoring="random").past_key_values
        random.append(cache.positions[-1])
    assert torch.equal(random[0], random[1]) and not torch.equal(random[0], random[2])


def test_a_batch_keeps_what_its_rows_keep_alone(model):
    cache = generate(model, make_batch(), 1, visual_keep=0.4).past_key_values
    for i in (0, 3):
        alone = generate(model, prompt_of(collate([make_sample(ROWS[i], i)])), 1, visual_keep=0.4).past_key_values
        for ours, single in zip(cache.positions, alone.positions):
            shift = int(cache.positions[0][i].max() - alone.positions[0].max())
            assert torch.equal(ours[i][ours[i] >= 0] - shift, single[0][single[0] >= 0])


def test_several_answers_and_beams(model):
    batch = make_batch()
    one = generate(model, batch, visual_keep=0.4).sequences
    several = generate(model, batch, visual_keep=0.4, do_sample=True, top_k=1, num_return_sequences=2).sequences
    assert torch.equal(several, one.repeat_interleave(2, 0))
    beams = generate(model, batch, visual_keep=0.4, num_beams=3, length_penalty=0.0, output_scores=True)
    cache = generate(model, batch, 1, visual_keep=0.4).past_key_values
    inputs = {name: value for name, value in batch.items() if name != "attention_mask"}
    with torch.no_grad():
        embeds = model.model.embed_multimodal(**inputs)
    for i in range(len(ROWS)):  # the beam's score is that of its tokens in one pass: caches were reordered as a whole
        answer = beams.sequences[i, batch["input_ids"].shape[1] :]
        logits = without_cache(model, embeds[i], [p[i] for p in cache.positions], answer).log_softmax(-1)
        score = logits.gather(1, answer[:, None]).sum()
        torch.testing.assert_close(beams.sequences_scores[i], score, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefill_chunk_size": 4}, "prefill_chunk_size"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"use_cache": False}, "use_cache"),
        ({"visual_scoring": "best"}, "known: query, random, uniform"),
        ({"visual_keep": 0.01}, "mean over 8 layers"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together(model, options, message):
    with pytest.raises(OmniInputError, match=message):
        generate(model, make_batch(), **({"visual_keep": 0.5} | options))


def test_prompts_that_cannot_be_scored(model):
    right = prompt_of(collate([make_sample(row, i) for i, row in enumerate(ROWS)], left=False))
    with pytest.raises(OmniInputError, match="left"):
        model(**right, past_key_values=ReducedCache(model.config.llm_config, 0.5))
    visual = torch.tensor([[False, True, True]])
    with pytest.raises(OmniInputError, match="text behind"):
        question_places(visual.long(), visual, torch.ones(1, 3).bool())
    for rows in ([[9], [4]], [[3, ("audio", [60]), 5], [4]]):  # nothing visual: nothing is dropped
        batch = make_batch(rows)
        assert torch.equal(generate(model, batch, visual_keep=0.5).sequences, generate(model, batch).sequences)


# --- scores


@torch.no_grad()
def test_attention_scores_are_the_mean_attention_weights(model):
    torch.manual_seed(0)
    layer = model.model.language_model.layers[2].mixer
    query, key, value = torch.randn(2, 4, 40, 8), torch.randn(2, 2, 40, 8), torch.randn(2, 2, 40, 8)
    valid = torch.ones(2, 40).bool()
    valid[0, :5] = False
    mask = torch.zeros(2, 1, 40, 40).masked_fill(~(valid[:, None, None] & torch.ones(40, 40).bool().tril()), -torch.inf)
    weights = eager_attention(layer, query, key, value, mask, 8**-0.5)[1]
    question = torch.tensor([list(range(20, 40)), [39] * 15 + list(range(35, 40))])
    asks = torch.tensor([[True] * 20, [False] * 15 + [True] * 5])
    picked = query.gather(2, question[:, None, :, None].expand(-1, 4, -1, 8))
    actual = attention_scores(picked, key, valid, question, asks)
    torch.testing.assert_close(actual[0], weights[0, :, 20:].mean((0, 1)), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(actual[1], weights[1, :, 35:].mean((0, 1)), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_mamba_scores_are_the_response_to_an_impulse(model):
    """The scan itself, fed with a one at token s, gives what every later token takes from s."""
    torch.manual_seed(0)
    mixer, length = model.model.language_model.layers[0].mixer, 30
    hidden, valid = torch.randn(2, length, 32), torch.ones(2, length).bool()
    valid[1, :6] = False
    question = torch.tensor([[length - 1, 24, 27], [26, 28, 29]])
    asks = torch.tensor([[False, True, True], [True, True, True]])
    actual = mamba_scores(mixer, hidden, valid, question, asks)
    inner, size = 64, 2 * 16
    _, xbc, dt = mixer.in_proj(hidden * valid[..., None]).split([inner, inner + 2 * size, 8], -1)
    xbc = torch.nn.functional.silu(mixer.conv1d(torch.nn.functional.pad(xbc.transpose(1, 2), (3, 0)))).transpose(1, 2)
    B, C = (part.unflatten(-1, (2, 16)) for part in xbc[..., inner:].split(size, -1))
    dt = torch.nn.functional.softplus(dt + mixer.dt_bias)
    impulses = torch.eye(length)[None, :, None].expand(2, length, 8, length).contiguous()  # channel s: a one at token s
    response = ssd_scan(impulses, dt, -mixer.A_log.exp(), B, C)[0].abs()  # [B, t, H, s]
    for row in range(2):
        taken = response[row, question[row][asks[row]]].mean((0, 1))
        first = int(question[row][asks[row]].min())
        seen = valid[row, :first]
        torch.testing.assert_close(actual[row, :first][seen], taken[:first][seen], atol=1e-5, rtol=1e-4)
        assert taken[:first][seen].std() > 1e-3 and not actual[row, :first][~seen].any()


def test_the_question_is_the_text_behind_the_last_visual_token():
    types = torch.tensor([[0, 0, 2, 2, 0, 1, 0, 3, 3, 0, 0], [0] * 11])
    valid = torch.tensor([[0] + [1] * 10, [1] * 11]).bool()
    visual = ((types == 1) | (types == 2)) & valid
    distance, asks = question_places(types, visual, valid)
    assert (11 - distance[0][asks[0]]).tolist() == [6, 9, 10] and not asks[1].any()
    types = torch.zeros(1, 400, dtype=torch.long)
    types[0, 0] = 1
    distance, asks = question_places(types, types == 1, torch.ones(1, 400).bool())
    assert distance.tolist() == [list(range(128, 0, -1))] and asks.all()


# --- what it costs


def test_reduction_table_on_nano():
    model = OmniForConditionalGeneration.from_pretrained("nano", dtype=torch.float32).eval()
    processor = OmniProcessor.from_pretrained("nano")
    skills = ["image_colour", "video_mover"]
    rows = reduction_table(model, processor, skills, [0.5], samples=4)
    ways = [(row["skill"], row["how"], row["keep"]) for row in rows]
    expected = [(skill, "all", 1.0) for skill in skills]
    expected += [(skill, how, 0.5) for how in ("query", "random", "uniform") for skill in skills]
    assert ways == [*expected, ("video_mover", "evs", 0.5)]
    assert [row["right"] for row in rows[:2]] == [row["right"] for row in heldout_table(model, processor, skills, 4)]
    assert rows[0]["right"] >= 3  # the plain path answers; what the others cost is not for a test of four samples
    lines = reduction_markdown(rows).splitlines()
    assert lines[0] == "| skill | all 1 | query 0.5 | random 0.5 | uniform 0.5 | evs 0.5 |" and len(lines) == 6
    assert lines[2].endswith("|  |") and lines[4].startswith("| mean of image |") and lines[4].endswith("|  |")
