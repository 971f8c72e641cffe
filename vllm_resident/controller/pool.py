"""The controller's events in, its effects out: one method per event.

Pure and synchronous: `now` (monotonic seconds) comes in with each event, the effects
come out in the order in which they must be done. `service.py` is the only caller.
"""

from __future__ import annotations

import math

from vllm_resident.controller import (
    commands,
    demand,
    engines,
    frontends,
    losses,
    own_switches,
    prefetch,
    ranks,
    reports,
    requests,
    switches,
    tally,
    watchers,
)
from vllm_resident.controller.effects import Effect, Note, StopController
from vllm_resident.controller.state import (
    ENGINE_GONE,
    PROGRESS_INTERVAL_S,
    Engine,
    PoolState,
    Rank,
    Stop,
)
from vllm_resident.controller.validation import check_timeout
from vllm_resident.errors import (
    CommandRejected,
    ProtocolError,
    RankTimeout,
    ResidentError,
)
from vllm_resident.messages import (
    AddRequest,
    AttachFrontend,
    AwaitEngine,
    CallFailed,
    CancelGenerate,
    CheckpointRead,
    ClientMessage,
    DetachFrontend,
    EndAwait,
    EndWatch,
    EngineBuilt,
    EngineClosed,
    EngineFailed,
    EnginePrepared,
    EngineResumed,
    EngineSuspended,
    ExitRank,
    FromRank,
    FrontendConnected,
    FrontendRequests,
    Generate,
    GetStatus,
    GetTotals,
    Heartbeat,
    Hello,
    PhaseStarted,
    PoolStopped,
    PrefetchCheckpoint,
    Progress,
    RankMessage,
    ReportCalls,
    RequestFailed,
    RequestOutput,
    RequestsAccepted,
    ShutdownPool,
    StatusReported,
    ToRankMessage,
    TotalsReported,
    WatchPool,
)

# What is never rejected and opens no call.
AtOnce = (
    GetStatus
    | GetTotals
    | CancelGenerate
    | DetachFrontend
    | EndAwait
    | EndWatch
    | ReportCalls
)


