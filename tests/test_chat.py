"""The chat's state, the command line around it, and the server and the batch tool going on and giving way; on nano."""

import base64
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_conversation import tower_items
from test_serving import Running

import infer
from modeling_omni import OmniInputError
from modeling_omni.chat import Chat
from modeling_omni.inference import load, stream_answer
from modeling_omni.serving import ServerLimits

MEDIA = Path(__file__).parent.parent / "modeling_omni/nano/examples"


@pytest.fixture(scope="module")
def nano():
    return load("nano")


def say(chat: Chat, line: str, **options) -> tuple[str, list[str]]:
    """The answer to a line (empty: none was asked for) and the notes."""
    notes, messages = chat.take(line)
    if messages is None:
        return "", notes
    turn = chat.prepare(messages)
    stream = stream_answer(chat.model, chat.processor, turn.inputs, conversation=chat.cache, **options)
    result = list(stream)[-1][1]
    return result["answer"], [*notes, *turn.notes, chat.answered(turn, result)]


def test_a_chat_encodes_every_medium_once_and_answers_as_without_a_cache(nano):
    lines = [
        f"/image {MEDIA / 'shapes.png'}", "Where is the red circle?", f"/video {MEDIA / 'motion_sound.mp4'}",
        "What colour moves and what word is said?", "/think on", "What is 3 + 4 + 2? Think step by step.",
        "/think off", "/retry", "/edit Copy: banana split", "Where is the red circle?",
    ]  # fmt: skip
    cached, plain = Chat(*nano), Chat(*nano, cache=None)
    with tower_items(nano[0]) as seen:
        answers, notes = zip(*(say(cached, line) for line in lines))
    assert seen == {"vision": 2, "audio": 1}  # the picture, the frames, the sound
    assert answers == tuple(say(plain, line)[0] for line in lines) and len(set(answers)) > 2
    assert all(answers[i] for i in (1, 3, 5, 7, 8, 9))
    assert ["known" in notes[i][-1] for i in (1, 3, 5, 7, 8, 9)] == [False, True, True, True, True, True]
    assert len(cached.messages) == 8 and cached.turns == plain.turns == 6


def test_commands_that_take_back(nano):
    chat = Chat(*nano)
    for command in ("/retry", "/edit x", "/undo"):
        with pytest.raises(OmniInputError, match="nothing was said yet"):
            chat.take(command)
    say(chat, f"/image {MEDIA / 'shapes.png'}")
    first, _ = say(chat, "Where is the red circle?")
    assert say(chat, "/retry")[0] == first and len(chat.messages) == 2
    say(chat, "/edit Where is the blue square?")
    content = chat.messages[0]["content"]
    assert [part["type"] for part in content] == ["image", "text"] and content[1]["text"] == "Where is the blue square?"
    with pytest.raises(OmniInputError, match="write /edit and"):
        chat.take("/edit")
    say(chat, f"/audio {MEDIA / 'digits.wav'}")
    say(chat, "/retry", max_new_tokens=1)
    assert [part["name"] for part in chat.attached] == ["digits.wav"]  # it waits for a message of its own
    say(chat, "/undo")
    assert chat.messages == [] and chat.turns == 4
    assert say(chat, "/detach")[1] == ["nothing is attached"] and chat.take("") == ([], None)


def test_a_stopped_turn_leaves_the_conversation_as_it_was(nano):
    chat = Chat(*nano)
    turn = chat.prepare(chat.take("hello")[1])
    nothing = {"finish_reason": "interrupted", "generated_tokens": 0, "answer": "", "reasoning": "", "seconds": 0.0}
    assert chat.answered(turn, nothing) == "(stopped; this message was not sent)" and chat.messages == []
    part = nothing | {"generated_tokens": 2, "answer": "he"}
    assert chat.answered(turn, part).startswith("(stopped; prompt ") and chat.messages[-1]["content"] == "he"


