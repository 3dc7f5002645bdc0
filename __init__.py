"""ComfyUI's way in: the nodes of RayLTX."""
