"""The demo behind its page: sessions, stopping, limits, deletion, what the model saw; on nano, without a browser."""

import asyncio
import json
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

import app
from modeling_omni import OmniInputError, demo_guard
from modeling_omni.conversation import ConversationCache, media_of
from modeling_omni.demo import EXAMPLES, Demo, Session, Settings, count_line, media_kind
from modeling_omni.demo_guard import MAX_BODY_BYTES, Guard
from modeling_omni.demo_views import draw_grid, draw_mel, seen_html, unpatchify
from modeling_omni.generation_rows import Row, generate_rows
from modeling_omni.image_processing_omni import resize_frames
from modeling_omni.inference import encode, load, open_media, stream_answer, user_message
from modeling_omni.limits import VARIABLE, DemoLimits, server_media_limits
from modeling_omni.lora import add_lora, save_adapter

RED = "Where is the red circle?"
LONG = "la " * 40  # nano thinks about this until it is cut off


@pytest.fixture(scope="module")
def nano():
    return load("nano")


@pytest.fixture
def demo(nano, tmp_path):
    demo = Demo(*nano, uploads=str(tmp_path))
    yield demo
    demo.close()


def upload(demo: Demo, name: str, folder: str = "0") -> str:
    """A shipped file where the page would put it."""
    path = demo.uploads / folder / name
    path.parent.mkdir(exist_ok=True)
    shutil.copy(EXAMPLES / name, path)
    return str(path)


def ask(session: Session, text: str, files=(), **settings) -> str:
    for _ in session.ask(text, list(files), replace(session.demo.defaults, **settings)):
        pass
    assert session.problem is None
    return session.shown()[-1]["content"]