def test_media_that_were_lowered_stay_so_and_are_said_once(nano, tmp_path):
    chat = Chat(*nano, max_prompt_tokens=140)  # the two pictures alone would have 128
    for seed, name in enumerate(("a.png", "b.png")):
        pixels = np.random.default_rng(seed).integers(0, 255, (300, 300, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
        say(chat, f"/image {tmp_path / name}")
    with tower_items(nano[0]) as seen:
        _, notes = say(chat, "What is it?", max_new_tokens=1)
        assert [note[:39] for note in notes[:2]] == [f"lowered to fit 140 tokens: image {n}.png: "[:39] for n in "ab"]
        _, notes = say(chat, "And?", max_new_tokens=1)
    assert len(notes) == 1 and "known" in notes[0] and seen["vision"] == 2
    with pytest.raises(OmniInputError, match=r"may have 140 tokens, but \d+ of text"):
        say(chat, "word " * 300)
    assert chat.turns == 2


def test_the_command_line_outlives_a_message_that_is_too_large(nano, monkeypatch, capfd):
    import modeling_omni.inference as inference

    monkeypatch.setattr(inference, "load", lambda *options: nano)
    failing, encode = [True], nano[0].model.get_image_features

    def once(*args, **options):
        if failing.pop() if failing else False:
            raise torch.OutOfMemoryError("16 GiB asked for")
        return encode(*args, **options)

    monkeypatch.setattr(nano[0].model, "get_image_features", once)
    lines = ["Copy: red", f"/image {MEDIA / 'shapes.png'}", "Where is the red circle?", "Where is the red circle?"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    assert infer.main(["chat"]) == 0
    out, err = capfd.readouterr()
    assert "out of memory" in err and out.splitlines()[0] == "red" and len(out.splitlines()) == 2
    assert err.count("(prompt ") == 2


def test_the_command_line_outlives_bytes_that_are_no_text(nano, monkeypatch, capfd):
    import modeling_omni.inference as inference

    monkeypatch.setattr(inference, "load", lambda *options: nano)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"bad \xff\nCopy: red\n"), "utf-8"))
    assert infer.main(["chat"]) == 0
    out, err = capfd.readouterr()
    assert out == "red\n" and "error: text has a lone surrogate" in err


def test_ask_and_batch_say_what_they_lowered(nano, monkeypatch, capfd, tmp_path):
    import modeling_omni.inference as inference

    monkeypatch.setattr(inference, "load", lambda *options: nano)
    clip, question = str(MEDIA / "motion.mp4"), "What moves where?"
    assert infer.main(["ask", "--video", clip, "--json", "--max-prompt-tokens", "60", question]) == 0
    out, err = capfd.readouterr()
    result = json.loads(out)
    assert sum(result["tokens"].values()) <= 60 and "lowered to fit 60 tokens: video motion.mp4: " in err
    assert result["degraded"][0].startswith("video motion.mp4: ") and " frames" in result["items"][0]["size"]
    (tmp_path / "in.jsonl").write_text(
        json.dumps({"id": 1, "prompt": question, "video": clip}) + "\n" + json.dumps({"id": 2, "prompt": "word " * 200})
    )
    out = tmp_path / "out.jsonl"
    assert infer.main(["batch", "--in", str(tmp_path / "in.jsonl"), "--out", str(out), "--max-prompt-tokens", "60"])
    rows = {row["id"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert rows[1]["degraded"] == result["degraded"] and rows[1]["answer"] == result["answer"]
    assert "of text, which are never cut" in rows[2]["error"]["message"] and "degraded" not in rows[2]


def test_the_server_goes_on_per_client_and_says_what_it_lowered(nano):
    running = Running(*nano, ServerLimits(max_new_tokens=64), cache_bytes=64 * 1024**2)
    plain = Running(*nano, ServerLimits(max_new_tokens=64), defaults={"max_prompt_tokens": 60})
    whole = Running(*nano, ServerLimits(max_new_tokens=64))
    try:
        messages = [{"role": "user", "content": "Copy: banana split"}]
        first = running.ask(messages=messages, user="a")
        reply = first.choices[0].message.content
        later = [*messages, {"role": "assistant", "content": reply}, {"role": "user", "content": "Copy: red"}]
        second, other = (running.ask(messages=later, user=user) for user in ("a", "b"))
        used = [answer.usage.prompt_tokens_details.cached_tokens for answer in (first, second, other)]
        assert used[0] == used[2] == 0 < used[1]
        texts = {answer.choices[0].message.content for answer in (second, other, whole.ask(messages=later))}
        assert len(texts) == 1
        url = "data:video/mp4;base64," + base64.b64encode((MEDIA / "motion.mp4").read_bytes()).decode()
        parts = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": "What moves where?"}]
        answer = plain.ask(messages=[{"role": "user", "content": parts}])
        assert answer.usage.prompt_tokens <= 60 and answer.degraded[0].startswith("video 1: ")
        assert not hasattr(first, "degraded")
    finally:
        running.close()
        plain.close()
        whole.close()
