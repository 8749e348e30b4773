"""The demo: talk with the model about text, pictures, videos and sounds in a browser.

  python app.py                                the shipped nano model on http://127.0.0.1:7860
  python app.py --model DIR --adapter DIR      another checkpoint, with a LoRA adapter
  OMNI_PASSWORD=... python app.py --host 0.0.0.0

What is behind the page (sessions, limits, queue, drawings) is in modeling_omni/demo*.py.
"""

import argparse
import asyncio
import contextlib
import hmac
import html
import json
import os
import signal
import socket
import sys
import tempfile
import threading

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MIN_PASSWORD = 8  # characters

WELCOME = "### Ask about text, pictures, videos and sound\nAttach or record below, or begin with one of these."
CSS = """
.gradio-container {padding: 0 !important;}
.gradio-container .main.fillable {max-width: 1320px !important; padding: 10px clamp(8px, 1.6vw, 20px) 14px !important;}
.gradio-container .gap, .gradio-container .column {gap: 10px;}
.gradio-container.gradio-container.gradio-container :focus-visible {
  outline: 2px solid var(--primary-600) !important; outline-offset: 1px;}
.gradio-container.gradio-container.gradio-container textarea:focus-visible {outline: none !important;}
.gradio-container .block:has(textarea:focus-visible) {outline: 2px solid var(--primary-600);}
.gradio-container .html-container {padding: 0 !important;}
#head {display: flex; flex-wrap: wrap; align-items: baseline; gap: 2px 12px; padding: 2px;}
#head h1 {font-size: 1.3rem; font-weight: 650; letter-spacing: -0.01em; margin: 0;}
#head span {font-size: .84rem; color: var(--body-text-color-subdued);}
#head b {font-weight: 600; color: var(--body-text-color); background: var(--background-fill-primary);
  border: 1px solid var(--border-color-primary); border-radius: 99px; padding: 1px 9px;}
.tab-container button {padding-inline: clamp(8px, 1.3vw, 16px) !important;}
.tab-container button.selected {color: var(--primary-700) !important;}
.dark .tab-container button.selected {color: var(--primary-400) !important;}
#chat {height: calc(100dvh - 300px) !important; min-height: 330px; border-radius: 14px;}
button[aria-label="Share"] {display: none !important;}
#chat .examples {grid-template-columns: repeat(auto-fit, minmax(240px, 1fr));}
#chat button.example {border: 1px solid var(--border-color-primary); border-radius: 12px; min-width: 0;}
#chat .icon-button-wrapper button {min-width: 24px; min-height: 24px;}
#chat .message-buttons button {min-width: 28px; min-height: 28px;}
.gradio-container button.submit-button {background: var(--primary-700); color: white;}
.gradio-container button.submit-button:hover {background: var(--primary-800);}
.controls .form {border: 0; box-shadow: none;}
.controls > button {min-height: 30px; align-items: center;}
.controls .tab-like-container {height: 30px !important;}
.controls label:has(input[type=checkbox]) {min-height: 28px;}
.line {font-size: .82rem; line-height: 1.4; color: var(--body-text-color-subdued); padding: 0 6px;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; white-space: pre-line;}
.line:has(> span:empty) {line-height: 0;}
.line .problem {color: #b91c1c; font-weight: 550;}
.dark .line .problem {color: #fca5a5;}
.about {max-width: 86ch;}
.about th, .about td {border-color: var(--border-color-primary) !important; padding: 5px 12px !important;}
.seen {margin: 0 0 26px;}
.seen h3 {margin: 0 0 2px; font-size: 1rem; overflow-wrap: anywhere;}
.seen p {margin: 0 0 10px; font-size: .84rem; color: var(--body-text-color-subdued);}
.seen-grid {display: grid; grid-template-columns: repeat(auto-fill, minmax(min(230px, 100%), 1fr)); gap: 14px;}
.seen figure {margin: 0; max-width: 560px;}
.seen-grid figure:only-child {width: min(420px, 100vw - 40px);}
.seen-wide figure {max-width: 860px;}
.seen-wide img {height: 190px; object-fit: fill;}
.seen img {width: 100%; border-radius: 8px; display: block;}
.seen figcaption {font-size: .79rem; margin-top: 4px; color: var(--body-text-color-subdued);}
@media (max-width: 720px) {
  #chat {height: calc(100dvh - 290px) !important; min-height: 300px;}
  #chat .examples {grid-template-columns: 1fr 1fr; gap: 8px; padding: 6px;}
  #chat .example-content {padding: 8px; gap: 4px;}
  #head h1 {font-size: 1.08rem;}
  .seen-grid {grid-template-columns: repeat(auto-fill, minmax(min(150px, 100%), 1fr));}
}
"""

