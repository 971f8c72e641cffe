"""What ranks hold once everything that was asked of them has been done."""

import time

from vllm_resident import Client
from vllm_resident.messages import RankStatus

_POLL_S = 0.1
_PATIENCE_S = 60.0
# The first may have been on its way already.
_HEARTBEATS = 2


def ranks_at_rest(client: Client) -> list[RankStatus]:
    """The ranks with their gauges, which come with heartbeats: read by each rank after
    this was called. Blocks for some two seconds; `TimeoutError` after a minute."""
    deadline = time.monotonic() + _PATIENCE_S
    ages: dict[int, float] = {}
    heard: dict[int, int] = {}
    while time.monotonic() < deadline:
        ranks = client.status().ranks
        for each in ranks:
            if each.heartbeat_age_s < ages.get(each.rank, each.heartbeat_age_s):
                heard[each.rank] = heard.get(each.rank, 0) + 1
            ages[each.rank] = each.heartbeat_age_s
        if all(heard.get(each.rank, 0) >= _HEARTBEATS for each in ranks):
            return ranks
        time.sleep(_POLL_S)
    raise TimeoutError(f"heartbeats by rank in {_PATIENCE_S:g} s: {heard}")
