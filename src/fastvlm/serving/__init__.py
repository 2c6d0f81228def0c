"""An OpenAI-compatible server on the engine, and a page to try it on."""
