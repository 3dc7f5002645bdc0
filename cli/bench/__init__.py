"""`rayltx bench`: what can be measured of RayLTX."""
