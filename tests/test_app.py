"""The demo in a real browser: `python app.py` on nano, used by headless Chromium as people would use it."""

import http.client
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
MEDIA = ROOT / "modeling_omni/nano/examples"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
RED = "Where is the red circle?"
LONG = "la " * 40  # nano thinks about this until it is cut off
PATIENCE = 1000 * int(os.environ.get("OMNI_TEST_PATIENCE", "60"))  # milliseconds; a busy machine is slow
PASSWORD = "correct horse"

pytest.importorskip("gradio", reason="the demo needs gradio: pip install -e '.[demo]'")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[test]'")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
sync_api.expect.set_options(timeout=PATIENCE)
expect = sync_api.expect


class Site:
    """`python app.py` on a free port, with a password."""

    def __init__(self, folder: Path):
        self.folder, self.lines = folder, queue.Queue()
        environment = {"TMPDIR": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "OMNI_PASSWORD": PASSWORD}
        environment = os.environ | environment
        command = [sys.executable, "app.py", "--port", "0", "--max-file-mb", "1"]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.log: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.log.append(line)
            self.lines.put(line)
        self.lines.put("")

    def address(self) -> str:
        while line := self.lines.get(timeout=5 * PATIENCE / 1000):
            if line.startswith("listening on "):
                return line.split()[2].rstrip(",").rstrip("/")
        raise AssertionError("".join(self.log)[-3000:])

    def files(self) -> set[str]:
        """Names of uploaded files that lie on the disk."""
        return {path.name for path in self.folder.glob("omni-demo-*/**/*") if path.is_file()}

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(PATIENCE / 1000)
        finally:
            self.process.kill()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    site = Site(tmp_path_factory.mktemp("site"))
    try:
        site.url = site.address()
        yield site
    finally:
        site.close()
    assert site.process.returncode == 143
    assert not any("modeling_omni/demo" in line for line in site.log), "".join(site.log)  # no traceback of ours
    assert [path for path in site.folder.iterdir() if path.name.startswith("omni-demo")] == []  # nothing is left behind


@pytest.fixture(scope="module")
def browser():
    flags = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


# gradio's page says so of requests on their way that it ends itself, when it is reloaded or a player goes
ABORTED = "signal is aborted without reason"
RELOADED = "Connection errored out"  # and this, where a reload breaks off what was under way


class User:
    """One person in a browser of their own, who notes what the console says and which hosts are asked."""

    def __init__(self, browser, url: str, width: int = 1280, height: int = 860):
        self.context = browser.new_context(viewport={"width": width, "height": height}, permissions=["microphone"])
        self.context.set_default_timeout(PATIENCE)
        self.page = self.context.new_page()
        self.context.request.post(f"{url}/login", form={"username": "ann", "password": PASSWORD})
        self.url, self.problems, self.hosts = url, [], set()
        self.page.on("console", lambda message: message.type == "error" and self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.hosts.add(urllib.parse.urlsplit(request.url).netloc))
        self.page.goto(url)
        self.box.wait_for()

    @property
    def panel(self):
        return self.page.get_by_role("tabpanel").filter(visible=True)

    @property
    def box(self):
        return self.page.get_by_role("textbox", name="Ask, attach, or record")

    @property
    def chat(self):
        return self.page.get_by_role("log").first

    @property
    def answers(self):
        return self.chat.locator("[data-testid=bot]")

    def attach(self, *files) -> None:
        self.page.locator("input[type=file]").first.set_input_files([str(file) for file in files])

    def send(self, text: str) -> None:
        self.box.fill(text)
        self.box.press("Enter")

    def answered(self) -> str:
        """The line about the answer, once there is one."""
        line = self.panel.get_by_role("status").filter(has_text="first token")
        expect(line).to_be_visible()
        return line.inner_text()

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def number(self, label: str, value) -> None:
        field = self.page.get_by_role("spinbutton", name=f"number input for {label}", exact=True)
        field.fill(str(value))
        field.press("Tab")

    def clear(self) -> None:
        self.page.get_by_role("button", name="Clear", exact=True).first.click()
        expect(self.panel.get_by_text("Cleared; its files are deleted.")).to_be_visible()

    def leave(self, expected: str = "$^") -> None:
        self.context.close()
        assert [text for text in self.problems if ABORTED not in text and not re.search(expected, text)] == []
        assert {host for host in self.hosts if host} <= {urllib.parse.urlsplit(self.url).netloc}


