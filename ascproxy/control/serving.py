"""The HTTP server under control's applications: Hypercorn, on sockets that the supervisor bound (DESIGN D15)."""

from __future__ import annotations

import asyncio

from hypercorn.asyncio import serve
from hypercorn.config import Config

from ascproxy.control.app import Application

GRACE_S = 1.5
KEEP_ALIVE_S = 75


async def answer(application: Application, descriptor: int, stop: asyncio.Event) -> None:
    """Serve an application on a listening socket until ``stop``."""
    config = Config()
    config.bind = [f"fd://{descriptor}"]
    config.accesslog = None
    config.errorlog = None
    config.graceful_timeout = GRACE_S
    config.include_server_header = False
    config.keep_alive_timeout = KEEP_ALIVE_S
    await serve(application, config, shutdown_trigger=stop.wait)  # type: ignore[arg-type]
