"""The model server: a KServe model and an OpenAI-compatible router over one engine, and the client that starts it.

Importing this package is cheap: the web framework and the KServe SDK are imported when a server starts.
"""

from __future__ import annotations

from nvila_platform.serving.client import Answer, ChatClient, RunningServer, ask, start_server

__all__ = ["Answer", "ChatClient", "RunningServer", "ask", "start_server"]