def until(true, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


UNNAMED = """() => [...document.querySelectorAll('button, input, textarea, [role=slider], a[href], img')]
  .filter(e => e.checkVisibility() && !e.closest('[aria-hidden=true]'))
  .filter(e => !(e.getAttribute('aria-label') || e.title || e.alt || e.placeholder || e.innerText
    || e.querySelector('[aria-label], img[alt]:not([alt=""])')
    || (e.labels && [...e.labels].some(l => l.innerText.trim()))))
  .filter(e => !(e.tagName == 'IMG' && e.hasAttribute('alt')))
  .map(e => e.outerHTML.slice(0, 200))"""


SMALL = """() => [...document.querySelectorAll('button, input[type=number], label:has(input[type=checkbox])')]
  .filter(e => e.checkVisibility() && !e.closest('[aria-hidden=true]'))
  .map(e => [e.getBoundingClientRect(), e.getAttribute('aria-label') || e.innerText || e.outerHTML.slice(0, 99)])
  .filter(([r, _]) => Math.min(r.width, r.height) < 23.5).map(([r, name]) => `${name} ${r.width} x ${r.height}`)"""
PALE = """() => {
  const numbers = text => text.match(/[\\d.]+/g).map(Number);
  const light = rgb => rgb.slice(0, 3).map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const ground = e => {
    for (; e; e = e.parentElement) {
      const found = numbers(getComputedStyle(e).backgroundColor);
      if (found.length < 4 || found[3] > .9) return found;
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll('span, p, label, button, td, th, h1, h3, textarea')]
    .filter(e => e.checkVisibility() && !e.closest('[aria-hidden=true]'))
    .filter(e => [...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim()))
    .map(e => [light(numbers(getComputedStyle(e).color)), light(ground(e)), e.innerText.slice(0, 60)])
    .filter(([a, b, _]) => (Math.max(a, b) + .05) / (Math.min(a, b) + .05) < 4.5)
    .map(([a, b, text]) => `${text}: ${((Math.max(a, b) + .05) / (Math.min(a, b) + .05)).toFixed(2)}`);
}"""
FOCUSED = """() => {
  const e = document.activeElement, box = e.tagName == 'TEXTAREA' ? e.closest('.block') : e;
  return [e.getAttribute('aria-label') || e.labels?.[0]?.innerText || e.placeholder || e.innerText,
    getComputedStyle(box).outlineStyle];
}"""


def test_keys_names_sizes_and_contrast(site, browser):
    """All of the page in an order that makes sense, with the focus in view; big enough for fingers, dark enough to
    read, at the width of a desktop and of a phone, in light and in dark."""
    user = User(browser, site.url, 390, 844)
    page, faults = user.page, []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.reload()
        for name in ("Compare", "What the model saw", "About", "Chat"):
            user.tab(name)  # all four are in view, none behind a menu
            page.wait_for_timeout(300)
            faults += [(scheme, name, fault) for what in (UNNAMED, SMALL, PALE) for fault in page.evaluate(what)]
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert faults == []
    user.context.close()
    user = User(browser, site.url)
    page, order = user.page, []
    for _ in range(60):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(FOCUSED)
        order.append(name.split("\n")[0].strip())
        assert outline == "solid", name
        if order[-1] == "Think before the answer":
            page.keyboard.press("Space")
        if order[-1] == "range slider for New tokens at most":
            page.keyboard.press("ArrowRight")
        if order[-1] == "Sampling":
            page.keyboard.press("Enter")
            page.get_by_label("Temperature").first.wait_for()
        if order[-1] == "System prompt":
            break
    wanted = ["Chat", "About", "Select example 1: Where is the red circle?", "Upload a file", "Ask, attach, or record"]
    wanted += ["Record audio", "Submit", "Think before the answer", "number input for Frames of a video", "Sampling"]
    wanted += ["range slider for Temperature", "Seed", "System prompt"]
    assert [name for name in order if name in wanted] == wanted
    expect(page.get_by_label("Think before the answer", exact=True)).to_be_checked()
    tokens = page.get_by_role("spinbutton", name="number input for New tokens at most", exact=True)
    expect(tokens).to_have_value("257")
    user.leave()


def test_a_picture_by_keyboard_alone_and_what_the_model_saw(site, browser):
    user = User(browser, site.url)
    page = user.page
    assert page.get_by_role("heading", level=1).inner_text() == "Nemotron 3 Nano Omni"
    assert page.evaluate("document.documentElement.lang") == "en" and page.title() == "Nemotron 3 Nano Omni"
    assert page.evaluate(UNNAMED) == []  # a screen reader can name everything
    user.attach(MEDIA / "shapes.png")
    user.box.focus()
    page.keyboard.type(RED)
    expect(user.panel.get_by_text("This message: 19 tokens = 10 text + 9 image.")).to_be_visible()  # before it is sent
    page.keyboard.press("Enter")
    expect(user.answers.last).to_have_text("top right")
    about = user.answered()
    assert re.search(
        r"first token \d+\.\d\d s . [\d.]+ tokens/s . 4 tokens . prompt 31 . process memory [\d.]+ GiB", about
    )
    assert user.box.input_value() == "" and "shapes.png" in site.files()
    page.get_by_role("tab", name="Chat").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    seen = page.get_by_role("img", name="shapes.png as the model reads it")
    expect(seen).to_be_visible()
    expect(page.get_by_text("96 x 96: 6 x 6 patches, 3 x 3 = 9 tokens")).to_be_visible()
    assert seen.evaluate("image => image.naturalWidth") >= 256
    user.tab("Chat")  # and now there is a conversation
    expect(user.chat.get_by_role("img", name="shapes.png")).to_be_visible()
    page.wait_for_timeout(300)
    assert [fault for what in (UNNAMED, SMALL, PALE) for fault in page.evaluate(what)] == []
    user.leave()


def test_thinking_is_shown_with_its_time_and_stop_stops_the_model(site, browser):
    user = User(browser, site.url)
    user.page.get_by_label("Think before the answer", exact=True).check()
    user.send("What is 47 + 38?")
    expect(user.answers.last).to_have_text("85")
    expect(user.chat.get_by_role("button", name=re.compile("Thinking"))).to_contain_text(
        re.compile(r"\(\d+(\.\d+)?s\)")
    )
    user.clear()
    user.number("New tokens at most", 2000)
    user.send(LONG)
    expect(user.answers.last).to_have_text(re.compile(r"\S{3}"))
    text = user.answers.last.inner_text()
    until(lambda: len(user.answers.last.inner_text()) > len(text))  # it streams
    user.page.get_by_role("button", name="Stop").click()
    expect(user.panel.get_by_text(re.compile("stopped$"))).to_be_visible()
    tokens = int(re.search(r"(\d[\d,]*) tokens . prompt", user.answered())[1].replace(",", ""))
    assert tokens < 1900
    user.clear()
    user.page.get_by_label("Think before the answer", exact=True).uncheck()
    user.send("Copy: abc")  # the model is free
    expect(user.answers.last).to_have_text("abc")
    user.leave()


def test_edit_retry_undo_and_clear(site, browser):
    user = User(browser, site.url)
    user.attach(MEDIA / "shapes.png")
    user.send("What colour is the star?")
    expect(user.answers.last).to_have_text("blue")
    user.chat.get_by_role("button", name="Edit").last.click()
    edited = user.chat.get_by_role("textbox").last
    edited.fill(RED)
    user.chat.get_by_role("button", name="Submit").click()
    expect(user.answers.last).to_have_text("top right")
    user.chat.get_by_role("button", name="Retry").last.click()
    expect(user.panel.get_by_role("status").filter(has_text="known")).to_be_visible()  # on from what it has read
    expect(user.answers).to_have_count(1)
    expect(user.answers.last).to_have_text("top right")
    user.chat.get_by_role("button", name="Undo").last.click()
    expect(user.box).to_have_value(RED)
    expect(user.answers).to_have_count(0)
    expect(user.panel.get_by_text("9 image")).to_be_visible()  # its picture is back too
    user.box.press("Enter")
    expect(user.answers.last).to_have_text("top right")
    user.answered()
    user.clear()
    expect(user.answers).to_have_count(0)
    user.leave()


def test_a_video_with_sound_and_the_tokens_that_evs_kept(site, browser):
    user = User(browser, site.url)
    user.page.get_by_role("button", name="Select example 5").click()
    expect(user.box).to_have_value("What colour moves and what word is said?")
    expect(user.panel.get_by_text("18 video + 25 audio")).to_be_visible()
    user.box.press("Enter")
    expect(user.answers.last).to_have_text("yellow, stop")
    user.clear()
    user.attach(MEDIA / "motion.mp4")
    user.number("EVS: video tokens to drop", 0.4)
    user.send("What moves where?")
    user.answered()
    user.tab("What the model saw")
    expect(user.panel.get_by_text(re.compile("EVS keeps \\d+ of"))).to_be_visible()
    expect(user.panel.get_by_role("img").first).to_have_attribute(
        "alt", re.compile("frame 1 at 0.00 s . 9 of 9 tokens kept")
    )
    user.leave()


def test_a_question_that_is_spoken(site, browser):
    user = User(browser, site.url)
    user.page.get_by_role("button", name="Record audio").click()
    start, stop = (user.page.get_by_role("button", name=f"{name} recording") for name in ("Start", "Stop"))
    start.or_(stop).first.wait_for()
    seconds = 0.0  # for which it has recorded; the buttons change places while the device opens
    while seconds < 1.5:
        user.page.wait_for_timeout(500)
        seconds = seconds + 0.5 if stop.count() else 0.0
        if start.count():
            start.click()
    stop.click()
    user.page.get_by_role("button", name="Attach audio").click()
    expect(user.panel.get_by_text(re.compile(r"This message: .*\d+ audio"))).to_be_visible()
    user.page.locator("[data-testid=submit-button]").first.click()
    user.answered()  # the fake microphone beeps: nobody knows what is to be said to that
    assert user.chat.locator("[data-testid=user] audio, [data-testid=user] [data-testid*=audio]").count()
    user.leave()


def test_files_that_are_broken_or_too_large(site, browser, tmp_path):
    user = User(browser, site.url)
    (tmp_path / "broken.mp4").write_bytes((MEDIA / "motion.mp4").read_bytes()[:3000])
    user.attach(tmp_path / "broken.mp4")
    expect(user.panel.get_by_role("alert").filter(has_text="broken.mp4: ")).to_be_visible()
    user.send("What moves where?")
    expect(user.panel.locator(".problem")).to_have_count(1)  # said once, without the folder in which it lies
    expect(user.panel.get_by_role("alert")).not_to_contain_text("omni-demo")
    expect(user.box).to_have_value("What moves where?")  # it is given back
    expect(user.answers).to_have_count(0)
    user.page.get_by_role("button", name="Remove file").click()
    noise = np.random.default_rng(0).integers(0, 256, (800, 800, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    user.attach(tmp_path / "large.png")
    expect(user.page.get_by_text(re.compile("exceed|too large|maximum allowed size", re.I)).first).to_be_visible()
    assert "large.png" not in site.files()
    user.page.reload()
    user.send("Copy: abc")
    expect(user.answers.last).to_have_text("abc")
    user.leave(f"413|{RELOADED}")


def test_two_people_at_once_see_nothing_of_each_other(site, browser):
    ann, bob = User(browser, site.url), User(browser, site.url, 390, 844)
    ann.attach(MEDIA / "shapes.png")
    bob.attach(MEDIA / "word.png")
    ann.box.fill("What colour is the star?")
    bob.box.fill("Read the word.")
    for user in (ann, bob):
        expect(user.panel.get_by_text("9 image").or_(user.panel.get_by_text(re.compile(r"\d+ image")))).to_be_visible()
    ann.box.press("Enter")
    bob.box.press("Enter")
    expect(ann.answers.last).to_have_text("blue")
    expect(bob.answers.last).to_have_text(re.compile("^HEL"))  # nano reads it as HELO
    assert ann.answers.count() == bob.answers.count() == 1
    # the phone: nothing sticks out, and all that is needed to write is in view
    assert bob.page.evaluate("document.documentElement.scrollWidth") <= 390
    expect(bob.box).to_be_in_viewport()
    expect(bob.panel.get_by_role("status").filter(has_text="first token")).to_be_in_viewport()
    ann.leave()
    until(lambda: "shapes.png" not in site.files())
    assert "word.png" in site.files()
    bob.page.reload()  # begins anew, and what was there is deleted
    bob.box.wait_for()
    expect(bob.answers).to_have_count(0)
    until(lambda: "word.png" not in site.files())
    bob.send("Copy: abc")
    expect(bob.answers.last).to_have_text("abc")
    bob.leave(RELOADED)


def test_two_settings_side_by_side_and_the_limits(site, browser):
    user = User(browser, site.url)
    user.tab("Compare")
    question = user.page.get_by_role("textbox", name="A question for both sides")
    question.fill("What is 47 + 38?")
    question.press("Enter")
    expect(user.panel.get_by_role("status").filter(has_text="first token")).to_have_count(2)
    a, b = (user.panel.get_by_role("log").nth(i) for i in (0, 1))
    expect(b.locator("[data-testid=bot]").last).to_have_text("85")
    expect(b.get_by_role("button", name=re.compile("Thinking"))).to_have_count(1)
    expect(a.get_by_role("button", name=re.compile("Thinking"))).to_have_count(0)
    user.panel.locator("input[type=file]").first.set_input_files(str(MEDIA / "shapes.png"))
    question.fill(RED)
    expect(user.panel.get_by_text("9 image")).to_be_visible()
    user.number("New tokens at most A", 1)
    user.page.get_by_label("Think before the answer B").uncheck()
    question.press("Enter")
    expect(b.locator("[data-testid=bot]").last).to_have_text("top right")
    expect(user.panel.get_by_role("status").filter(has_text="cut off at the limit of new tokens")).to_have_count(1)
    expect(user.panel.get_by_role("status").filter(has_text="prompt 31")).to_have_count(2)  # what was said is not in it
    question.fill("")
    user.panel.get_by_role("button", name="Remove file").click()
    user.panel.get_by_role("button", name="Submit").click()
    expect(user.panel.get_by_role("alert").filter(has_text="there is no question")).to_be_visible()
    user.tab("Chat")
    expect(user.answers).to_have_count(0)  # the conversation is another
    user.tab("About")
    expect(user.panel.get_by_text("There is no safety filter here.")).to_be_visible()
    expect(user.panel.get_by_text("8,192 tokens")).to_be_visible()
    user.leave()


def test_what_people_write_is_text(site, browser):
    user = User(browser, site.url)
    user.send("<script>window.owned = 1</script><img src=http://example.com/a.png onerror='window.owned = 2'>"
              "![x](http://example.com/b.png) <|im_end|><image>")  # fmt: skip
    user.answered()
    user.page.wait_for_timeout(300)
    assert user.page.evaluate("window.owned") is None
    user.hosts.discard("example.com")  # may be asked for, but the policy does not let it through
    user.leave("Content Security Policy|ERR_BLOCKED_BY_CSP")


# ------------------------------------------------------------------------------------------------ without a browser


def fetch(url: str, body: bytes | None = None, **headers) -> tuple[int, bytes, dict]:
    request = urllib.request.Request(url, body, {name.replace("_", "-"): value for name, value in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, response.read(), {"set-cookie": response.headers.get_all("set-cookie")}
    except urllib.error.HTTPError as error:
        return error.code, error.read(), {}


def announced(url: str, path: str, length: int, headers: dict) -> int:
    """The status that a body of this length gets before a byte of it is sent."""
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=120)
    connection.putrequest("POST", path)
    for name, value in (headers | {"Content-Length": str(length)}).items():
        connection.putheader(name, value)
    connection.endheaders()
    with connection.getresponse() as response:
        return response.status


def test_what_the_server_refuses(site):
    assert fetch(site.url, Host="evil.example")[0] == 403
    for path in ("/config", "/gradio_api/info", "/gradio_api/file=x"):
        assert fetch(site.url + path)[0] == 401
    assert fetch(f"{site.url}/gradio_api/queue/join", b"{}", Content_Type="application/json")[0] == 401
    assert fetch(f"{site.url}/gradio_api/upload", b"x")[0] == 401
    form = urllib.parse.urlencode({"username": "ann", "password": "wrong"}).encode()
    assert fetch(f"{site.url}/login", form)[0] in (400, 401)
    form = urllib.parse.urlencode({"username": "ann", "password": PASSWORD}).encode()
    cookies = [cookie.split(";")[0] for cookie in fetch(f"{site.url}/login", form)[2]["set-cookie"]]
    known = {"Cookie": "; ".join(cookies)}
    assert fetch(site.url, **known)[0] == 200
    for path in ("/etc/passwd", f"{ROOT}/app.py", "../app.py", str(site.folder)):
        assert fetch(f"{site.url}/gradio_api/file={urllib.parse.quote(path)}", **known)[0] in (403, 404)
    known["Content-Type"] = "application/json"
    assert announced(site.url, "/gradio_api/queue/join", 2**20 + 1, known) == 413
    config = json.loads(fetch(f"{site.url}/config", **known)[1])
    assert not config["analytics_enabled"] and not config["run_history"]
    assert json.loads(fetch(f"{site.url}/gradio_api/info", **known)[1])["named_endpoints"] == {}
    value = {"text": "x", "files": [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}]}
    event = json.dumps({"data": [value] + [0] * 11, "fn_index": 0, "session_hash": "stranger"}).encode()
    status, _, _ = fetch(f"{site.url}/gradio_api/queue/join", event, **known)
    if status == 200:  # it is taken in, and answered with an error
        answer = fetch(f"{site.url}/gradio_api/queue/data?session_hash=stranger", **known)[1]
        assert b'"success":true' not in answer and b"root:" not in answer
    value["files"][0]["path"] = "http://example.com/a.png"  # gradio would download it
    controls = [False, -1, 8, 0, 0, 0, True, 0, 1, 0, ""]
    event = json.dumps({"data": [value, *controls], "fn_index": 0, "session_hash": "other"}).encode()
    assert fetch(f"{site.url}/gradio_api/queue/join", event, **known)[0] == 200
    answer = fetch(f"{site.url}/gradio_api/queue/data?session_hash=other", **known)[1]
    assert b"addresses are not read here" in answer
    for path in ("proxy=https://a.hf.space/x", "file=http://example.com/a.png", "process_recording", "deep_link"):
        assert fetch(f"{site.url}/gradio_api/{path}", **known)[0] == 404
