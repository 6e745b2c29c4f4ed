"""The page, served to this machine and no other."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stillroom.demo.exhibits import Exhibit, Judge
from stillroom.demo.page import dressed, import_gradio, layout
from stillroom.demo.studio import Studio
from stillroom.errors import UserError
from stillroom.folders.shipped import model_folder
from stillroom.pictures import load_generator
from stillroom.recipe import Recipe, from_here
from stillroom.task import IN_MEMORY, model_class, model_home
from stillroom.tasks.words import listed

HOST = "127.0.0.1"
FIRST_PORT, PORTS = 7860, 40
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
"""What the browser may fetch: nothing from any other machine."""


ASKED = {"captions": "in words", "labels": "by class"}


def open_studio(student: str, teachers: Sequence[str] | None = None) -> Studio:
    """The models by run, folder or shipped name. The student is read at once, teachers when they first draw.

    teachers: by default those of the student's run; a model folder says nothing of them.
    Raises UserError for a folder that is missing or holds no model, for a model that draws nothing, and for teachers
    that are asked otherwise than the student.
    """
    judge = Judge()
    first = Exhibit(_name(student), lambda: load_generator(student), judge)
    asked = first.model.asked_by
    names = _teachers_of(student) if teachers is None else list(teachers)
    names = [name for name in names if model_home(name) != model_home(student)]
    for name in names:
        kind = model_class(model_home(name))
        if kind.asked_by != asked:
            theirs = ASKED.get(kind.asked_by, kind.does)
            raise UserError(
                f"student {student!r} is asked {ASKED[asked]}, teacher {name!r} {theirs}",
                cure="give teachers of the same kind: --teachers a,b",
            )
    return Studio(first, [Exhibit(_name(name), lambda name=name: load_generator(name), judge) for name in names])


def _name(name: str) -> str:
    return Path(name).name or name


def _teachers_of(student: str) -> list[str]:
    folder = model_folder(student)
    if not (folder / "recipe.yaml").is_file():
        return []
    recipe = Recipe.load(folder)
    with recipe.place():
        return [from_here(name) for name in listed(recipe.teacher) if name != IN_MEMORY]


def application(studio: Studio) -> Any:
    """The page as an ASGI application that answers to this machine's own name only and sends the browser nowhere."""
    gr = import_gradio()
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_Guarded)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])

    return gr.mount_gradio_app(
        app, layout(studio), path="/", server_name=HOST, footer_links=[], run_history=False, ssr_mode=False,
        show_error=False, max_file_size="20mb", enable_monitoring=False, pwa=False, mcp_server=False, **dressed(gr),
    )  # fmt: skip


class _Guarded:
    """ASGI middleware: every answer carries :data:`POLICY`."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                told = {"content-security-policy": POLICY, "referrer-policy": "no-referrer"}
                headers = [(name.encode(), value.encode()) for name, value in told.items()]
                message = {**message, "headers": [*message.get("headers", ()), *headers]}
            await send(message)

        await self.app(scope, receive, guarded)


def listen(port: int | None = None) -> socket.socket:
    """A socket on the loopback address: at ``port`` (0: any free one), by default the first free one from 7860.

    Raises UserError for a port that is taken or out of range.
    """
    if port is not None and not 0 <= port < 65536:
        raise UserError(f"--port must be from 0 to 65535, got {port}")
    reason = ""
    for one in range(FIRST_PORT, FIRST_PORT + PORTS) if port is None else (port,):
        listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((HOST, one))
            listening.listen()
        except OSError as problem:
            listening.close()
            reason = problem.strerror or str(problem)
        else:
            return listening
    where = f"port {port}" if port is not None else f"every port from {FIRST_PORT} to {FIRST_PORT + PORTS - 1}"
    raise UserError(f"cannot listen at {HOST}, {where}: {reason.lower()}", cure="give --port 0 for any free port")


def serve(student: str, teachers: Sequence[str] | None = None, port: int | None = None) -> None:
    """Serve the page of :func:`open_studio` until Ctrl-C. Raises UserError as it and :func:`listen` do, and where
    gradio is missing."""
    import_gradio()
    with listen(port) as listening:
        app = application(open_studio(student, teachers))
        import uvicorn

        # Pages still open are cut off at the end, which uvicorn would report as errors.
        config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1)
        print(f"http://{HOST}:{listening.getsockname()[1]}   (Ctrl-C ends it)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listening])
