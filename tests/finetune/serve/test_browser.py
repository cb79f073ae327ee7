"""The page in a real browser: a call from its microphone, and all buttons."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from data_tools import speech_like
from test_engine import parts
from test_server import serving

from finetune import serve
from finetune.data.codec import Codec
from finetune.serve.session import identify
from ttt import TTTLMModel

pytestmark = pytest.mark.browser
CHROMIUM = "/usr/bin/chromium"


@contextmanager
def server_in_a_thread(model: TTTLMModel, codec: Codec, **how: Any) -> Iterator[Any]:
    begun, stop = threading.Event(), asyncio.Event()
    found: dict[str, Any] = {}

    async def run() -> None:
        found["loop"] = asyncio.get_running_loop()
        identity = identify(model, codec, Path("mine"))
        async with serving(model, codec, 1, identity=identity, **how) as server:
            found["server"] = server
            begun.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        assert begun.wait(60)
        yield found["server"]
    finally:
        found["loop"].call_soon_threadsafe(stop.set)
        thread.join()


@pytest.fixture(scope="module")
def voice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 s for the fake microphone."""
    path = tmp_path_factory.mktemp("voice") / "voice.wav"
    soundfile.write(path, 3 * speech_like(30, 48000, channels=1), 48000)
    return path


@pytest.fixture
def browser(voice: Path) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    arguments = [
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
        f"--use-file-for-fake-audio-capture={voice}",
        "--autoplay-policy=no-user-gesture-required",
        "--no-sandbox",
    ]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


def opened(browser: Any, url: str, **how: Any) -> Any:
    page = browser.new_page(**how)
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on(
        "console",
        lambda said: page.errors.append(said.text) if said.type == "error" else None,
    )
    page.goto(url)
    return page


def until(page: Any, condition: str) -> None:
    """Asked from here: the page's policy forbids to evaluate text in it."""
    for _ in range(600):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(100)
    status = page.locator("#status").inner_text()
    raise AssertionError(f"{condition}: never; {status} {page.errors}")


def has_spoken(page: Any, num_letters: int) -> None:
    spoken = "document.getElementById('words').textContent.length"
    until(page, f"{spoken} > {num_letters}")


def number(page: Any, name: str) -> float:
    return float(page.locator(name).inner_text())


def goes_on(page: Any, sec: int) -> None:
    """Wait for more of the call, by its own clock: fast machines and slow ones hear as much."""
    clock = "document.getElementById('time').textContent.split(':').reduce((m, s) => 60 * m + +s)"
    until(page, f"{clock} >= {page.evaluate(clock) + sec}")


def drawn(page: Any, mark: str) -> int:
    """The number of pixels of the plot in the color of a mark of its legend."""
    count = """(mark) => {
        const canvas = document.getElementById("plot");
        const wanted = getComputedStyle(document.querySelector(mark)).backgroundColor;
        const color = wanted.match(/\\d+/g).map(Number);
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        const near = (i) => (c, k) => data[i + 3] > 0 && Math.abs(data[i + k] - c) < 30;
        let count = 0;
        for (let i = 0; i < data.length; i += 4) count += color.every(near(i));
        return count;
    }"""
    return int(page.evaluate(count, mark))


def test_a_call(browser: Any, tmp_path: Path) -> None:
    model, codec = parts("delta")
    with server_in_a_thread(model, codec) as server:
        page = opened(browser, server.url)
        # By keyboard.
        page.locator("#call").focus()
        page.keyboard.press("Enter")
        until(page, "document.getElementById('status').textContent.includes('speak')")
        has_spoken(page, 8)
        words = page.locator("#words li")
        assert words.first.locator("time").inner_text().endswith(" s")
        until(page, "document.getElementById('moshi-level').value > 0.001")
        until(page, "document.getElementById('user-level').value > 0.001")
        assert number(page, "#latency") > 0
        layers = page.locator("#legend output")
        assert layers.count() == 2
        until(page, "+document.querySelector('#legend output').textContent > 0.001")
        for mark in ("#legend span:nth-child(1) i", "#legend span:nth-child(2) i"):
            for _ in range(100):
                if drawn(page, mark) > 10:
                    break
                page.wait_for_timeout(100)
            assert drawn(page, mark) > 10

        with page.expect_download() as saving:
            page.locator("#save").click()
        session = tmp_path / "moshi.session"
        saving.value.save_as(session)
        assert session.stat().st_size > 10_000

        page.locator("#ttt").uncheck()
        page.locator("#forget").click()
        until(page, "+document.querySelector('#legend output').textContent === 0")
        has_spoken(page, len(page.locator("#words").inner_text()) + 3)
        assert layers.first.inner_text().startswith("0")
        page.locator("#session").set_input_files(session)
        until(page, "document.getElementById('status').textContent.includes('goes on')")
        until(page, "+document.querySelector('#legend output').textContent > 0.001")
        junk = tmp_path / "junk.session"
        junk.write_bytes(b"junk")
        page.locator("#session").set_input_files(junk)
        until(page, "document.getElementById('status').textContent.includes('no session')")
        page.screenshot(path=tmp_path / "call.png")
        goes_on(page, 3)

        page.locator("#call").click()
        until(page, "document.getElementById('status').textContent.includes('ended')")
        with page.expect_download() as saving:
            page.locator("#download").click()
        saving.value.save_as(tmp_path / "call.wav")
        audio, rate_hz = soundfile.read(tmp_path / "call.wav")
        assert rate_hz == 24000 and audio.shape[1] == 2 and len(audio) > 2 * rate_hz
        assert np.abs(audio).max(axis=0).min() > 0.01
        # What was refused is the one thing that a browser reports.
        assert [e for e in page.errors if "409" not in e] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_recording_is_as_good_as_a_microphone_also_on_a_phone(
    browser: Any, tmp_path: Path, voice: Path, scheme: str
) -> None:
    model, codec = parts("linear")
    with server_in_a_thread(model, codec, token="correct-horse") as server:
        phone: dict[str, Any] = {"viewport": {"width": 360, "height": 740}, "color_scheme": scheme}
        page = opened(browser, f"{server.url}/?token=correct-horse", **phone)
        assert "correct" not in page.url
        page.locator("#source").select_option("file")
        page.locator("#call").click()
        assert "choose a recording" in page.locator("#status").inner_text()
        page.locator("#recording").set_input_files(voice)
        page.locator("#call").click()
        has_spoken(page, 8)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.screenshot(path=tmp_path / f"{scheme}.png")
        assert page.errors == []

        page.locator("#call").click()
        stranger = opened(browser, server.url, **phone)
        stranger.locator("#source").select_option("file")
        stranger.locator("#recording").set_input_files(voice)
        stranger.locator("#call").click()
        until(stranger, "document.getElementById('status').textContent.includes('token')")
        assert stranger.locator("#token").is_visible()


