"""`python -m inference.serve checkpoint=RUN`: a live server that speaks Moshi's WebSocket protocol."""

import asyncio
import logging
import signal
import ssl
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import hydra
from aiohttp import web
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from configs.typed import typed_config
from inference.generate import choose_device
from inference.live.access import Access, is_loopback, read_token
from inference.live.application import Server, Settings
from inference.live.engine import Engine
from inference.live.limits import LimitsConfig
from inference.live.metrics import Metrics
from inference.live.routes import application, index_of
from inference.live.sessions import SessionFolder, SessionsConfig
from inference.rows import Sampling
from inference.session import session_identity
from moshi_ttt.checkpoint import load_checkpoint
from moshi_ttt.integration import context_line, describe
from moshi_ttt.loading import load_mimi, load_tokenizer

logger = logging.getLogger(__name__)


@dataclass
class ServeConfig:
    """A live server. docs/serve.md describes its protocol."""

    checkpoint: str = MISSING
    """A run, a step or a consolidated folder. The model's settings come from it and from nowhere else."""

    host: str = "127.0.0.1"
    """Address to listen on. Others than loopback addresses need a token."""

    port: int = 8998
    """0 takes a free one; the log says which."""

    slots: int = 4
    """Conversations at once. All share one batch; more get the answer "full"."""

    sampling: Sampling = field(default_factory=Sampling)
    """How tokens are drawn. Its seed is not read here."""

    seed: int | None = None
    """Of the noise of each conversation that asks for no other. None draws one, which clients are told."""

    token_file: str | None = None
    """File with the token that clients must give. The environment variable MOSHI_TTT_TOKEN does as well."""

    origins: list[str] = field(default_factory=list)
    """Further origins (https://name) whose web pages may connect, such as that of a reverse proxy."""

    static: str | None = None
    """Folder of Moshi's own web page (its dist.tgz, unpacked). None serves a small page of ours."""

    tls: str | None = None
    """Folder with cert.pem and key.pem, to speak https and wss. Browsers give the microphone to pages from
    other machines over https only."""

    memory_every: int = 6
    """Frames between looks at the inner weights, for clients that ask for metadata."""

    check_every: int = 100
    """Steps between looks for NaN in the inner states, which ends that one conversation. 0 means never."""

    limits: LimitsConfig = field(default_factory=LimitsConfig)
    sessions: SessionsConfig = field(default_factory=SessionsConfig)

    device: str = "auto"
    """cuda, cpu, or auto: cuda where there is one."""

    verify: str = "cached"
    """full reads the base model's files again to check their SHA-256; cached trusts what is remembered."""


ConfigStore.instance().store(name="serve_schema", node=ServeConfig)


def check_config(config: ServeConfig) -> None:
    """Raise ValueError for settings that cannot work, before anything is loaded."""
    config.limits.check()
    config.sessions.check()
    if config.slots < 1:
        raise ValueError(f"slots must be 1 or more, got {config.slots}")
    if config.memory_every < 0 or config.check_every < 0:
        raise ValueError("memory_every and check_every must be 0 (never) or more")
    if config.sampling.seed != 0:
        raise ValueError(
            f"sampling.seed={config.sampling.seed} is not read here; use seed={config.sampling.seed}"
        )
    if config.seed is not None and not 0 <= config.seed < 2**53:
        raise ValueError(f"seed must be from 0 to 2^53 - 1, got {config.seed}")
    if config.static is not None:
        index_of(Path(config.static).expanduser())
    tls_context(config.tls)


def build_server(config: ServeConfig, access: Access) -> Server:
    """Restore the checkpoint and put a server around it, which is not started."""
    device = choose_device(config.device)
    loaded = load_checkpoint(config.checkpoint, device, config.verify)
    logger.info("checkpoint: %s, step %d", loaded.folder, loaded.manifest["step"])
    logger.info("%s", context_line(loaded.model, inference=True))
    logger.info("live layers:\n%s", describe(loaded.model))
    metrics = Metrics(config.slots)
    mimi = load_mimi(loaded.base, device)
    engine = Engine(loaded.model, mimi, config.sampling, config.slots, config.check_every, metrics)
    settings = Settings(
        config.limits,
        session_identity(loaded, config.sampling),
        config.seed,
        config.memory_every,
        config.sessions.save == "always",
        config.slots,
    )
    sessions = SessionFolder(config.sessions) if config.sessions.folder is not None else None
    return Server(engine, load_tokenizer(loaded.base), access, sessions, settings, metrics)


def tls_context(folder: str | None) -> ssl.SSLContext | None:
    """What speaks https with the certificate in a folder; None for none.

    Raises:
        ValueError: the folder holds no certificate and key that belong together.
    """
    if folder is None:
        return None
    path = Path(folder).expanduser()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(path / "cert.pem", path / "key.pem")
    except OSError as error:  # ssl's own errors are OSErrors
        raise ValueError(
            f"tls={folder} must hold cert.pem and key.pem that belong together ({error})"
        ) from error
    return context


def app_runner(server: Server, static: Path | None = None) -> web.AppRunner:
    """The server's application, ready to be set up."""
    # No access log: addresses hold tokens and session ids.
    return web.AppRunner(application(server, static), access_log=None, shutdown_timeout=5)


async def serve(config: ServeConfig, server: Server) -> None:
    """Answer until a signal asks to stop, then say goodbye and save.

    Raises:
        BaseException: what the model's thread raised, after all clients were told.
    """
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    static = None if config.static is None else Path(config.static).expanduser()
    runner = app_runner(server, static)
    await server.engine.start()
    await runner.setup()
    driver = asyncio.create_task(server.engine.run())
    try:
        await web.TCPSite(runner, config.host, config.port, ssl_context=tls_context(config.tls)).start()
        scheme = "https" if config.tls else "http"
        host, port = runner.addresses[0][:2]
        logger.info("listening on %s://%s:%d, %d slots", scheme, host, port, config.slots)
        await asyncio.wait([driver, asyncio.create_task(stop.wait())], return_when=asyncio.FIRST_COMPLETED)
        server.failed = driver.done()
        logger.info("stopping")
        await server.say_goodbye()
    finally:
        await runner.cleanup()
        driver.cancel()
        try:
            with suppress(asyncio.CancelledError):
                await driver
        finally:
            await server.engine.close()
    logger.info("stopped")


@hydra.main(version_base="1.3", config_path="pkg://configs", config_name="serve")
def main(config: DictConfig) -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stdout)
    typed = typed_config(config, ServeConfig)
    check_config(typed)
    access = Access(read_token(typed.host, typed.token_file), typed.origins)
    if not is_loopback(typed.host) and typed.tls is None:
        logger.warning("without tls=FOLDER, the token and all that is said can be read on the way")
    asyncio.run(serve(typed, build_server(typed, access)))


if __name__ == "__main__":
    main()
