"""Secrets by which the processes of one job start recognize each other; torch-free.

A job has a token, which its scheduler passes to the nodes where other users cannot read it. The key of a start is
derived from the token and the name of the start, so a process of an earlier start cannot take part in a later one.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

from everstep.errors import ConfigError

TOKEN = "EVERSTEP_RUN_TOKEN"
"""Environment variable: secret of a job, of at least LEAST_LETTERS characters."""
START_KEY = "EVERSTEP_START_KEY"
"""Environment variable: secret of one start, in hexadecimal digits."""
STORE = "EVERSTEP_STORE"
"""Environment variable: address of the start's store, `unix:PATH` or `tcp:HOST:PORT`."""
LEAST_LETTERS = 32


def new_secret() -> str:
    return secrets.token_hex(32)


def check_token(token: str) -> str:
    """Return the token; raise ConfigError if it is short enough to be guessed."""
    if len(token) < LEAST_LETTERS:
        raise ConfigError(f"{TOKEN} has {len(token)} letters (at least {LEAST_LETTERS}); use openssl rand -hex 32")
    return token


def start_key(token: str, name: str) -> str:
    """Return the key of the start `name`, in hexadecimal digits."""
    return hmac.digest(token.encode(), b"everstep start " + name.encode(), hashlib.sha256).hex()
