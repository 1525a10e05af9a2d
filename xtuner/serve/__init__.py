"""The HTTP service with OpenAI's API."""
