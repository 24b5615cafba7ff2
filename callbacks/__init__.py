"""Lightning callbacks that read or write files during a loop; configurations name them by class path."""
