"""Ray's driver, in a small process of its own.

Ray ends the process that has called `ray.init` when its raylet or its GCS ends, whatever the reason. That must not be ComfyUI.
So a courier lives between them: it starts Ray, hands calls to the workers and their answers back, as bytes that it does not
look into, and nothing else. When it ends, Ray ends with it, and `RayDriver` starts both again. Steps, which are many and may be
small, go past it to the workers of this machine.

    ComfyUI's process            the courier                  a worker
    link.RayDriver  ──pipe────►  courier.main  ──Ray────────► actor.RayWorker ► Worker
          ├───────── steps: a socket (see `line`) ───────────────────┤
          └───────── tensors: memory files, mapped by the worker ────┘
"""
