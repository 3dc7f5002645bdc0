"""The `rayltx` command: the main job without ComfyUI."""
