"""Ports for the processes of distributed tests."""

import random
import socket


def free_port() -> str:
    """A port that nobody listens on.

    It lies below those that systems give to connections: one of these could be taken between now
    and its use, by another test as well.
    """
    for port in random.SystemRandom().sample(range(12_000, 32_000), 100):
        with socket.socket() as sock:
            try:
                sock.bind(('127.0.0.1', port))
            except OSError:
                continue
            return str(port)
    raise RuntimeError('a hundred ports are in use')
