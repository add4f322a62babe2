"""What the lifecycle runs on: settings, artifact store, tracking, telemetry, launchers and serving.

Import the module that is needed (`nvila_platform.store`, `nvila_platform.settings`, ...); this package itself imports
nothing, so that a lookup in the store costs milliseconds.
"""
