"""The server of the pages: Streamlit, in this process, on one port of one address."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import ipaddress
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from megatron_vpmoe.errors import BusyError, ConfigError, VpmoeError
from megatron_vpmoe.runtime.device import prepare
from vpmoe.app.places import Places

# What takes seconds to load: before a page asks for it.
_HEAVY = ("altair", "pandas", "vpmoe.eval.conversation", "megatron_vpmoe.training.checkpoint_files")
_SCRIPT = Path(__file__).with_name("script.py")


def serve(places: Places, *, port: int, address: str, browser: bool, say: Callable[[str], None]) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Args:
        places: what the pages show.
        port: 0: a free one.
        address: name or number.
        browser: open one.
        say: told the URL once it answers, and before who else can reach it.

    Raises:
        VpmoeError: Streamlit is not installed.
        BusyError: the port is taken.
        ConfigError: the address is none of this machine's.
    """
    if importlib.util.find_spec("streamlit") is None:
        raise VpmoeError(
            "the app needs Streamlit, which is not installed",
            source="vpmoe app",
            remedy="pip install 'vpmoe[app]', or in this repository: .venv/bin/pip install -e '.[app]'",
        )
    port = free_port(address, port)
    from streamlit.web import bootstrap

    prepare()  # before a page that reads data imports upstream
    for name in _HEAVY:
        importlib.import_module(name)
    if not is_loopback(address):
        say(
            f"listening on {address}: whoever can reach it reads the runs and data here, and opens any model that this "
            "account can read. There is no password"
        )
    options = {
        "server.address": address,
        "server.port": port,
        "server.headless": not browser,
        "server.fileWatcherType": "none",
        "browser.gatherUsageStats": False,
        "runner.magicEnabled": False,  # a docstring behind a constant is no text of a page
        "client.toolbarMode": "minimal",
        "logger.hideWelcomeMessage": True,  # to name an external address it would ask one
        "global.developmentMode": False,
    }
    threading.Thread(target=_tell, args=(places, address, port, say), daemon=True).start()
    bootstrap.load_config_options(options)
    bootstrap.run(str(_SCRIPT), False, [places.argument()], options)


def free_port(address: str, port: int) -> int:
    """``port`` if nobody listens there, or for 0 one where nobody does; raises as :func:`serve`."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
            return probe.getsockname()[1]
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(
            f"there is no address {address!r}: {error}", source="--address", remedy="127.0.0.1, or one of this machine"
        ) from error
    except PermissionError as error:
        raise ConfigError(
            f"port {port} is not for this account", source="--port", remedy="--port 0: a free one"
        ) from error
    except OSError as error:
        raise BusyError(
            f"port {port} of {address} cannot be used: {error.strerror}",
            source="--port, --address",
            remedy="--port 0 takes a free one; an app that you started before may still run there",
        ) from error


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(address, None)}
        return all(ipaddress.ip_address(str(one)).is_loopback for one in found)
    except (OSError, ValueError):
        return False


def _tell(places: Places, address: str, port: int, say: Callable[[str], None]) -> None:
    """Say where the pages are, once they are there and the first one is quick."""
    host = address
    if address in ("0.0.0.0", "::"):
        host = "127.0.0.1" if address == "0.0.0.0" else "::1"
    while True:
        try:
            socket.create_connection((host, port), timeout=1).close()
            break
        except OSError:
            time.sleep(0.05)
    from vpmoe.app.store import warm  # whose caches are the running server's
    from vpmoe.app.views import runs  # noqa: F401

    warm(places)
    # Streamlit has garbage collected after each run of the script, before the browser gets the last of it: what is
    # loaded by now is none.
    gc.collect()
    gc.freeze()
    shown = f"[{host}]" if ":" in host else host
    say(f"vpmoe app: http://{shown}:{port} (Ctrl-C ends it)")
