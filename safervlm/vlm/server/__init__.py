"""A VLM behind an OpenAI-compatible server: requests, retries, and parsing of responses."""
