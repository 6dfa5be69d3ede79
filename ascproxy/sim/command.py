"""``ascproxy sim`` without a command line: check the options, bind, say where, serve until SIGINT or SIGTERM."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import ssl
import sys
import time

import orjson
import uvloop

from ascproxy.errors import AscproxyError, UsageError
from ascproxy.sim.server import Server, bind
from ascproxy.sim.settings import Options, Settings, settle

FREE_PORTS = range(20000, 32000)  # below the kernel's ephemeral range, whose ports outgoing connections may hold
TRIES = 100


def run(options: Options, *, as_json: bool) -> int:
    """Serve until a signal; 0 then. Raises UsageError and AscproxyError with a sentence for the operator.

    The first line of standard output appears when connections are accepted: with ``as_json``
    ``{"url","models","pid"}``, otherwise text.
    """
    settings = settle(options)
    tls = _tls(options)
    sock = _bind(options)
    uvloop.run(_serve(settings, sock, tls, as_json=as_json))
    return 0


def _bind(options: Options) -> socket.socket:
    if options.port:
        return bind(options.host, options.port)
    for port in random.sample(FREE_PORTS, TRIES):
        try:
            return bind(options.host, port)
        except AscproxyError as error:
            refused = error
    raise refused


def _tls(options: Options) -> ssl.SSLContext | None:
    if options.tls_certificate is None or options.tls_key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(options.tls_certificate, options.tls_key)
        if options.tls_client_ca is not None:
            context.load_verify_locations(options.tls_client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"--tls-certificate, --tls-key or --tls-client-ca cannot be used: {error}") from error
    return context


async def _serve(settings: Settings, sock: socket.socket, tls: ssl.SSLContext | None, *, as_json: bool) -> None:
    server = Server(settings, wall=time.time, entropy=os.urandom)
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    await server.start(sock, tls)
    _announce(server, settings, secure=tls is not None, as_json=as_json)
    await stopped.wait()
    server.stop()


def _announce(server: Server, settings: Settings, *, secure: bool, as_json: bool) -> None:
    host, port = server.address
    url = f"{'https' if secure else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
    if as_json:
        line = orjson.dumps({"url": url, "models": list(settings.models), "pid": os.getpid()}).decode()
    else:
        line = f"simulated {settings.type} at {url}, models: {', '.join(settings.models)}. Ctrl-C stops it."
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
