"""Starting the processes of a step: on this machine, or as a job of a cluster, behind one interface."""

from nvila_platform.launch.launcher import Launcher
from nvila_platform.launch.local import LocalLauncher, calm_threads

__all__ = ["Launcher", "LocalLauncher", "calm_threads"]
