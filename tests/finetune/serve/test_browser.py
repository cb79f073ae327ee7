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
        drawn = "c => new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size"
        assert page.locator("#plot").evaluate(drawn) > 4

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
