"""What runs in ComfyUI's process: the MODEL without weights, and everything that nodes call."""
