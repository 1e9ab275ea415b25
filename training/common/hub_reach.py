"""Whether the Hub can be reached at all: its client asks six times, for half a minute, before it says no."""

import socket
import time
import urllib.request
from urllib.parse import urlsplit

from huggingface_hub import constants

from hf_mim.training.common.checkpoint_path import is_cached


PAUSE, PATIENCE = 1, 5  # seconds: before the second attempt, and for each of the two


def is_out_of_reach(name: str) -> bool:
    """Whether a model would have to come from the Hub, and nothing listens there. False where that cannot be told:
    offline, when the client looks into its cache alone, and behind a proxy."""
    address = urlsplit(constants.ENDPOINT)
    host, port = address.hostname, address.port or (80 if address.scheme == "http" else 443)
    proxies = urllib.request.getproxies()
    if constants.HF_HUB_OFFLINE or host is None or address.scheme in proxies or "all" in proxies or is_cached(name):
        return False
    if listens(host, port):
        return False
    time.sleep(PAUSE)
    return not listens(host, port)


def listens(host: str, port: int) -> bool:
    """Whether one of a host's addresses takes a connection within `PATIENCE`, all of them together."""
    deadline = time.monotonic() + PATIENCE
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in addresses:
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        with socket.socket(family, kind, protocol) as connection:
            connection.settimeout(left)
            try:
                connection.connect(address)
            except OSError:
                continue
            return True
    return False