def until(true, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_answers_are_those_of_the_library_and_say_what_they_cost(demo, nano):
    session, files = demo.session("a"), [upload(demo, "shapes.png")]
    counts = session.count(RED, files, demo.defaults)
    answer = ask(session, RED, files)
    inputs = encode(*nano, [user_message(RED, [open_media("image", files[0])])])
    assert answer == list(stream_answer(*nano, inputs))[-1][1]["answer"] == "top right"
    assert counts["prompt"] == inputs["input_ids"].shape[1] and counts["image"] == 9
    assert count_line(counts).startswith(f"This message: {counts['total']} tokens = {counts['text']} text + 9 image.")
    numbers = session.exchanges[-1].running.statistics()
    assert numbers["prompt_tokens"] == counts["prompt"] and 0 < numbers["first_token_seconds"] < 120
    assert numbers["tokens"] == 4 and numbers["tokens_per_second"] > 0 and numbers["memory"]["process"] > 2**27
    assert "first token" in session.note and "tokens/s" in session.note and "GiB" in session.note
    roles = [message["role"] for message in session.shown()]
    assert roles == ["user", "user", "assistant"] and session.shown()[0]["content"]["path"] == files[0]


def test_thoughts_have_a_title_and_a_time_and_go_on_from_the_cache(demo):
    session = demo.session("a")
    states = []
    for _ in session.ask("What is 47 + 38?", [], replace(demo.defaults, thinking=True)):
        states += [m["metadata"]["status"] for m in session.shown() if m.get("metadata")]
    thought, answer = session.shown()[-2:]
    assert states[0] == "pending" and states[-1] == "done" and thought["metadata"]["title"] == "Thinking"
    assert thought["metadata"]["duration"] > 0 and thought["content"] and answer["content"] == "85"
    ask(session, "Copy: abc")
    assert session.exchanges[-1].running.statistics()["cached_tokens"] > 0
    assert session.chat.messages[1]["reasoning_content"] == thought["content"]


def test_retry_edit_undo_and_clear(demo):
    session, files = demo.session("a"), [upload(demo, "shapes.png")]
    ask(session, RED, files)
    ask(session, "Copy: abc")
    for _ in session.retry(1, demo.defaults):  # its text: the second of the shown messages
        pass
    assert len(session.exchanges) == 1 and session.shown()[-1]["content"] == "top right"
    ask(session, "Copy: abc")
    for _ in session.edit(0, "What colour is the star?", demo.defaults):
        pass
    assert [m["content"] for m in session.shown()[1:]] == ["What colour is the star?", "blue"]
    assert session.undo(2) == {"text": "What colour is the star?", "files": files} and session.shown() == []
    assert session.chat.messages == []
    with pytest.raises(OmniInputError, match="not there any more"):
        session.retry(5, demo.defaults)
    ask(session, RED, files)
    session.clear()
    assert session.shown() == [] and session.chat.messages == [] and session.seen() is None
    assert not (demo.uploads / "0").exists()


def test_stop_ends_the_model_and_keeps_what_was_written(demo):
    session = demo.session("a")
    settings = replace(demo.defaults, thinking=True, max_new_tokens=2000)
    steps = session.ask(LONG, [], settings)
    while session.running is None or session.running.tokens < 5:
        next(steps)
    running = session.running
    session.stop()
    for _ in steps:
        pass
    until(lambda: demo.queue.running == 0)
    written = len(running.row.tokens)
    assert running.row.finish_reason == "interrupted" and 5 <= written < 1000
    time.sleep(0.1)
    assert len(running.row.tokens) == written  # the model does nothing more
    assert "stopped" in session.note and len(session.chat.messages) == 2 and session.draft is None


def test_a_page_that_closes_stops_the_model_and_leaves_no_message(demo):
    session = demo.session("a")
    steps = session.ask(LONG, [], replace(demo.defaults, thinking=True, max_new_tokens=2000))
    while session.running is None:
        next(steps)
    row = session.running.row
    steps.close()  # what gradio does when the browser has left
    until(lambda: row.finish_reason is not None or not demo.queue.waiting)
    until(lambda: demo.queue.running == 0)
    assert len(row.tokens) < 1000 and session.shown() == [] and not session.busy.locked()


def test_a_prompt_that_is_read_can_be_stopped(nano):
    model, processor = nano
    inputs = encode(model, processor, [user_message(LONG)])
    asked = []

    def stopped():
        asked.append(True)
        return len(asked) > 2  # in the third piece

    rows = [Row(inputs, 4, stopped=stopped), Row(encode(model, processor, [user_message("Copy: abc")]), 4)]
    generate_rows(model, processor, rows, prefill_chunk_size=64, conversations=ConversationCache())
    assert rows[0].finish_reason == "interrupted" and rows[0].tokens == []
    assert rows[1].tokens and rows[1].finish_reason == "stop"


def test_a_message_without_an_answer_is_given_back(demo):
    session, files = demo.session("a"), [upload(demo, "shapes.png")]
    ask(session, "Copy: abc")
    broken = demo.uploads / "1" / "broken.png"
    broken.parent.mkdir()
    broken.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    for text, attached, problem in (
        (RED, [str(broken)], "broken.png: is not an image"),
        ("", files, "there is no question"),
        (RED, ["/etc/hostname"], "not here any more"),
        (RED, [str(demo.uploads / "0" / "..")], "not here any more"),
        (RED, files * 9, "9 files are attached; the limit is 8"),
        ("x" * 20_001, [], "20,001 characters; the limit is 20,000"),
    ):
        for _ in session.ask(text, attached, demo.defaults):
            pass
        assert problem in session.problem and "/" not in session.problem
        assert session.draft == {"text": text, "files": attached}
        assert len(session.exchanges) == 1 and len(session.chat.messages) == 2 and not session.busy.locked()
    assert ask(session, RED, files) == "top right"


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": 3.0}, {"top_p": 0.0}, {"max_new_tokens": 0}, {"max_new_tokens": 10**6}, {"seed": -1},
     {"frames": 10**5}, {"max_patches": 3}, {"pruning_rate": 1.0}, {"system": "x" * 20_001},
     {"temperature": float("nan")}, {"reasoning_budget": -2}],
)  # fmt: skip
def test_settings_that_no_control_can_have_are_refused(demo, wrong):
    with pytest.raises(OmniInputError, match=f"{next(iter(wrong))} cannot be"):
        demo.session("a").count("hello", [], replace(demo.defaults, **wrong))


