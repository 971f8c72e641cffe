"""The one process that owns a pool's state; imports neither torch nor vLLM.

state.py      phases and their legal transitions, and what is known (data)
effects.py    what the controller wants done
planner.py    which ranks an engine gets, what a new layout keeps (pure)
memory.py     who gives up memory for whom
validation.py what an engine spec may say (pure)
ranks.py      greetings, heartbeats, losses
engines.py    one engine from PrepareEngine to EngineClosed
commands.py   what clients ask for, as moves of engines
switches.py   the order of the moves; the way back
requests.py   generate calls
prefetch.py   checkpoints read into memory, one rank of each machine
reports.py    what switches took, what the pool looks like
pool.py       one method per event, a list of effects out of each
service.py    the loop: sockets, pidfds, timers; the only writer of the state
"""
