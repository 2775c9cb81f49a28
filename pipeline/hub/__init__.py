"""Access to the Hub: tokens, retries, downloads, and what a repository holds."""