def test_sessions_know_nothing_of_each_other_and_leave_nothing(demo):
    first, second = demo.session("first"), demo.session("second")
    shared = upload(demo, "shapes.png")
    own = upload(demo, "word.png", "1")
    ask(first, RED, [shared])
    ask(first, "Read the word.", [own])
    ask(second, RED, [shared])
    assert second.exchanges[-1].running.statistics()["cached_tokens"] == 0  # not even from an equal prompt
    assert len(second.shown()) == 3
    store = demo.queue.conversations
    assert {scope for scope, _ in store.features} == {"first", "second"}
    demo.close_session("first")
    until(lambda: {scope for scope, _ in store.features} == {"second"})
    assert {prefix.scope for prefix in store.prefixes} == {"second"}
    assert not (demo.uploads / "1").exists() and (demo.uploads / "0" / "shapes.png").exists()
    demo.close_session("second")
    assert list(demo.uploads.iterdir()) == []
    until(lambda: not store.features and not store.prefixes)


def test_limits_of_people_turns_and_media(nano, tmp_path):
    limits = DemoLimits(sessions=2, turns=1, waiting=1, idle_seconds=1e6)
    limits.media.max_decoded_bytes = 30_000
    demo = Demo(*nano, uploads=str(tmp_path), limits=limits)
    try:
        a = demo.session("a")
        demo.session("b")
        a.busy.acquire()
        assert "c" == demo.session("c").key and set(demo.sessions) == {"a", "c"}  # b was idle
        demo.session("c").busy.acquire()
        with pytest.raises(OmniInputError, match="too many people"):
            demo.session("d")
        a.busy.release()
        ask(a, "Copy: abc")
        for _ in a.ask("Copy: abc", [], demo.defaults):
            pass
        assert "1 messages, which is the limit" in a.problem
        a.clear()
        for _ in a.ask(RED, [str(EXAMPLES / "shapes.png"), str(EXAMPLES / "motion.mp4")], demo.defaults):
            pass
        assert "(MediaLimits.max_decoded_bytes)" in a.problem and "send fewer" in a.problem
        limits.media.max_decoded_bytes = 40_000  # more than one picture has, and less than two
        limits.turns = 2
        ask(a, RED, [str(EXAMPLES / "shapes.png")])
        for _ in a.ask(RED, [str(EXAMPLES / "word.png")], demo.defaults):
            pass
        assert "of a conversation" in a.problem and "(MediaLimits.max_decoded_bytes)" in a.problem
        demo.sessions["c"].busy.release()
        limits.decoded_bytes = 40_000
        for _ in demo.session("c").ask(RED, [str(EXAMPLES / "word.png")], demo.defaults):
            pass
        assert "(DemoLimits.decoded_bytes)" in demo.session("c").problem
        a.clear()
        ask(demo.session("c"), RED, [str(EXAMPLES / "word.png")])
        limits.idle_seconds = 0.0
        demo.session("a")
        assert set(demo.sessions) == {"a"}
    finally:
        demo.close()


def test_limits_of_the_environment_and_of_the_command_line(nano, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "timeout=7 max_image_side=60 allow_paths=false")
    options = app.build_parser().parse_args(
        ["--limit", "max_image_side=90", "--max-file-mb", "3", "--max-waiting", "2"]
    )
    limits = app.given_limits(options)
    expected = replace(server_media_limits(), max_image_side=90, max_bytes=3 * 2**20, allow_paths=True)
    assert limits.media == expected and expected.timeout == 7 and limits.waiting == 2
    demo = Demo(*nano, uploads=str(tmp_path), limits=limits)
    try:
        with pytest.raises(OmniInputError, match=r"^shapes.png: .*MediaLimits.max_image_side"):
            demo.session("a").count(RED, [upload(demo, "shapes.png")], demo.defaults)
    finally:
        demo.close()
    options.limit = ["no_such=1"]
    with pytest.raises(OmniInputError, match="known: max_bytes"):
        app.given_limits(options)


