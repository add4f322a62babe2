"""The engine that answers: prefill, decode, streaming."""
