"""Reasoning budgets through the real `generate`: a model that writes what a script says, with the real cache."""

import io
import json
import sys

import pytest
import torch
from tiny_model import collate, make_sample, prompt_of, randomize, tiny_config
from tiny_tokenizer import build_tokenizer
from transformers import GenerationConfig

import infer
from modeling_omni import OmniFeatureExtractor, OmniForConditionalGeneration, OmniInputError, OmniProcessor
from modeling_omni.evaluation import answer_batch
from modeling_omni.inference import encode, generation_options, load, stream_answer, user_message
from modeling_omni.reasoning_budget import ReasoningBudget, fit_budget, forced_tokens, reasoning_limits, thought_tokens

THINK, CLOSE, END = 12, 13, 11
TOKENIZER = build_tokenizer([("\u00e3", "\u0122"), ("\u00e3\u0122", "\u0124")])  # "\u3002" as one token
PROCESSOR = OmniProcessor(feature_extractor=OmniFeatureExtractor(feature_size=16), tokenizer=TOKENIZER)
A, B, STOP, LINE, LINES, CJK = (PROCESSOR.encode(text)[0] for text in ("a", "b", ".", "\n", "\n\n", "\u3002"))


class Scripted(OmniForConditionalGeneration):
    """Runs the whole model, then adds `strength` to the logit of the token that the prompt's script has at this step
    (its last one from then on)."""

    scripts, prompt_length, strength = [[A]], 0, 1e4

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        step = int(output.past_key_values.get_seq_length()) - self.prompt_length
        rows = len(output.logits) // len(self.scripts)
        for row, script in enumerate(self.scripts):
            output.logits[row * rows : (row + 1) * rows, -1, script[min(step, len(script) - 1)]] += self.strength
        return output


@pytest.fixture(scope="module")
def model():
    model = randomize(Scripted(tiny_config("M*E", vocab_size=len(TOKENIZER)))).eval()
    model.generation_config = GenerationConfig(eos_token_id=END, pad_token_id=0)
    return model


def play(model, batch: dict, scripts: list[list[int]], budget, grace, strength=1e4, **options):
    """Generated ids with the budget, without it, and the mask of forced places."""
    batch = prompt_of(batch)
    model.scripts, model.prompt_length, model.strength = scripts, batch["input_ids"].shape[1], strength
    limit = ReasoningBudget(PROCESSOR, batch["input_ids"], budget, grace)
    options = {"do_sample": False, "max_new_tokens": 20} | options
    rows = []
    for processors in ([limit], []):
        torch.manual_seed(0)
        rows.append(model.generate(**batch, logits_processor=processors, **options))
    mask = limit.forced_mask(rows[0], END)
    return rows[0][:, model.prompt_length :], rows[1][:, model.prompt_length :], mask


def prompts(ends: list[list[int]]) -> dict:
    """Left-padded prompts of growing length, with a thought of an earlier turn, that end with the given ids."""
    samples = []
    for i, end in enumerate(ends):
        ids = [A, THINK, B, CLOSE, *[B] * i, *end]
        samples.append(make_sample([1], i) | {"ids": ids, "types": [0] * len(ids)})
    return collate(samples)


