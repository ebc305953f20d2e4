"""One paper, one room. `tubelet.catalogue` lists them by name; nothing is imported here, so that one room costs one import."""
