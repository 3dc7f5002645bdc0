"""ComfyUI's objects to ours and back.

In the workers: `bootstrap` makes the worker's ComfyUI that of the user, `loader` builds ComfyUI's model on shared weights,
`shared_patcher` patches it without writing them, `worker_model` is what the cluster runs, `self_test` proves the seam.
In ComfyUI's process: `detection` finds what a file is, `twin` is the MODEL without weights, `forwarding` sends patches.
"""