# name: prompt's end, budget, grace, script, what is written with the budget
OPEN, SHUT = [THINK, LINE], [THINK, CLOSE]
CASES = {
    "ended when the grace is over": (OPEN, 4, 2, [A], [A] * 6 + [LINE, CLOSE] + [A] * 12),
    "ended at a newline in the grace": (OPEN, 4, 9, [A] * 5 + [LINE, A, B], [A] * 5 + [LINE, CLOSE] + [B] * 13),
    "at a token that holds newlines": (OPEN, 4, 9, [A] * 4 + [LINES, B], [A] * 4 + [LINES, CLOSE] + [B] * 14),
    "at a newline at the budget": (OPEN, 4, 9, [A] * 3 + [LINE, B], [A] * 3 + [LINE, CLOSE] + [B] * 15),
    "not at a newline before": (OPEN, 4, 2, [A, LINE, LINE, B], [A, LINE, LINE, B, B, B, LINE, CLOSE] + [B] * 12),
    "at a sentence late in the grace": (OPEN, 4, 8, [A] * 7 + [STOP, B], [A] * 7 + [STOP, LINE, CLOSE] + [B] * 10),
    "at a CJK sentence": (OPEN, 4, 8, [A] * 7 + [CJK, B], [A] * 7 + [CJK, LINE, CLOSE] + [B] * 10),
    "not at an early sentence": (OPEN, 4, 8, [A] * 4 + [STOP, B], [A] * 4 + [STOP] + [B] * 7 + [LINE, CLOSE] + [B] * 6),
    "own end before the budget": (OPEN, 4, 2, [A, LINE, CLOSE, B], [A, LINE, CLOSE] + [B] * 17),
    "own end in the grace": (OPEN, 4, 6, [A] * 6 + [CLOSE, B], [A] * 6 + [CLOSE] + [B] * 13),
    "the whole answer ended": (OPEN, 4, 2, [A] * 5 + [END], [A] * 5 + [END] + [0] * 14),
    "no thought": (SHUT, 4, 2, [A, LINE], [A] + [LINE] * 19),
    "no budget": (OPEN, None, 2, [A, LINE], [A] + [LINE] * 19),
    "a negative budget": (OPEN, -1, 2, [LINE], [LINE] * 20),
    "no thinking at all": (OPEN, 0, 5, [A], [CLOSE] + [A] * 19),
    "no grace": (OPEN, 3, 0, [A], [A] * 3 + [LINE, CLOSE] + [A] * 15),
    "own thought": (SHUT, 3, 1, [LINE, THINK, A], [LINE, THINK] + [A] * 4 + [LINE, CLOSE] + [A] * 12),
    "thoughts add up": (
        OPEN, 4, 1, [A, A, CLOSE, B, THINK, A], [A, A, CLOSE, B, THINK, A, A, A, LINE, CLOSE] + [A] * 10,
    ),
    "a thought after the budget": (
        OPEN, 2, 0, [A, A, A, A, B, THINK, A], [A, A, LINE, CLOSE, B, THINK, CLOSE] + [A] * 13,
    ),
}  # fmt: skip


def test_every_rule_in_one_left_padded_batch_with_a_budget_per_row(model):
    ends, budgets, graces, scripts, expected = zip(*CASES.values())
    got, free, mask = play(model, prompts(list(ends)), list(scripts), list(budgets), list(graces))
    for i, name in enumerate(CASES):
        assert got[i].tolist() == expected[i], name
        longest = (scripts[i] + [scripts[i][-1]] * 20)[:20]
        stop = longest.index(END) + 1 if END in longest else 20
        assert free[i].tolist() == longest[:stop] + [0] * (20 - stop), name
        changed = [k for k in range(20) if got[i, k] != free[i, k]]
        assert not changed or mask[i, changed[0]], name  # up to the first forced token nothing differs
    # exactly the forced tokens, and no padding, are in the mask
    at = {name: mask[i].nonzero().flatten().tolist() for i, name in enumerate(CASES)}
    assert at["ended when the grace is over"] == [6, 7] and at["ended at a newline in the grace"] == [6]
    assert at["thoughts add up"] == [8, 9] and at["no thinking at all"] == [0] and at["own thought"] == [6, 7]
    for name in ("own end before the budget", "own end in the grace", "the whole answer ended", "no thought"):
        assert at[name] == [], name
    assert all(at[name] == [] for name in ("no budget", "a negative budget"))


def test_one_budget_for_all_rows(model):
    got, _, _ = play(model, prompts([OPEN, SHUT]), [[A], [A]], 3, 2)
    assert got.tolist() == [[A] * 5 + [LINE, CLOSE] + [A] * 13, [A] * 20]


def test_sampling_several_answers_per_prompt(model):
    batch = prompts([OPEN, OPEN, SHUT])
    options = {"do_sample": True, "temperature": 3.0, "num_return_sequences": 4, "max_new_tokens": 24}
    options["suppress_tokens"] = [THINK, CLOSE, END]  # forced all the same
    got, free, mask = play(model, batch, [[A]] * 3, [2, 9, 4], [4, 4, 4], strength=8.0, **options)
    assert got.shape == (12, 24) and len({tuple(row) for row in free.tolist()}) == 12
    for row, budget in enumerate([2] * 4 + [9] * 4):
        ids = got[row].tolist()
        assert ids.count(CLOSE) == 1 and budget <= ids.index(CLOSE) <= budget + 4 + 1
        forced = mask[row].nonzero().flatten().tolist()
        assert forced[-1] == ids.index(CLOSE) and len(forced) <= 2
        assert ids[: forced[0]] == free[row, : forced[0]].tolist()
    assert torch.equal(got[8:], free[8:]) and not mask[8:].any()


@pytest.mark.parametrize("copies", [1, 3])
def test_beams(model, copies):
    options = {"num_beams": 3, "num_return_sequences": copies, "suppress_tokens": [THINK, CLOSE, END, LINE, LINES]}
    got, free, mask = play(model, prompts([OPEN, SHUT]), [[A], [A]], [3, 3], [2, 2], strength=2.0, **options)
    for row in range(copies):
        ids = got[row].tolist()
        assert ids[-1] not in (LINE, CLOSE) and ids.count(CLOSE) == 1
        assert ids.index(CLOSE) in (5, 6) and ids[ids.index(CLOSE) - 1] == LINE
        assert mask[row].nonzero().flatten().tolist() == [ids.index(CLOSE) - 1, ids.index(CLOSE)]
    assert torch.equal(got[copies:], free[copies:]) and not mask[copies:].any()


