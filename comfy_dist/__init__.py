"""ComfyUI's objects to ours and back, by the process that the code runs in.

`main_process/` runs where ComfyUI's nodes and samplers do, `worker_process/` where its model does. What both know lies here:
what crosses between them (`wire`), what a worker's model can be asked (`comfy_host`), how ComfyUI's model is built
(`model_spec`, `gguf_spec`, `gguf_operations`), and how its sharding is proved (`self_test`).
"""