class Pool:
    """The state machine of one pool."""

    def __init__(self, state: PoolState) -> None:
        self.state = state

    # -------------------------------------------------------- events

    def client_message(
        self, client: bytes, message: ClientMessage, now: float
    ) -> list[Effect]:
        """A client's command. Rejected, it is answered and nothing is changed."""
        self.state.now = now
        try:
            self._command(client, message, now)
        except ResidentError as error:
            self.state.send_to_client(
                client, CallFailed(call=message.call, error=error.to_info())
            )
        return self._settle(now)

    def client_gone(self, client: bytes) -> list[Effect]:
        """The client does not read any more: its generate calls are aborted, its
        switches go on."""
        requests.client_gone(self.state, client)
        frontends.client_gone(self.state, client)
        demand.client_gone(self.state, client)
        switches.client_gone(self.state, client)
        prefetch.client_gone(self.state, client)
        watchers.client_gone(self.state, client)
        if stop := self.state.stop:
            stop.callers = [caller for caller in stop.callers if caller[0] != client]
        return self._take()

    def rank_message(self, message: RankMessage, now: float) -> list[Effect]:
        """A message whose sender proved to be `message.rank`."""
        self.state.now = now
        if isinstance(message, Hello):
            ranks.on_hello(self.state, message, now)
        elif isinstance(message, Heartbeat):
            self._heard(message)
            ranks.on_heartbeat(self.state, message)
        elif not self._heard(message) or not self._answer(message, now):
            self.state.num_stale_messages += self.state.stop is None
        return self._settle(now)

    def rank_ended(self, rank: int, pid: int, now: float) -> list[Effect]:
        """The kernel says that the process is gone; no-op for a former process."""
        known = self.state.ranks.get(rank)
        if known and known.pid == pid and self.state.is_attached(rank):
            ranks.lose(self.state, known, "its process ended", now)
        return self._settle(now)

    def rank_unreachable(self, rank: int, now: float) -> list[Effect]:
        """A message could not be handed to the rank's connection. It is lost, and so
        is the rank: what it missed cannot be made up for."""
        if self.state.is_attached(rank):
            ranks.lose(self.state, self.state.ranks[rank], "its connection ended", now)
        return self._settle(now)

    def message_refused(
        self, rank: int, message: ToRankMessage, error: ResidentError, now: float
    ) -> list[Effect]:
        """A message to the rank could not be encoded (it is too large)."""
        if isinstance(message, AddRequest):
            requests.not_delivered(self.state, message.request, error)
        else:
            self.state.effects.append(Note(f"not sent to rank {rank}: {error}"))
        return self._settle(now)

    def frame_refused(
        self, identity: bytes, call: int, error: ProtocolError
    ) -> list[Effect]:
        """Frames that are not a message; a rank could not read the answer."""
        self.state.num_protocol_errors += 1
        self.state.effects.append(Note(f"refused a frame of {identity!r}: {error}"))
        if not identity.startswith(b"rank-"):
            self.state.send_to_client(
                identity, CallFailed(call=call, error=error.to_info())
            )
        return self._take()

    def tick(self, now: float) -> list[Effect]:
        """Time passed; a few times a second."""
        state = self.state
        state.now = now
        elapsed_s = 0.0 if state.last_tick is None else now - state.last_tick
        state.last_tick = now
        ranks.tick(state, elapsed_s, now)
        self._expire_engines(now)
        requests.tick(state, now)
        frontends.settle(state, now)
        frontends.tick(state, now)
        demand.tick(state, now)
        switches.tick(state, now)
        prefetch.tick(state, now)
        watchers.tick(state, now)
        return self._settle(now)

    @property
    def look_again_at(self) -> float:
        """When there is something to decide, should nothing happen before."""
        is_stopping = self.state.stop is not None
        return math.inf if is_stopping else self.state.demand.look_again_at

    def look_again(self, now: float) -> list[Effect]:
        """It is `look_again_at`."""
        self.state.now = now
        return self._settle(now)

    def stop(self, timeout_s: float, now: float) -> list[Effect]:
        """End the pool: every rank is told to exit, the controller ends with them."""
        self._stop(timeout_s, now)
        return self._settle(now)

    # -------------------------------------------------------- commands

    def _command(self, client: bytes, message: ClientMessage, now: float) -> None:
        if isinstance(message, AtOnce):
            self._at_once(client, message, now)
            return
        if self.state.stop is not None and not isinstance(message, ShutdownPool):
            raise CommandRejected(f"pool {self.state.name!r} is stopping")
        if isinstance(message, AwaitEngine):
            self._check_call(client, message.call)
            demand.await_engine(self.state, client, message, now)
            return
        if isinstance(message, WatchPool):
            self._check_call(client, message.call)
            watchers.watch(self.state, client, message, now)
            return
        check_timeout(message.timeout_s)
        self._check_call(client, message.call)
        if isinstance(message, commands.SwitchCommand):
            commands.run(self.state, client, message, now)
            return
        match message:
            case PrefetchCheckpoint():
                prefetch.start(self.state, client, message, now)
            case Generate():
                requests.generate(self.state, client, message, now)
            case AttachFrontend():
                frontends.attach(self.state, client, message, now)
            case ShutdownPool():
                self._stop(message.timeout_s, now)
                assert self.state.stop is not None
                self.state.stop.callers.append((client, message.call))

    def _at_once(self, client: bytes, message: AtOnce, now: float) -> None:
        state = self.state
        match message:
            case GetStatus(call=call):
                status = reports.pool_status(state, now)
                state.send_to_client(client, StatusReported(call=call, status=status))
            case GetTotals(call=call):
                totals = tally.totals(state.history.tally)
                state.send_to_client(client, TotalsReported(call=call, totals=totals))
            case EndWatch(call=call):
                watchers.end(state, client, call)
            case CancelGenerate(call=call):
                requests.cancel(state, client, call)
            case DetachFrontend(call=call):
                frontends.detach(state, client, call)
            case EndAwait(call=call):
                demand.end(state, client, call)
            case ReportCalls():
                demand.note_calls(state, message, now)

    def _check_call(self, client: bytes, call: int) -> None:
        state = self.state
        calls = {(switch.client, switch.call) for switch in state.switches}
        calls |= {(request.client, request.call) for request in state.requests.values()}
        calls |= {(each.client, each.call) for each in state.frontends.values()}
        calls |= state.demand.callers.keys()
        calls |= {(each.client, each.call) for each in state.watchers}
        if (client, call) in calls or prefetch.is_call(state, client, call):
            raise CommandRejected(f"call number {call} is in use: number calls anew")

    # -------------------------------------------------------- what ranks say

    def _heard(self, message: FromRank) -> bool:
        """Whether the rank is one this controller greeted; notes that it lives."""
        if not self.state.is_attached(message.rank):
            return False
        self.state.ranks[message.rank].silent_s = 0.0
        return True

    def _answer(self, message: RankMessage, now: float) -> bool:
        """Hand the message to the engine it is of; False if it is stale."""
        assert not isinstance(message, Hello | Heartbeat)
        state = self.state
        if isinstance(message, CheckpointRead):
            prefetch.on_read(state, message, now)
            return True
        rank = state.ranks[message.rank]
        if isinstance(message, EngineClosed) and ranks.on_leftover_closed(
            state, rank, message, now
        ):
            return True
        engine = state.engines.get(message.generation)
        if (
            engine is None
            or rank.rank not in engine.ranks
            or self._is_new(rank, engine)
        ):
            return False
        return self._engine_message(engine, message, now)

    def _is_new(self, rank: Rank, engine: Engine) -> bool:
        """Whether the engine is of the rank's earlier life, which it cannot mean."""
        return engine.generation in rank.leftovers

    def _engine_message(self, engine: Engine, message: RankMessage, now: float) -> bool:
        state = self.state
        match message:
            case PhaseStarted():
                engines.on_phase_started(state, engine, message, now)
            case EnginePrepared():
                return engines.on_prepared(state, engine, message, now)
            case EngineBuilt():
                return engines.on_built(state, engine, message, now)
            case EngineSuspended():
                return engines.on_suspended(state, engine, message, now)
            case EngineResumed():
                return engines.on_resumed(state, engine, message, now)
            case EngineClosed():
                return engines.on_closed(state, engine, message, now)
            case EngineFailed():
                engines.on_failed(state, engine, message, now)
            case _:
                return self._leader_message(engine, message, now)
        return True

    def _leader_message(self, engine: Engine, message: RankMessage, now: float) -> bool:
        """What only a leader says: of requests and of frontends."""
        if isinstance(message, RequestOutput | RequestFailed | RequestsAccepted):
            return self._request_message(engine, message)
        if message.rank != engine.leader:
            return False
        if isinstance(message, FrontendConnected):
            frontends.on_connected(self.state, engine, message, now)
        elif isinstance(message, FrontendRequests):
            frontends.on_requests(self.state, engine, message)
        return True

    def _request_message(
        self,
        engine: Engine,
        message: RequestOutput | RequestFailed | RequestsAccepted,
    ) -> bool:
        request = self.state.requests.get(message.request)
        is_others = request is not None and request.generation != engine.generation
        if message.rank != engine.leader or is_others:
            return False
        if isinstance(message, RequestOutput):
            requests.on_output(self.state, message)
        elif isinstance(message, RequestFailed):
            requests.on_failed(self.state, message)
        return True

    # -------------------------------------------------------- time, stop, effects

    def _expire_engines(self, now: float) -> None:
        state = self.state
        for engine in list(state.engines.values()):
            if engine.phase in ENGINE_GONE:
                continue  # ended by what happened to an engine before it
            silent, error = losses.expire(state, engine, now)
            for rank in sorted(silent):
                if error is not None and state.is_attached(rank):
                    ranks.evict(state, state.ranks[rank], error, now)

    def _stop(self, timeout_s: float, now: float) -> None:
        state = self.state
        if state.stop is not None:
            state.stop.deadline = min(state.stop.deadline, now + timeout_s)
            return
        state.stop = Stop(
            started=now,
            deadline=now + timeout_s,
            timeout_s=timeout_s,
            next_progress=now + PROGRESS_INTERVAL_S,
        )
        error = CommandRejected(f"pool {state.name!r} is stopping").to_info()
        for request in list(state.requests.values()):
            requests.fail(state, request, error)
        frontends.fail_all(state, error)
        demand.fail_all(state, error)
        watchers.fail_all(state, error)
        prefetch.fail_all(state, error)
        for switch in state.switches:
            answer = CallFailed(call=switch.call, error=error)
            state.send_to_client(switch.client, answer)
        state.switches.clear()
        state.engines.clear()
        for rank in state.ranks.values():
            if state.is_attached(rank.rank):
                message = ExitRank(reason=f"pool {state.name!r} is stopping")
                state.send_to_rank(rank.rank, message)

    def _settle(self, now: float) -> list[Effect]:
        """Take every step that the event made possible."""
        state = self.state
        if state.stop is not None:
            self._finish_stop(state.stop, now)
            return self._take()
        num_switches = -1
        while num_switches != len(state.switches):
            while any(switches.advance(state, s, now) for s in state.switches):
                pass
            num_switches = len(state.switches)
            switches.restore(state, now)
            own_switches.start_declared(state, now)
            own_switches.demote_for_budget(state, now)
            # Frontends hear that an engine is awake before those who wait for it do.
            frontends.settle(state, now)
            demand.settle(state, now)
        watchers.settle(state, now)
        return self._take()

    def _finish_stop(self, stop: Stop, now: float) -> None:
        state = self.state
        left = [r for r in state.ranks.values() if state.is_attached(r.rank)]
        if stop.is_over:
            return
        if left and now < stop.deadline:
            self._report_stop(stop, now)
            return
        stop.is_over = True
        for client, call in stop.callers:
            if left:
                error = _not_gone(left, stop.timeout_s).to_info()
                state.send_to_client(client, CallFailed(call=call, error=error))
            else:
                state.send_to_client(client, PoolStopped(call=call))
        state.effects.append(StopController(0))

    def _report_stop(self, stop: Stop, now: float) -> None:
        """Show who waits for the stop that the controller is still there."""
        if now < stop.next_progress:
            return
        stop.next_progress = now + PROGRESS_INTERVAL_S
        for client, call in stop.callers:
            elapsed_s = now - stop.started
            progress = Progress(call=call, engine="", phase="stop", elapsed_s=elapsed_s)
            self.state.send_to_client(client, progress)

    def _take(self) -> list[Effect]:
        effects, self.state.effects = self.state.effects, []
        return effects


def _not_gone(left: list[Rank], timeout_s: float) -> RankTimeout:
    names = ", ".join(f"{rank.rank} (pid {rank.pid} on {rank.host})" for rank in left)
    return RankTimeout(
        f"told to exit, but still there after {timeout_s:g} s: rank {names}",
        rank=left[0].rank,
        phase="shutdown",
    )


def new_pool(
    *,
    name: str,
    session: str,
    host_id: str,
    controller_pid: int,
    heartbeat_timeout_s: float,
    now: float,
) -> Pool:
    """A pool that no rank has greeted yet."""
    return Pool(
        PoolState(
            name=name,
            session=session,
            host_id=host_id,
            controller_pid=controller_pid,
            started=now,
            heartbeat_timeout_s=heartbeat_timeout_s,
        )
    )