def test_media_prompts(model):
    """`generate` then works on embeddings; pictures, tubelets and sound in one left-padded batch."""
    rows = [[3, ("image", 4, 4), 2], [("video", 2, 4, 4), 1, ("audio", [40])], [4]]
    samples = [make_sample(row, i) for i, row in enumerate(rows)]
    for sample, end in zip(samples, (OPEN, OPEN, SHUT)):
        sample["ids"] += end
        sample["types"] += [0, 0]
    got, free, _ = play(model, collate(samples), [[A], [A, LINE, A], [A]], [2, 1, 1], [1, 3, 1])
    assert got[0].tolist() == [A] * 3 + [LINE, CLOSE] + [A] * 15
    assert got[1].tolist() == [A, LINE, CLOSE] + [A] * 17
    assert torch.equal(got[2], free[2])


def test_rules_hold_on_random_rows():
    """Step by step against the column of `forced_tokens`, which must not look ahead; bounds of every thought."""
    generator = torch.Generator().manual_seed(0)
    rows, steps = 300, 40
    choices = torch.tensor([A, A, A, A, A, B, STOP, LINE, THINK, CLOSE])
    wanted = choices[torch.randint(0, len(choices), (rows, steps), generator=generator)]
    budget = torch.randint(-1, 12, (rows,), generator=generator)
    grace = torch.randint(0, 8, (rows,), generator=generator)
    opened = torch.randint(0, 2, (rows,), generator=generator).bool()
    prompt = torch.where(opened, THINK, CLOSE)[:, None]
    limit = ReasoningBudget(PROCESSOR, prompt, budget.tolist(), grace.tolist())
    ids, changed = prompt, []
    for step in range(steps):
        scores = torch.nn.functional.one_hot(wanted[:, step], len(TOKENIZER)).float()
        new = limit(ids, scores)
        changed.append((new != scores).any(1))
        ids = torch.cat([ids, new.argmax(1, keepdim=True)], 1)
    mask = limit.forced_mask(ids)
    assert torch.equal(mask, torch.stack(changed, 1)) and mask.any() and not mask.all()
    assert not mask[budget < 0].any()
    whole = forced_tokens(ids[:, 1:], opened, budget.where(budget >= 0, 2**40), grace, thought_tokens(PROCESSOR.codec))
    assert torch.equal(whole[:, :-1] >= 0, mask) and torch.equal(whole[:, :-1][mask], ids[:, 1:][mask])
    for row, start in enumerate(opened.tolist()):
        inside, thought = start, 0
        for token in ids[row, 1:].tolist():
            if token in (THINK, CLOSE):
                inside = token == THINK
            elif inside:
                thought += 1
        if budget[row] >= 0:
            assert thought <= budget[row] + grace[row] + 1


def test_wrong_limits_are_refused():
    ids = torch.tensor([[A, THINK], [A, B]])
    with pytest.raises(OmniInputError, match="3 values of reasoning_budget for 2 prompts"):
        ReasoningBudget(PROCESSOR, ids, [1, 2, 3], 1)
    with pytest.raises(OmniInputError, match="give 0 or more"):
        ReasoningBudget(PROCESSOR, ids, 1, -1)
    with pytest.raises(ValueError, match="no multiple"):
        ReasoningBudget(PROCESSOR, ids, 0, 1)(ids[:1].repeat(3, 1), torch.zeros(3, len(TOKENIZER)))


def test_marks_are_read_from_the_vocabulary():
    tokens = thought_tokens(PROCESSOR.codec)
    assert thought_tokens(PROCESSOR.codec) is tokens and tokens.newline == LINE
    lines = {i for i in range(len(TOKENIZER)) if "\n" in TOKENIZER.decode([i])}
    assert set(tokens.has_newline.nonzero().flatten().tolist()) == lines == {LINE, LINES}
    ends = set(tokens.ends_sentence.nonzero().flatten().tolist())
    assert {STOP, CJK, PROCESSOR.encode("!")[0], PROCESSOR.encode("?")[0]} == ends


# ------------------------------------------------------------------------------------------------------ room


def test_the_papers_setting_fits_as_it_is():
    assert fit_budget(13_312, 1024, 16_384) == (13_312, 1024, None)
    assert fit_budget(16_384, 1024, 20_480) == (16_384, 1024, None)  # the model card's