# gradio gives pictures of a conversation no name
NAMES = """() => new MutationObserver(() => document.querySelectorAll('[role=log] img').forEach(
  e => { e.alt ||= decodeURIComponent(e.src.split('/').pop()) || 'picture'; }
)).observe(document.body, {childList: true, subtree: true})"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="app.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="nano", help="nano (shipped), a checkpoint folder or a Hugging Face id")
    parser.add_argument("--adapter", metavar="DIR", help="LoRA adapter that PEFT or train.py has saved")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
                        help="auto: as stored (nano on a CPU: float32)")  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto (all GPUs, else CPU), cpu, cuda, cuda:1, mps ...")
    parser.add_argument("--attn", choices=("eager", "sdpa", "flash_attention_2", "flash_attention_3"),
                        help="attention kernel (default: the best that transformers finds)")  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1",
                        help="address to listen on (default: 127.0.0.1); others need a password in OMNI_PASSWORD, at "
                        f"least {MIN_PASSWORD} characters (any user name), and TLS in front on a network that "
                        "is not yours")  # fmt: skip
    parser.add_argument("--port", type=int, default=7860, help="default: 7860; 0: a free one")
    parser.add_argument("--max-file-mb", type=int, metavar="N", help="size of a file (default: 64)")
    parser.add_argument("--limit", action="append", default=[], metavar="NAME=VALUE",
                        help="another limit on media, such as max_video_seconds=120; all of them: "
                        "modeling_omni/limits.py; may be repeated")  # fmt: skip
    parser.add_argument("--max-seconds", type=float, default=300.0, metavar="S",
                        help="time of an answer, waiting included (default: 300)")  # fmt: skip
    parser.add_argument("--max-waiting", type=int, default=16, metavar="N",
                        help="answers that may wait for the model (default: 16)")  # fmt: skip
    parser.add_argument("--max-sessions", type=int, default=64, metavar="N", help="browser tabs (default: 64)")
    parser.add_argument("--cache-mb", type=int, default=1024, metavar="N",
                        help="memory for states of conversations, and as much for media (default: 1024)")  # fmt: skip
    return parser


# ------------------------------------------------------------------------------------------------------ words


def line(text: str, problem: bool = False) -> str:
    """A line of the page; problems are read out at once by a screen reader."""
    role, kind = ("alert", "problem") if problem else ("status", "note")
    return f'<div class="line" role="{role}"><span class="{kind}">{html.escape(text)}</span></div>'


def head(demo) -> str:
    parameters = sum(p.numel() for p in demo.model.parameters())
    size = f"{parameters / 1e9:.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"
    kind = str(next(demo.model.parameters()).dtype).removeprefix("torch.")
    return (
        f'<div id="head"><h1>Nemotron 3 Nano Omni</h1><span><b>{html.escape(demo.name)}</b> {size} parameters, {kind} '
        f"on {html.escape(str(demo.model.device))}. Text, pictures, videos and sound in, text out.</span></div>"
    )


def about(demo) -> str:
    """Markdown: what the model is for, its limits, and the limits of this page."""
    limits, context = demo.limits, demo.model.config.get_text_config().max_position_embeddings
    media = limits.media
    if context < 32_768:
        model = (
            "**nano** shows how the model works; it is no assistant. It was trained from nothing on drawn and "
            "synthesised data and knows only what its tasks are about: coloured shapes and where they are, counting, "
            "words and digits in pictures, spoken digits and a few words, clips in which something moves, small sums, "
            "copying. Held out, it is right in 80 to 100 % of most of them; weak are lines of text (53 %), documents "
            "of several pages (54 %), buttons (69 %), words in unseen fonts (73 %) and counting (78 %). It answers "
            "best when a conversation is about one thing: clear it before another picture. Photographs, free talk and "
            "knowledge of the world are beyond it."
        )
    else:
        model = (
            "The model card of the released 30B-A3B checkpoint names these limits: English in and out; context of "
            "262,144 tokens; sound of up to an hour at 8 kHz or more (wav, mp3); clips of up to two minutes, read at 2 "
            "frames a second and at most 256 frames (1080p: 1 a second, 128 frames); text is all it writes. Suggested "
            "with thinking: temperature 0.6, top-p 0.95; without: greedy."
        )
    rows = {
        "the model's context": f"{context:,} tokens; longer prompts lose frames and pixels, never text or sound",
        "a file": f"{media.max_bytes / 2**20:.0f} MiB; {limits.files} files a message",
        "a picture": f"{media.max_image_pixels / 1e6:.0f} megapixels",
        "a video or sound": f"{media.max_video_seconds / 60:.0f} minutes; {media.max_video_frames} frames are kept",
        "a message": f"{limits.characters:,} characters; {limits.turns} messages a conversation",
        "an answer": f"{limits.new_tokens:,} tokens and {limits.seconds:.0f} seconds, waiting included",
        "people": f"{limits.sessions} tabs, {limits.waiting} answers waiting; those who wait take turns",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        f"### The model\n\n{model}\n\nEvery model of this kind makes things up, with confidence, and repeats what its "
        "data had wrong. **There is no safety filter here.** Do not let it decide about people, health, law or money."
        f"\n\n### Limits\n\n| what | how much |\n|---|---|\n{table}\n\n### Your data\n\nFiles stay on this machine. "
        "They, and what the model kept of them, are deleted when you clear the conversation or close or reload the "
        "page. Nothing is logged, nothing is sent anywhere: no share link, no telemetry, and the page loads nothing "
        "from elsewhere. Other tabs and other people cannot see what you do here.\n\nUnofficial; not affiliated with "
        "NVIDIA. Weights are under the licence of their checkpoint."
    )


def examples() -> list[dict]:
    from modeling_omni.demo import EXAMPLES

    found = {}  # one question a file
    for row in json.loads((EXAMPLES / "examples.json").read_text()):
        files = [str(EXAMPLES / row[kind]) for kind in ("image", "video", "audio") if kind in row]
        found[files[0]] = {"text": row["question"], "files": files}
    return [
        *found.values(),
        {"text": "What is 47 + 38?", "display_text": "What is 47 + 38? (thinks first)", "files": []},
    ]


# ------------------------------------------------------------------------------------------------------ page


def controls(gr, demo, defaults, side: str = "") -> list:
    """The components of one set of settings, in the order of `settings_of`."""
    limits, front = demo.limits, demo.processor.image_processor
    name = f" {side}" if side else ""
    with gr.Accordion(f"Thinking and length{name}", open=True, elem_classes="controls"):
        thinking = gr.Checkbox(defaults.thinking, label=f"Think before the answer{name}")
        budget = gr.Slider(-1, limits.new_tokens, defaults.reasoning_budget, step=1, label=f"Thinking budget{name}",
                           info="tokens of thought; -1: no limit")  # fmt: skip
        length = gr.Slider(1, limits.new_tokens, defaults.max_new_tokens, step=1, label=f"New tokens at most{name}",
                           info="of thought and answer")  # fmt: skip
    with gr.Accordion(f"Pictures, videos, sound{name}", open=not side, elem_classes="controls"):
        frames = gr.Slider(0, limits.media.max_video_frames, 0, step=1, label=f"Frames of a video{name}",
                           info="0: 2 a second, 256 at most")  # fmt: skip
        patches = gr.Slider(0, max(front.max_num_patches, front.min_num_patches), 0, step=16,
                            label=f"Patches at most{name}",
                            info="of a picture or frame, four a token; 0: as the model likes")  # fmt: skip
        evs = gr.Slider(0, 0.95, defaults.pruning_rate, step=0.05, label=f"EVS: video tokens to drop{name}",
                        info="share, of those that repeat")  # fmt: skip
        sound = gr.Checkbox(True, label=f"Hear the sound of videos{name}")
    with gr.Accordion(f"Sampling{name}", open=False, elem_classes="controls"):
        temperature = gr.Slider(0, 2, defaults.temperature, step=0.05, label=f"Temperature{name}",
                                info="0: always the likeliest word")  # fmt: skip
        top_p = gr.Slider(0.05, 1, defaults.top_p, step=0.05, label=f"Top-p{name}")
        seed = gr.Number(0, label=f"Seed{name}", precision=0, minimum=0, maximum=2**32 - 1)
        system = gr.Textbox("", label=f"System prompt{name}", lines=2, max_length=limits.characters)
    return [thinking, budget, length, frames, patches, evs, sound, temperature, top_p, seed, system]


def settings_of(values):
    """Values of `controls` -> Settings."""
    from modeling_omni.demo import Settings
    from modeling_omni.limits import OmniInputError

    thinking, budget, length, frames, patches, evs, sound, temperature, top_p, seed, system = values
    try:
        return Settings(
            bool(thinking), int(budget), int(length), float(temperature), float(top_p), int(seed or 0),
            int(frames) or None, int(patches) or None, float(evs), bool(sound), str(system or ""),
        )  # fmt: skip
    except (TypeError, ValueError, OverflowError) as error:
        raise OmniInputError("a control holds no number; move it") from error


def build(demo):
    """The page, as gradio Blocks."""
    from dataclasses import replace

    import gradio as gr

    from modeling_omni.demo import EXAMPLES, count_line
    from modeling_omni.demo_views import seen_html
    from modeling_omni.media import OmniInputError

    starters, defaults, limits = examples(), demo.defaults, demo.limits
    gr.set_static_paths([EXAMPLES])

    async def no_downloads(url: str, cache_dir: str) -> str:
        raise gr.Error("addresses are not read here; attach a file", print_exception=False)

    # gradio would download, of any size, a file that a message names by an address
    gr.processing_utils.async_ssrf_protected_download = no_downloads

    # ---------------------------------------------------------------------------------------- what events do

    def own(request: gr.Request):
        return demo.session(request.session_hash)

    def box(running: bool, value: dict | None = None):
        """The text box with its stop button or its send button, and what is to stand in it (None: as it is)."""
        given = {} if value is None else {"value": value}
        return gr.MultimodalTextbox(submit_btn=not running, stop_btn=running, **given)

    def answer(request: gr.Request, begin, sent: bool = False):
        """The steps of an answer, `begin(session)`, as conversation, text box and the line below.

        `sent`: the message came from the text box, and goes back there if it gets no answer.
        """
        try:
            session = own(request)
            with contextlib.closing(begin(session)) as steps:
                emptied = {"text": "", "files": []} if sent else None
                for number, _ in enumerate(steps):
                    running = session.running
                    waits = running is not None and running.begun is None and number > 10
                    note = "Waiting: the model answers others first." if waits else session.note
                    yield session.shown(), box(True, emptied) if number == 0 else gr.skip(), line(note)
            draft = session.draft if sent else None
            busy = session.running is not None  # with the next message already
            said = line(session.problem or session.note, bool(session.problem))
            cleared = not (session.exchanges or session.problem or session.draft)  # which has a line of its own
            yield session.shown(), box(busy, draft), gr.skip() if cleared else said
        except OmniInputError as error:
            yield gr.skip(), box(False), line(str(error), True)

    def send(request: gr.Request, value, *chosen):
        text, files = value["text"], value["files"]
        if text.strip() or files:
            yield from answer(request, lambda session: session.ask(text, files, settings_of(chosen)), sent=True)
        else:
            yield gr.skip(), gr.skip(), gr.skip()

    def retry(request: gr.Request, event: gr.RetryData, *chosen):
        index = event.index if isinstance(event.index, int) else event.index[0]
        yield from answer(request, lambda session: session.retry(index, settings_of(chosen)))

    def edit(request: gr.Request, event: gr.EditData, *chosen):
        index = event.index if isinstance(event.index, int) else event.index[0]
        yield from answer(request, lambda session: session.edit(index, str(event.value), settings_of(chosen)))

    def undo(request: gr.Request, event: gr.UndoData):
        try:
            session = own(request)
            taken = session.undo(event.index if isinstance(event.index, int) else event.index[0])
            return session.shown(), box(False, taken), line("")
        except OmniInputError as error:
            return gr.skip(), gr.skip(), line(str(error), True)

    def clear(request: gr.Request):
        own(request).clear()
        return [], line("Cleared; its files are deleted.")

    def stop(request: gr.Request):
        own(request).stop()

    def close(request: gr.Request):
        demo.close_session(request.session_hash)

    def count(request: gr.Request, value, *chosen):
        """The cost of what stands in the text box, before it is sent."""
        if not value or not (value["text"].strip() or value["files"]):
            return line("")
        session = own(request)
        try:
            return line(count_line(session.count(value["text"], value["files"], settings_of(chosen))))
        except OmniInputError as error:
            return line("") if str(error) == session.problem else line(str(error), True)  # it stands below already

    def start(event: gr.SelectData):
        """An example into the text box, with thinking where it needs that."""
        starter = starters[event.index]
        return {name: starter[name] for name in ("text", "files")}, defaults.thinking or not starter["files"]

    def look(request: gr.Request):
        seen = own(request).seen()
        drawn = seen_html(demo.processor, *seen) if seen else ""
        return drawn or line("Nothing yet: ask about a picture, a video or a sound, then come back.")

    def compare(request: gr.Request, value, *chosen):
        """Both sides' conversations and lines, and the text box, which keeps its text."""
        half = len(chosen) // 2
        try:
            session = own(request)
            choices = settings_of(chosen[:half]), settings_of(chosen[half:])
            yield [], line(""), [], line(""), box(True)
            with contextlib.closing(demo.compare(session, value["text"], value["files"], choices)) as steps:
                for a, b in steps:
                    yield a.shown(), line(a.note), b.shown(), line(b.note), gr.skip()
            yield gr.skip(), gr.skip(), gr.skip(), gr.skip(), box(False)
        except OmniInputError as error:
            yield gr.skip(), line(str(error), True), gr.skip(), gr.skip(), box(False)

    # ---------------------------------------------------------------------------------------- what is there

    # not grouped: editing a group that holds a file fails in gradio 6.31 (its page takes every message for text)
    chat_options = {"allow_tags": False, "layout": "bubble", "buttons": ["copy"], "group_consecutive_messages": False}
    typing = {
        "file_types": ["image", "video", "audio"], "file_count": "multiple", "sources": ["upload", "microphone"],
        "show_label": False, "max_lines": 8, "max_plain_text_length": limits.characters, "stop_btn": False,
    }  # fmt: skip
    with gr.Blocks(
        title="Nemotron 3 Nano Omni", analytics_enabled=False, fill_width=True, delete_cache=(600, 7200)
    ) as page:
        gr.HTML(head(demo))
        with gr.Tabs():
            with gr.Tab("Chat"), gr.Row(equal_height=False):
                with gr.Column(scale=7, min_width=320):
                    conversation = gr.Chatbot(
                        label="Conversation", elem_id="chat", editable="user", placeholder=WELCOME, show_label=False,
                        examples=[dict(starter, files=list(starter["files"])) for starter in starters], **chat_options,
                    )  # fmt: skip
                    text = gr.MultimodalTextbox(label="Message", placeholder="Ask, attach, or record", **typing)
                    tally, after = gr.HTML(line("")), gr.HTML(line(""))
                with gr.Column(scale=3, min_width=280):
                    chosen = controls(gr, demo, defaults)
            with gr.Tab("What the model saw") as seen_tab:
                seen = gr.HTML(line(""))
            with gr.Tab("Compare"):
                gr.HTML(
                    line("One question under two settings, one after the other, so that the times can be compared."),
                )
                both = gr.MultimodalTextbox(
                    label="Question for both", placeholder="A question for both sides", **typing
                )
                both_tally, sides = gr.HTML(line("")), []
                with gr.Row(equal_height=False):
                    for side in "AB":
                        with gr.Column(min_width=300):
                            shown = gr.Chatbot(label=f"Answer {side}", height=260, **chat_options)
                            sides.append((shown, gr.HTML(line(""))))
                with gr.Row(equal_height=False):
                    other = replace(defaults, thinking=not defaults.thinking)
                    for side, own_defaults in (("A", defaults), ("B", other)):
                        with gr.Column(min_width=300):
                            sides.append(controls(gr, demo, own_defaults, side))
            with gr.Tab("About"):
                gr.Markdown(about(demo), elem_classes="about")

        quiet = {"api_visibility": "private", "show_progress": "hidden"}
        many = {"concurrency_limit": limits.waiting + limits.batch, "concurrency_id": "answers"}
        each = {"concurrency_limit": limits.sessions}  # these may have to wait for an answer to stop
        outputs = [conversation, text, after]
        text.submit(send, [text, *chosen], outputs, **quiet, **many)
        conversation.retry(retry, chosen, outputs, **quiet, **many)
        conversation.edit(edit, chosen, outputs, **quiet, **many)
        conversation.undo(undo, None, outputs, **quiet, **each)
        conversation.clear(clear, None, [conversation, after], **quiet, **each)
        conversation.example_select(start, None, [text, chosen[0]], **quiet)
        (a, line_a), (b, line_b), chosen_a, chosen_b = sides
        both.submit(compare, [both, *chosen_a, *chosen_b], [a, line_a, b, line_b, both], **quiet, **many)
        for typed, counted, options in ((text, tally, chosen), (both, both_tally, chosen_a)):
            typed.stop(stop, None, None, queue=False, **quiet)
            changes = [component.change for component in (typed, *options)]
            gr.on(changes, count, [typed, *options], counted, trigger_mode="always_last", concurrency_limit=4, **quiet)
        seen_tab.select(look, None, seen, concurrency_limit=limits.decoders, api_visibility="private")
        page.unload(close)
    return page.queue(max_size=8 * limits.waiting, api_open=False)


