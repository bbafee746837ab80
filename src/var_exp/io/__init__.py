"""Files and folders: written whole, verified, locked."""
