"""Input and output of the process: texts, images, settings, files, caches, the terminal, signals and errors."""
