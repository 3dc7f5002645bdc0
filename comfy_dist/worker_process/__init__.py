"""What runs in a worker: ComfyUI's own model, on weights that all workers share."""
