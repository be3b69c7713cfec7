"""The drawn world that the miniature is trained on, its CLIP, and what is measured of it."""