def test_time_of_an_answer_is_limited_and_waiting_too(nano, tmp_path):
    demo = Demo(*nano, uploads=str(tmp_path), limits=DemoLimits(seconds=0.0))
    try:
        session = demo.session("a")
        for _ in session.ask("Copy: abc", [], demo.defaults):
            pass
        assert session.problem == "the model was busy for too long; try again" and session.draft["text"] == "Copy: abc"
    finally:
        demo.close()


def test_compare_asks_both_sides_without_what_was_said(demo):
    session = demo.session("a")
    ask(session, "Copy: abc")
    thinking = replace(demo.defaults, thinking=True, reasoning_budget=8)
    question = "What is 47 + 38?"
    for sides in demo.compare(session, question, [], (demo.defaults, thinking)):  # noqa: B007
        pass
    plain, thought = (side.running.statistics() for side in sides)
    assert plain["prompt_tokens"] < 60 and plain["cached_tokens"] == thought["cached_tokens"] == 0
    assert [m["role"] for m in sides[0].shown()] == ["assistant"] and len(sides[1].shown()) == 2
    assert all("tokens" in side.note for side in sides) and len(session.exchanges) == 1
    with pytest.raises(OmniInputError, match="there is no question"):
        list(demo.compare(session, "", [], (demo.defaults, thinking)))
    assert not session.busy.locked()


# ------------------------------------------------------------------------------------------------------ what was seen


def test_pictures_come_back_out_of_their_patches(nano):
    front = nano[1].image_processor
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
    h, w = front.grid(70, 90)
    patches = front.patches([(pixels, h, w)])
    found = unpatchify(patches, (1, h, w), front.patch_size, front.norm_mean, front.norm_std)
    expected = resize_frames(torch.from_numpy(pixels)[None], h * 16, w * 16)[0].permute(1, 2, 0).clamp(0, 255).numpy()
    assert np.abs(found[0] - expected).max() <= 0.51


def test_frames_tokens_and_sounds_that_the_model_read_are_drawn(demo):
    session = demo.session("a")
    files = [str(EXAMPLES / name) for name in ("shapes.png", "motion_sound.mp4", "digits.wav")]
    ask(session, "What colour moves and what word is said?", files, pruning_rate=0.45, max_patches=16)
    messages, inputs, kept = session.seen()
    video = next(medium for medium in media_of(inputs, 2) if medium.keep is not None)
    assert len(kept[video.digest]) == video.keep < inputs["video_grid_thw"].prod() // 4
    page = seen_html(demo.processor, messages, inputs, kept)
    for text in ("<h3>shapes.png</h3>", "read at 64 x 64", "frame 1 at 0.00 s", "<h3>sound of motion_sound.mp4</h3>"):
        assert text in page
    counts = [int(part.rsplit(" ", 1)[1]) for part in page.split(" of 4 tokens kept</figcaption>")[:-1]
              for part in [part.rsplit("\u00b7", 1)[1]]]  # fmt: skip
    assert sum(counts[::2]) == video.keep and counts[0] == 4  # both frames of a tubelet share its tokens
    assert page.count("mel spectrogram of") == 2 and page.count("<img") == 1 + len(counts) + 2
    messages[-1]["content"][0]["name"] = "<script>.png"
    assert "<script>" not in seen_html(demo.processor, messages, inputs, {})
    assert "which ones is not known" in seen_html(demo.processor, messages, inputs, {})


