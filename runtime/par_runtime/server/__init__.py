"""Images over HTTP: ``application`` is an ASGI application of a :class:`par_runtime.Batcher`, ``parvis serve`` runs it.

Needs the extra ``serve``: Starlette, uvicorn and the client library of Prometheus.
"""

from par_runtime.server.app import application as application
