"""What enters and leaves the process: texts, images and settings, files and caches, the terminal, signals, errors."""
