"""Which address is answered by what, and what every answer says to browsers."""

from collections.abc import Awaitable, Callable
from pathlib import Path

from aiohttp import web

from inference.live.application import Server

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_PAGE = Path(__file__).with_name("page")
_PAGE_FILES = {"/": "index.html"} | {f"/{path.name}": path.name for path in sorted(_PAGE.iterdir())}

_EVERYWHERE = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
}
_OUR_PAGE = _EVERYWHERE | {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Permissions-Policy": "microphone=(self)",
    "Cache-Control": "no-cache",
}


def index_of(static: Path) -> Path:
    """The page in a folder. Raises ValueError where there is none."""
    index = static / "index.html"
    if not index.is_file():
        raise ValueError(f"static={static} holds no index.html; give the folder of Moshi's web page")
    return index


def application(server: Server, static: Path | None = None) -> web.Application:
    """The server's addresses.

    Args:
        server: answers.
        static: folder of Moshi's own page; None for ours.
    Raises:
        ValueError: the folder holds no page.
    """
    open_paths = {"/healthz"}
    app = web.Application(middlewares=[_gate(server, open_paths, ask=static is not None)])
    app.router.add_get("/healthz", server.health)
    app.router.add_get("/metrics", server.show_metrics)
    app.router.add_get("/api/chat", server.chat)
    app.router.add_get("/api/access", server.may_talk)
    if static is None:
        open_paths.update(_PAGE_FILES)  # it holds no secrets, and asks for the token itself
        for path in _PAGE_FILES:
            app.router.add_get(path, _page_file)
        return app
    index = index_of(static)

    async def root(request: web.Request) -> web.StreamResponse:
        return web.FileResponse(index)

    app.router.add_get("/", root)
    app.router.add_static("/", static)
    return app


def _gate(server: Server, open_paths: set[str], ask: bool) -> Callable[..., Awaitable[web.StreamResponse]]:
    """The middleware that lets requests in.

    Args:
        open_paths: for everybody.
        ask: let browsers ask for the token, as user name and password.
    """

    @web.middleware
    async def gate(request: web.Request, handler: Handler) -> web.StreamResponse:
        answer = await _answer(request, handler)
        if not answer.prepared:
            answer.headers.update(_OUR_PAGE if request.path in _PAGE_FILES and not ask else _EVERYWHERE)
        return answer

    async def _answer(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path not in open_paths:
            if not server.access.knows_token(request):
                answer = server.refuse(401, "token", "this server needs a token")
                if ask:
                    answer.headers["WWW-Authenticate"] = 'Basic realm="Moshi-TTT: the token is the password"'
                return answer
            if (why := server.access.foreign(request)) is not None:
                return server.refuse(403, "origin", why)
        try:
            return await handler(request)
        except web.HTTPException as error:  # no such address
            return web.Response(status=error.status, text=f"{error.reason}\n")

    return gate


async def _page_file(request: web.Request) -> web.StreamResponse:
    return web.FileResponse(_PAGE / _PAGE_FILES[request.path])