def given_limits(options):
    """`DemoLimits` with what the options and OMNI_LIMITS say."""
    from modeling_omni.limits import DemoLimits, with_limits

    limits = DemoLimits(
        seconds=options.max_seconds, waiting=options.max_waiting, sessions=options.max_sessions,
        cache_bytes=options.cache_mb * 2**20,
    )  # fmt: skip
    limits.media.max_bytes = options.max_file_mb * 2**20 if options.max_file_mb else limits.media.max_bytes
    with_limits(limits.media, options.limit).allow_paths = True  # uploads are paths; `own_file` lets no others in
    return limits


def load_model(options) -> tuple:
    """(model, processor, their name) that the options ask for."""
    from modeling_omni.inference import load

    model, processor = load(options.model, options.dtype, options.device, options.attn)
    if not options.adapter:
        return model, processor, options.model
    from modeling_omni.lora import load_adapter

    model = load_adapter(model, options.adapter).get_base_model().eval()
    return model, processor, f"{options.model} + {os.path.basename(os.path.normpath(options.adapter))}"


def launch(options) -> None:
    """Serves the page until Ctrl-C.

    Raises:
        OmniInputError: an exposed host without a password, a model or an address that cannot be had.
    """
    from modeling_omni.limits import OmniInputError

    password = os.environ.get("OMNI_PASSWORD", "")
    exposed = options.host not in LOOPBACK
    if exposed and len(password) < MIN_PASSWORD:
        raise OmniInputError(
            f"--host {options.host} lets other machines in: set a password of {MIN_PASSWORD} characters or more in the "
            "environment variable OMNI_PASSWORD, or stay on 127.0.0.1"
        )
    limits = given_limits(options)
    with tempfile.TemporaryDirectory(prefix="omni-demo-") as uploads:  # others cannot read it; gone when we are
        os.environ |= {"GRADIO_TEMP_DIR": uploads, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
        try:
            import gradio as gr
        except ImportError as error:
            raise OmniInputError(f"the demo needs {error.name}: pip install 'modeling-omni[demo]'") from error
        from starlette.middleware import Middleware

        from modeling_omni.demo import Demo
        from modeling_omni.demo_guard import Guard

        model, processor, name = load_model(options)
        limits.new_tokens = min(limits.new_tokens, model.config.get_text_config().max_position_embeddings // 4)
        demo = Demo(model, processor, name, uploads, limits)
        hosts = None if exposed else LOOPBACK
        guard = Middleware(Guard, hosts, uploads, limits.disk_bytes, limits.media.max_bytes, limits.files)
        fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "DejaVu Sans", "sans-serif"]
        theme = gr.themes.Default(
            primary_hue="emerald", secondary_hue="emerald", neutral_hue="slate", text_size="md", radius_size="lg",
            spacing_size="sm", font=fonts, font_mono=["ui-monospace", "DejaVu Sans Mono", "monospace"],
        ).set(
            body_background_fill="*neutral_50", block_title_text_weight="550", body_text_color_subdued="*neutral_500",
            block_info_text_color="*neutral_500", input_placeholder_color="*neutral_500",
            input_placeholder_color_dark="*neutral_400",
        )  # fmt: skip
        try:
            _, address, _ = build(demo).launch(
                server_name=options.host, server_port=options.port or free_port(options.host), share=False, quiet=True,
                auth=login_of(password) if password else None,
                auth_message="Any user name, and the password of this demo.", max_file_size=limits.media.max_bytes,
                run_history=False, footer_links=[], app_kwargs={"middleware": [guard]}, ssr_mode=False, pwa=False,
                mcp_server=False, enable_monitoring=False, strict_cors=True, prevent_thread_lock=True, css=CSS,
                js=NAMES, theme=theme, max_threads=80, inbrowser=False, num_workers=0,
            )  # fmt: skip
            print(f"listening on {address}, model {name}; Ctrl-C stops", flush=True)
            threading.Event().wait()
        finally:
            demo.close()


def login_of(password: str):
    """What gradio asks about a user name and a password, compared in constant time. A wrong one costs a second: of that
    client alone, since gradio asks in the loop that serves everybody."""

    async def is_right(user: str, given: str) -> bool:
        right = hmac.compare_digest(given.encode("utf-8", "replace"), password.encode("utf-8", "replace"))
        await asyncio.sleep(0 if right else 1)
        return right

    return is_right


def free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def main(argv: list[str] | None = None) -> int:
    """2 and one line on stderr where the input is at fault, 130 after Ctrl-C, 143 after SIGTERM; files go anyhow."""
    options = build_parser().parse_args(argv)
    from transformers.utils import logging

    from modeling_omni.media import OmniInputError

    logging.set_verbosity_error()
    if options.model == "nano" or not sys.stderr.isatty():
        logging.disable_progress_bar()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit "ignore"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        launch(options)
    except (OmniInputError, OSError) as error:  # OSError: the port is taken
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
