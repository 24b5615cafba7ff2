"""What :class:`safervlm.vlm.api.Server` is made of: the connection, reading an answer, reading a failure, the key."""
