"""GGUF files: what they hold, their weights as float, and conversion from and to safetensors. Pure torch and numpy."""
