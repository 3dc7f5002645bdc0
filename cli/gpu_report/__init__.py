"""`rayltx doctor --gpu-report FILE`: everything that a GPU does for RayLTX, tried on the user's own."""
