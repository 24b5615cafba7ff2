"""Lightning callbacks: everything that reads or writes files while a loop runs; YAML names them by path."""
