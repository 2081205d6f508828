"""The runtime: who this process is and how it reaches its peers (launch), the axes of parallelism (mesh), what happens
when something fails (faults), and what a run tells about itself (metrics, progress). It knows nothing of models.
"""

from megallama.runtime.faults import StopSignal, guard
from megallama.runtime.launch import World, connect, disconnect, rendezvous, resolve
from megallama.runtime.mesh import ONE, Axis, Mesh, build_mesh, layout, sketch
from megallama.runtime.metrics import Metrics, memory, read_metrics, throughput
from megallama.runtime.progress import Progress

__all__ = [
    "ONE",
    "Axis",
    "Mesh",
    "Metrics",
    "Progress",
    "StopSignal",
    "World",
    "build_mesh",
    "connect",
    "disconnect",
    "guard",
    "layout",
    "memory",
    "read_metrics",
    "rendezvous",
    "resolve",
    "sketch",
    "throughput",
]
