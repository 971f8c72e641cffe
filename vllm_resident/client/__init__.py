"""Clients of a pool: `AsyncClient` for asyncio code, `Client` for any other.

`connection` moves messages, `asynchronous` is the API over it, `blocking` waits for the
asynchronous client in the caller's thread. What a command means is the pool's to say.
"""

from vllm_resident.client.asynchronous import AsyncClient
from vllm_resident.client.blocking import Client

__all__ = ["AsyncClient", "Client"]
