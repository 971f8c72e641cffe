"""The one process that owns a pool's state; imports neither torch nor vLLM.

state.py      phases and their legal transitions, and what is known (data)
effects.py    what the controller wants done
planner.py    which ranks an engine gets, what a new layout keeps (pure)
validation.py what an engine spec may say (pure)
ranks.py      greetings, heartbeats, losses
engines.py    one engine from PrepareEngine to EngineClosed
switches.py   load, unload, apply, restore: the order engines are moved in
requests.py   generate calls
reports.py    what switches took, what the pool looks like
pool.py       one method per event, a list of effects out of each
service.py    the loop: sockets, pidfds, timers; the only writer of the state
"""