def test_impatient_clicks_leave_no_microphone_on(browser: Any) -> None:
    model, codec = parts("sum")
    remember = """
        globalThis.streams = [];
        const media = navigator.mediaDevices, original = media.getUserMedia.bind(media);
        media.getUserMedia = async (how) => {
            const stream = await original(how);
            streams.push(stream);
            return stream;
        };
    """
    live = "streams.flatMap(s => s.getTracks()).filter(t => t.readyState === 'live').length"
    with server_in_a_thread(model, codec) as server:
        page = browser.new_page()
        page.add_init_script(remember)
        page.goto(server.url)
        page.evaluate("for (let i = 0; i < 3; i++) document.getElementById('call').click()")
        until(page, "document.getElementById('status').textContent.includes('speak')")
        assert page.evaluate(live) == 1
        page.locator("#call").click()
        until(page, "document.getElementById('status').textContent.includes('ended')")
        assert page.evaluate("streams.length") == 1 and page.evaluate(live) == 0


def status(page: Any, part: str) -> None:
    until(page, f"document.getElementById('status').textContent.includes({part!r})")


def test_lines_are_said_for_who_has_no_microphone(browser: Any, tmp_path: Path) -> None:
    model, codec = parts("sum")
    with server_in_a_thread(model, codec) as server:
        page = opened(browser, server.url)
        page.add_init_script("navigator.mediaDevices.getUserMedia = () => { throw new Error(); }")
        page.reload()
        line = page.locator("#lines button").first
        until(page, "document.querySelectorAll('#lines button').length === 6")
        assert line.inner_text() == "Laura likes oranges." and line.is_disabled()
        page.locator("#source").select_option("lines")
        page.locator("#call").click()
        status(page, "choose a line")
        page.evaluate("""
            globalThis.loudest = 0;
            const meter = document.getElementById("user-level");
            setInterval(() => (loudest = Math.max(loudest, meter.value)), 20);
        """)
        page.wait_for_timeout(300)
        assert page.evaluate("loudest") == 0
        line.click()
        until(page, "loudest > 0.05")
        assert line.is_disabled()
        assert page.locator("#words li.you").inner_text().endswith("Laura likes oranges.")
        until(page, "!document.querySelector('#lines button').disabled")
        # The wav ends where the answers do.
        goes_on(page, 3)
        page.locator("#call").click()
        status(page, "ended")
        assert line.is_disabled() and page.errors == []
        with page.expect_download() as saving:
            page.locator("#download").click()
        saving.value.save_as(tmp_path / "call.wav")
        user = soundfile.read(tmp_path / "call.wav")[0][:, 1]
        # The line is some 1.2 s long, and the user else silent.
        assert (np.abs(user) > 0.001).sum() > 0.5 * 24000 and np.abs(user).max() > 0.1