def test_dropped_tokens_are_dark_and_kept_ones_framed():
    kept = np.array([[True, False], [False, True]])
    drawn = np.asarray(draw_grid(np.full((64, 64, 3), 200, np.uint8), (2, 2), kept)).astype(int)
    half = drawn.shape[0] // 2
    middles = [drawn[y, x].mean() for y in (half // 2, half + half // 2) for x in (half // 2, half + half // 2)]
    assert middles[0] == middles[3] == 200 and middles[1] == middles[2] < 60
    assert drawn[2, half // 2, 1] > drawn[2, half // 2, 0] + 50  # green
    assert draw_mel(np.random.default_rng(0).normal(size=(5000, 80)).astype(np.float32)).size == (1600, 160)


# ------------------------------------------------------------------------------------------------------ around the page


def test_kinds_of_files_and_settings_of_the_page():
    assert [media_kind(f"x{end}") for end in (".PNG", ".webp", ".mp4", ".webm", ".wav", ".mp3")] == [
        "image", "image", "video", "video", "audio", "audio"]  # fmt: skip
    with pytest.raises(OmniInputError, match="not a picture, video or sound"):
        media_kind("notes.txt")
    values = [True, 64, 128, 0, 0, 0.5, False, 0.6, 0.95, None, "Be brief."]
    assert app.settings_of(values) == Settings(True, 64, 128, 0.6, 0.95, 0, None, None, 0.5, False, "Be brief.")


def test_an_adapter_of_our_own_answers_and_a_broken_one_is_refused(tmp_path, nano, capsys):
    """Trained on one sentence, saved, and loaded as `--adapter` does."""
    model, processor = load("nano")
    adapted = add_lora(model, {"presets": ["attention_mamba", "routed_experts"], "r": 4, "alpha": 16}).train()
    row = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "it works"}]
    inputs = processor.apply_chat_template(
        row, tokenize=True, return_tensors="pt", return_labels=True, enable_thinking=False
    )
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(40):
        loss = adapted(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.02:
            break
    save_adapter(adapted, tmp_path / "said")
    loaded = app.load_model(app.build_parser().parse_args(["--adapter", f"{tmp_path}/said/"]))
    for (model, processor, name), expected in ((loaded, True), ((*nano, "nano"), False)):
        demo = Demo(model, processor, name)
        try:
            assert (ask(demo.session("a"), "Say it.", thinking=False) == "it works") == expected
            assert ("<b>nano + said</b>" in app.head(demo)) == expected
        finally:
            demo.close()
    weights = tmp_path / "said" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert app.main(["--adapter", str(tmp_path / "said"), "--port", "0"]) == 2
    assert "adapter_model.safetensors cannot be read" in capsys.readouterr().err


def test_exposed_hosts_need_a_password(capsys, monkeypatch):
    monkeypatch.delenv("OMNI_PASSWORD", raising=False)
    assert app.main(["--host", "0.0.0.0"]) == 2 and "OMNI_PASSWORD" in capsys.readouterr().err
    monkeypatch.setenv("OMNI_PASSWORD", "short")
    assert app.main(["--host", "0.0.0.0"]) == 2


def test_a_wrong_password_holds_nobody_else_up():
    async def all_at_once():
        check = app.login_of("p\u00e4ssword")
        wrong = asyncio.create_task(check("ann", "password"))
        await asyncio.sleep(0)
        assert await check("bob", "p\u00e4ssword") and not wrong.done()
        assert not await wrong

    asyncio.run(all_at_once())


def request(guard: Guard, path="/", host=b"127.0.0.1:7860", body=(b"",), **headers) -> tuple[int, dict, bytes]:
    """Status, headers and body of one request through the guard, as an ASGI server would make it."""
    pieces, sent = list(body), []

    async def receive():
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def send(message):
        sent.append(message)

    named = [(b"host", host)] + [(name.replace("_", "-").encode(), value) for name, value in headers.items()]
    asyncio.run(guard({"type": "http", "path": path, "headers": named}, receive, send))
    return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"]


async def echo(scope, receive, send):
    body, more = b"", True
    while more:
        message = await receive()
        more = message["type"] == "http.request" and message["more_body"]
        body += message.get("body", b"")
    gone = message["type"] == "http.disconnect"
    await send({"type": "http.response.start", "status": 499 if gone else 200, "headers": []})
    await send({"type": "http.response.body", "body": b"" if gone else body})


def test_guard_of_hosts_sizes_and_room(tmp_path):
    guard = Guard(echo, ("127.0.0.1", "localhost", "::1"), str(tmp_path), disk_bytes=3000, file_bytes=1000, files=2)
    status, headers, body = request(guard, body=(b"a", b"b"))
    assert (status, body) == (200, b"ab") and b"frame-ancestors 'none'" in headers[b"content-security-policy"]
    assert request(guard, host=b"[::1]:7860")[0] == 200 and request(guard, host=b"localhost")[0] == 200
    assert request(guard, host=b"evil.example:7860")[0] == 403 and request(guard, host=b"")[0] == 403
    assert request(guard, content_length=str(MAX_BODY_BYTES + 1).encode())[0] == 413
    assert request(guard, content_length=b"-1")[0] == 413
    assert request(guard, body=(b"x" * MAX_BODY_BYTES, b"x"))[0] == 499  # without a length, cut off
    upload = "/gradio_api/upload"
    assert request(guard, upload, content_length=b"2000")[0] == 200
    assert request(guard, upload, content_length=str(MAX_BODY_BYTES + 2001).encode())[0] == 413
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "old").write_bytes(bytes(1500))
    assert request(guard, upload, content_length=b"2000")[0] == 507
    assert request(Guard(echo, None, str(tmp_path), 1, 1, 1), host=b"any.example")[0] == 200
    for path in ("file=http://a.example/b", "file=HTTPS://a.example/b", "proxy=https://a.example/b", "deep_link"):
        assert request(guard, f"/gradio_api/{path}")[0] == 404


def test_uploads_share_the_room_and_those_that_break_off_leave_nothing(tmp_path, monkeypatch):
    inside, go_on = asyncio.Event(), asyncio.Event()

    async def stores(scope, receive, send):
        (tmp_path / "tmp1").write_bytes(b"half")  # as gradio does while it comes
        inside.set()
        if scope["path"] == "/slow/upload":
            await go_on.wait()
        await echo(scope, receive, send)

    async def two_at_once():
        guard = Guard(stores, None, str(tmp_path), disk_bytes=3000, file_bytes=1000, files=2)
        status = []

        async def never():
            await asyncio.Event().wait()

        async def send(message):
            status.append(message.get("status"))

        scope = {"type": "http", "path": "/slow/upload", "headers": [(b"content-length", b"2000")]}
        first = asyncio.create_task(guard(scope, never, send))
        await inside.wait()
        await guard(scope | {"path": "/gradio_api/upload"}, never, send)
        assert status[0] == 507 and (tmp_path / "tmp1").exists()
        go_on.set()
        await first
        assert status[2] == 499 and guard.coming == []  # it did not come in time

    monkeypatch.setattr(demo_guard, "UPLOAD_SECONDS", 0.01)
    asyncio.run(two_at_once())
    assert list(tmp_path.iterdir()) == []


def test_half_a_character_and_controls_without_a_number(demo):
    session = demo.session("first")
    assert ask(session, "Copy: a\ud800b")
    json.dumps(session.shown(), ensure_ascii=False).encode()
    assert session.shown()[0]["content"] == "Copy: a?b"
    values = [False, -1, 8, 0, 0, 0.0, True, 0.0, 1.0, 0, ""]
    for place, value in ((1, None), (3, float("nan")), (8, []), (2, float("inf")), (9, "x")):
        with pytest.raises(OmniInputError, match="no number"):
            app.settings_of([*values[:place], value, *values[place + 1 :]])
