"""The edge layer: what is flashed onto a board."""
