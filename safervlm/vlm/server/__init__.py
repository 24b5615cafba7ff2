"""A VLM behind an OpenAI-compatible server: requests, their retries, and reading what comes back."""
