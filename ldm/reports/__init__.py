"""Pages that hold everything: one HTML file, no network, no server."""
