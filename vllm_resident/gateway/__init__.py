"""The pool over HTTP: vLLM's own OpenAI server for each model, behind one address.

`python -m vllm_resident.gateway` is one process with one ASGI app. A request goes to
the frontend of the model it names, which is brought up if it sleeps or is not loaded.
Only `frontend` imports vLLM; the rest is plain asyncio over the client.
"""
