"""Our page in a real browser: it talks, shows words and memory, and asks for a token."""

import asyncio

import pytest
from chromium import CHROMIUM, browsing
from live import live
from training import run

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian package: chromium)")

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
            await page.until("document.readyState === 'complete' && typeof mayTalk === 'function'")
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
