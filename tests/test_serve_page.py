"""Our page in a real browser: it talks, shows words and memory, and asks for a token."""

import asyncio

import pytest
from chromium import CHROMIUM, browsing
from live import live
from training import run

from inference.live.access import Access

TOKEN = "correct-horse-battery"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian package: chromium)")

READY = "document.readyState === 'complete' && typeof mayTalk === 'function'"
STATUS = "document.getElementById('status').textContent"

# Loudness of what the loudspeaker plays, over a second.
LOUDNESS = """(async () => {
    const analyser = talk.speaking.createAnalyser();
    talk.loudspeaker.connect(analyser);
    const samples = new Float32Array(analyser.fftSize);
    let loudest = 0;
    for (let i = 0; i < 20; i++) {
        await new Promise((done) => setTimeout(done, 50));
        analyser.getFloatTimeDomainData(samples);
        loudest = Math.max(loudest, Math.sqrt(samples.reduce((sum, s) => sum + s * s, 0) / samples.length));
    }
    return loudest;
})()"""


@pytest.fixture(scope="module")
def checkpoint(private_cache, tmp_path_factory):
    return run(tmp_path_factory.mktemp("page") / "run")


def test_the_page_talks_and_shows_what_is_remembered(checkpoint, tmp_path):
    async def visit():
        sessions = {"sessions": {"folder": str(tmp_path / "sessions")}}
        async with live(checkpoint, **sessions) as server, browsing(f"{server.url}/", tmp_path / "p") as page:
            await page.until(READY)
            await page.until("!document.getElementById('keep-field').hidden")
            await page.value("document.getElementById('keep').checked = true")
            await page.value("document.getElementById('start').click()")
            await page.until("document.getElementById('words').textContent.length > 5")
            await page.until("document.querySelectorAll('.layer').length === 2")
            await page.until("document.querySelector('.row polyline').getAttribute('points').length > 100")
            assert await page.value(LOUDNESS) > 1e-4
            assert await page.value("document.getElementById('you').value") >= 0
            await page.picture(tmp_path / "light.png")
            await page.picture(tmp_path / "dark.png", "dark")
            await page.value("document.getElementById('stop').click()")
            await page.until("document.getElementById('status').textContent === 'You left.'")
            await server.until_free()
            await page.value("document.getElementById('go-on').click()")
            await page.until("document.getElementById('status').textContent.startsWith('Talk.')")
            assert page.complaints == []
            return await server.metrics()

    metrics = asyncio.run(visit())
    assert 'moshi_ttt_sessions_total{what="restored"} 1.0' in metrics


def test_the_page_asks_for_the_token_and_talks_with_it(checkpoint, tmp_path):
    async def give(page, token):
        await page.value(f"document.getElementById('token').value = '{token}'")
        await page.value("document.getElementById('start').click()")

    async def visit():
        async with live(checkpoint, Access(TOKEN)) as server, browsing(server.url, tmp_path / "p") as page:
            await page.until(READY)
            await page.until(f"{STATUS} === 'This server needs a token.'")
            assert await page.value("!document.getElementById('token-field').hidden")
            assert await page.value("document.getElementById('token').type") == "password"
            await page.picture(tmp_path / "token.png")
            await give(page, "wrong")
            await page.until(f'{STATUS} === "This token is not the server\'s."')
            assert server.server._active() == 0
            await give(page, TOKEN)
            await page.until("document.getElementById('words').textContent.length > 5")
            assert await page.value(f"{STATUS}") == "Talk. Moshi listens all the time."
            # This server keeps no conversations, so the page offers none.
            assert await page.value("document.getElementById('keep-field').hidden")
            assert server.server._active() == 1
            await page.value("document.getElementById('stop').click()")
            await page.until(f"{STATUS} === 'You left.'")
            await server.until_free()
            # The token is nowhere that outlives the page.
            assert TOKEN not in await page.value(
                "JSON.stringify(localStorage) + document.cookie + location.href"
            )
            assert [text for text in page.complaints if "401" not in text] == []

    asyncio.run(visit())


def test_the_page_says_that_all_places_are_taken_and_asks_for_no_token(checkpoint, tmp_path):
    async def visit():
        async with live(checkpoint, slots=1) as server, browsing(server.url, tmp_path / "p") as page:
            await page.until(READY)
            async with server.chat():
                await page.value("document.getElementById('start').click()")
                await page.until(f"{STATUS} === 'All places are taken; try again later.'")
            assert await page.value("document.getElementById('token-field').hidden")

    asyncio.run(visit())