def test_what_fails_is_said(browser: Any, tmp_path: Path) -> None:
    model, codec = parts("sum")
    with server_in_a_thread(model, codec) as server:

        def fails(script: str, message: str) -> None:
            page = opened(browser, "about:blank")
            page.add_init_script(script)
            page.goto(server.url)
            page.locator("#call").click()
            status(page, message)
            assert page.locator("#call").inner_text() == "Call" and page.errors == []

        denied = "Promise.reject(new DOMException('', 'NotAllowedError'))"
        fails(f"navigator.mediaDevices.getUserMedia = () => {denied}", "allow it for this page")
        fails("delete globalThis.AudioWorkletNode", "AudioWorklet")
        fails("AudioContext = class { constructor() { throw new Error('no card'); } }", "no card")

        page = opened(browser, server.url)
        page.locator("#call").click()
        status(page, "speak")
        crowd = opened(browser, server.url)
        crowd.locator("#call").click()
        status(crowd, "every place is taken (1 in all)")
        assert crowd.locator("#download").is_disabled()

        page.route("**/session?*", lambda route: route.abort())
        page.locator("#save").click()
        status(page, "does not answer")
        page.unroute("**/session?*")
        proxy: dict[str, Any] = {"status": 502, "content_type": "text/html", "body": "<h1>No</h1>"}
        page.route("**/session", lambda route: route.fulfill(**proxy))
        page.locator("#session").set_input_files({"name": "x", "mimeType": "", "buffer": b"x"})
        status(page, "answered 502")
        page.route("**/lines/0", lambda route: route.abort())
        page.locator("#lines button").first.click()
        status(page, "does not answer")

        (transport,) = server.sockets.values()
        transport._loop.call_soon_threadsafe(transport.abort)
        status(page, "the connection was lost")
        assert page.locator("#save").is_disabled()
        assert [e for e in page.errors if "Failed to load resource" not in e] == []

        # A call that is refused takes nothing of the one before.
        until(page, "!document.getElementById('call').disabled")
        crowd.locator("#call").click()
        status(crowd, "speak")
        page.locator("#call").click()
        status(page, "every place is taken (1 in all)")
        with page.expect_download() as saving:
            page.locator("#download").click()
        saving.value.save_as(tmp_path / "call.wav")
        assert soundfile.info(tmp_path / "call.wav").frames > 0
        crowd.locator("#call").click()
        status(crowd, "ended")

        page.route("**/metrics", lambda route: route.abort())
        page.locator("#call").click()
        status(page, "No call: the server does not answer")


def in_the_audio_thread(browser: Any, rate_hz: int, program: str) -> Any:
    """Run a program beside the classes of worklet.js."""
    worklet = (Path(serve.__file__).parent / "page/worklet.js").read_text()
    around = f"""
        globalThis.sampleRate = {rate_hz};
        globalThis.registerProcessor = () => {{}};
        globalThis.AudioWorkletProcessor = class {{
            sent = [];
            port = {{ postMessage: (data) => this.sent.push(data) }};
        }};
    """
    page = browser.new_page()
    return page.evaluate(f"() => {{ {around} {worklet} {program} }}")


@pytest.mark.parametrize("rate_hz", [24000, 44100, 48000, 16000])
def test_the_microphone_has_its_own_rate(browser: Any, rate_hz: int) -> None:
    program = """
        const options = { processorOptions: { frameSamples: 1920, rateHz: 24000 } };
        const capture = new Capture(options);
        const tone = (n) => Math.sin(2 * Math.PI * 1000 * n / sampleRate);
        const beyond = (n) => 0.5 * Math.sin(2 * Math.PI * 17000 * n / sampleRate);
        for (let n = 0; n < sampleRate; n += 128) {
            const i = Float32Array.from({ length: 128 }, (_, k) =>
                tone(n + k) + (sampleRate > 40000 ? beyond(n + k) : 0));
            capture.process([[i]]);
        }
        return capture.sent.flatMap((frame) => [...frame]);
    """
    heard = np.array(in_the_audio_thread(browser, rate_hz, program))
    assert 24000 - 1920 - 200 <= len(heard) <= 24000 + 128
    # A pure tone of 1 kHz is left; what no rate of 24 kHz can hold is gone.
    time_sec = np.arange(len(heard))[2000:-2000] / 24000
    basis = np.stack([np.sin(2000 * np.pi * time_sec), np.cos(2000 * np.pi * time_sec)], axis=1)
    inner = heard[2000:-2000]
    weights, *_ = np.linalg.lstsq(basis, inner, rcond=None)
    assert abs(np.hypot(*weights) - 1) < 1e-3
    assert np.abs(inner - basis @ weights).max() < 5e-3


def test_answers_that_come_at_once_are_heard_late_by_half_a_second_at_most(browser: Any) -> None:
    program = """
        const player = new Player({ processorOptions: { startSamples: 3840 } });
        for (let n = 1; n <= 50; n++) {
            player.port.onmessage({ data: new Float32Array(1920).fill(n) });
        }
        const heard = [];
        for (let n = 0; n < 100; n++) {
            const output = new Float32Array(128);
            player.process([], [[output]]);
            heard.push(...output);
        }
        return heard;
    """
    heard = np.array(in_the_audio_thread(browser, 24000, program))
    played = heard[heard > 0]
    assert 1920 < len(played) <= 12000
    assert played[-1] == 50 and set(np.unique(played)) == set(range(int(played[0]), 51))