def test_the_answer_always_has_room():
    for limit in (1, 2, 3, 10, 64, 512, 16_384):
        for budget in (0, 1, 50, 400, 20_000):
            for grace in (0, 1, 100, 1024):
                fitting, fitting_grace, note = fit_budget(budget, grace, limit)
                room = max(2, limit // 8)
                assert 0 <= fitting <= budget and 0 <= fitting_grace <= grace
                assert fitting + fitting_grace <= max(0, limit - room)
                assert (note is None) == (fitting + fitting_grace == budget + grace)
                if note:  # nothing is lowered further than needed
                    assert fitting + fitting_grace == max(0, limit - room)
                    assert f"lowered to {fitting} and {fitting_grace}" in note
    assert fit_budget(200, 1024, 512)[:2] == (200, 248)
    assert fit_budget(90, 5, 100, answer_room=50)[:2] == (45, 5)


def test_defaults_come_from_the_checkpoint(model, monkeypatch):
    assert reasoning_limits(model, 512) == (None, 1024, None)
    assert reasoning_limits(model, 8192, 100) == (100, 1024, None)
    model.generation_config.reasoning_budget, model.generation_config.reasoning_grace = 16_384, 512
    try:
        assert reasoning_limits(model, 20_480) == (16_384, 512, None)
        budget, grace, note = reasoning_limits(model, 16_384)
        assert (budget, grace) == (13_824, 512) and "lowered to 13824 and 512" in note
        assert reasoning_limits(model, 512, -1)[0] is None and reasoning_limits(model, 512, 7, 3) == (7, 3, None)
        ids = torch.tensor([[A, *OPEN]])
        (limit,) = generation_options(model, PROCESSOR, 20_480, prompt_ids=ids)["logits_processor"]
        assert (int(limit.budget_B), int(limit.grace_B)) == (16_384, 512)
        assert "logits_processor" not in generation_options(model, PROCESSOR, prompt_ids=ids, reasoning_budget=-1)
    finally:
        del model.generation_config.reasoning_budget, model.generation_config.reasoning_grace
    with pytest.raises(OmniInputError, match="grace"):
        reasoning_limits(model, 512, 1, -1)


# ------------------------------------------------------------------------------------------------------ nano


@pytest.fixture(scope="module")
def nano():
    return load("nano")


SUM = "What is 3 + 4 + 2? Think step by step."


def test_streams_and_batches_take_the_budget(nano):
    model, processor = nano
    inputs = encode(model, processor, [user_message(SUM)], True)
    free = list(stream_answer(*nano, inputs, max_new_tokens=64))[-1][1]
    assert len(free["reasoning"]) > 8 and "thought_cut" not in free
    results = {}
    for budget in (0, 3, 60):
        options = {"max_new_tokens": 64, "reasoning_budget": budget, "reasoning_grace": 1}
        results[budget] = list(stream_answer(*nano, inputs, **options))[-1][1]
        assert results[budget]["reasoning_budget"] == min(budget, 55)
    assert results[0]["reasoning"] == "" and results[0]["answer"] and results[0]["thought_cut"]
    assert free["reasoning"].startswith(results[3]["reasoning"]) and results[3]["thought_cut"]
    assert 0 < len(results[3]["reasoning"]) < len(free["reasoning"])
    assert not results[60]["thought_cut"] and results[60]["reasoning"] == free["reasoning"]
    questions = [[user_message(SUM)], [user_message("Copy: banana split")]]
    for budget in (0, 3):
        answers = answer_batch(*nano, questions, True, 64, reasoning_budget=budget, reasoning_grace=1)
        assert answers[0] == results[budget]["answer"]


def test_command_line(nano, capfd, monkeypatch):
    import modeling_omni.inference as inference

    monkeypatch.setattr(inference, "load", lambda *options: nano)
    flags = ["--think", "--reasoning-budget", "3", "--reasoning-grace", "1", "--max-new-tokens", "64"]
    assert infer.main(["ask", *flags, "--json", SUM]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["thought_cut"] is True and result["reasoning_budget"] == 3
    assert infer.main(["ask", *flags[:2], "90", "--max-new-tokens", "64", SUM]) == 0
    assert "note: a reasoning budget of 90 tokens and 1024 of grace" in capfd.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/budget 0\n{SUM}\n/budget x\n/budget -1\n{SUM}\n"))
    assert infer.main(["chat", "--think", "--max-new-tokens", "64"]) == 0
    err = capfd.readouterr().err
    assert "reasoning budget 0\n" in err and "write /budget and a number" in err and "budget unlimited" in err
    assert err.count("(the reasoning budget of 0 tokens ended the thought)") == 1 and err.count("reasoning:") == 1
